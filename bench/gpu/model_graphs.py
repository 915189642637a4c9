# SPDX-License-Identifier: Apache-2.0
"""Whole accelerated models for the checks of what surrounds a call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastvit
from gpu.device import Device
from gpu.model_contenders import library_model, random_images
from gpu.model_plan import CONVIT, VIT_C, Contest
from gpu.model_rows import rows


def accelerated(device: Device, pair: str, mode: str) -> tuple[nn.Module, Tensor]:
    """timm's ConViT-small or ViT_C-4GF after ``fastvit.accelerate``, in evaluation, and images.

    Args:
        pair: whose first model it is.
        mode: of ``fastvit.accelerate``.
    """
    size, side = {CONVIT: "small", VIT_C: "4GF"}[pair], 224
    if device.note:
        size, side = "dry", 32
    contest = Contest(pair, size, batch=2, image_size=side)
    model = library_model(rows(contest)[0], device, torch.bfloat16).eval()
    fastvit.accelerate(model, mode=mode, strict=True)
    return model, random_images(device, contest)[0]

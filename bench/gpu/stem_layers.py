# SPDX-License-Identifier: Apache-2.0
"""The stem as layers: fastvit's and the library's way, with the same weights, and their images."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import fastvit
from fastvit import reference
from gpu.device import Device
from gpu.patch_compare import STATISTICS
from gpu.shapes import Stem
from gpu.timing import draws


def plain_layer(device: Device, problem: Stem, dtype: torch.dtype) -> reference.ConvStem:
    """Convolution, batch norm and ReLU by PyTorch's modules, as torchvision and timm build them,
    with statistics and weights as after some training.
    """
    torch.manual_seed(0)
    layer = reference.ConvStem(
        3, problem.channels, problem.strides, problem.D, **STATISTICS, device=device.device
    )
    with torch.no_grad():
        for stage in layer.stages:
            stage.bn.weight.uniform_(0.5, 1.5)
            stage.bn.bias.uniform_(-0.5, 0.5)
            stage.bn.running_mean.uniform_(-0.5, 0.5)
            stage.bn.running_var.uniform_(0.5, 1.5)
    return layer.to(dtype)


def our_layer(plain: reference.ConvStem, backend: str) -> fastvit.ConvStem:
    """fastvit's, with tensors of its own."""
    layer = fastvit.ConvStem.from_module(
        copy.deepcopy(plain), mean=plain.mean, std=plain.std, backend=backend
    )
    layer.training = plain.training
    return layer


class ChannelsLast(nn.Module):
    """The library's layer in channels_last, the faster layout on recent GPUs."""

    #: How it takes its images.
    channels_last = True

    def __init__(self, plain: reference.ConvStem) -> None:
        super().__init__()
        self.layer = copy.deepcopy(plain).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def stem_images(
    device: Device, problem: Stem, dtype: torch.dtype, *, layout: str = "planar", seed: int = 0
) -> Tensor:
    """Images (B, 3, H, W), float ones as if normalised."""
    shape = (problem.B, 3, *problem.size)
    if dtype == torch.uint8:
        generator = torch.Generator(device.device).manual_seed(seed)
        options: dict[str, Any] = {"generator": generator, "device": device.device}
        found = torch.randint(256, shape, dtype=dtype, **options)
    else:
        found = draws(device, *shape, dtype=dtype, seed=seed)
    if layout == "channels_last":
        return found.contiguous(memory_format=torch.channels_last)
    return found

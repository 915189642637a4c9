# SPDX-License-Identifier: Apache-2.0
"""Augmentation of batches: shift and mirror, mixup, CutMix, and the targets that go with them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.config import Config
from training.seeds import derive


def shift_and_flip(
    images: Tensor, draws: Tensor, *, padding: int, flip: bool, fill: float
) -> Tensor:
    """Crop each image at random from its padded self, and mirror every other one.

    Args:
        images: (B, C, H, W).
        draws: (B, 3) in [0, 1): of rows, of columns, of mirroring.
        padding: pixels added on each side.
        flip: whether to mirror.
        fill: value of the padding.
    """
    if flip:
        mirrored = (draws[:, 2] < 0.5).view(-1, 1, 1, 1)
        images = torch.where(mirrored, images.flip(3), images)
    if not padding:
        return images
    batch, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4, value=fill)
    top, left = (draws[:, :2] * (2 * padding + 1)).long().unbind(1)
    rows = (top[:, None] + torch.arange(height))[:, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, :]
    # Indices around a slice move the channels to the end.
    return padded[torch.arange(batch)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


def soft_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Targets (B, num_classes): ``smoothing`` spread over all classes, the rest on the label."""
    return F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def cut_box(
    share: float, height: int, width: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A box of ``1 - share`` of the image's area around a random pixel, cut at the border."""
    half_height = round(height * (1 - share) ** 0.5) // 2
    half_width = round(width * (1 - share) ** 0.5) // 2
    row, column = int(rng.integers(height)), int(rng.integers(width))
    return (
        max(row - half_height, 0),
        min(row + half_height, height),
        max(column - half_width, 0),
        min(column + half_width, width),
    )


def mix(images: Tensor, targets: Tensor, config: Config, *place: int) -> tuple[Tensor, Tensor]:
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899) of a batch with itself reversed.

    One share is drawn for the batch from Beta(alpha, alpha); with both alphas given a fair coin
    chooses between the two.

    Args:
        images, targets: (B, C, H, W) and (B, num_classes).
        config: for ``mixup``, ``cutmix`` and the seed.
        *place: where the batch stands in the run: step and slot.
    """
    if not (config.mixup or config.cutmix):
        return images, targets
    rng = np.random.default_rng(derive(config.seed, "mix", *place))
    cut = bool(config.cutmix) and (not config.mixup or rng.random() < 0.5)
    alpha = config.cutmix if cut else config.mixup
    share = rng.beta(alpha, alpha)
    if cut:
        top, bottom, left, right = cut_box(share, images.shape[2], images.shape[3], rng)
        images = images.clone()
        images[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
        # The border may have cut the box: the share is that of the pixels.
        share = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
    else:
        images = torch.lerp(images.flip(0), images, share)
    return images, torch.lerp(targets.flip(0), targets, share)

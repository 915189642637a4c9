# SPDX-License-Identifier: Apache-2.0
"""uint8 images without a normalising pass: mean and std folded into a patch embedding.

    Σ W (u / 255 - mean) / std  =  Σ W' (u - c) + Σ W' (c - 255 mean),   W' = W / (255 std)

with c = round(255 mean) per channel. u - c is an integer of at most 255 in size, hence exact in
bfloat16 and float16; without the centring the products would cancel in the sum, which costs a
factor of four in accuracy there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvit import _native
from fastvit.ops.tokens import wide


class Uint8Fold(NamedTuple):
    """Per-channel constants of the fold, each (C, 1, 1) in float32 or float64."""

    offset: Tensor
    shift: Tensor
    scale: Tensor


def fold_numbers(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Offset c, shift c - 255 mean and scale 255 std of each channel, as numbers.

    Without ``mean`` and ``std`` the images are divided by 255.
    """
    # Python floats are float64: the shift is a small difference of large numbers.
    centers = [255.0 * m for m in (mean if mean is not None else [0.0] * channels)]
    offset = tuple(float(round(c)) for c in centers)
    shift = tuple(o - c for o, c in zip(offset, centers, strict=True))
    return offset, shift, tuple(255.0 * s for s in (std if std is not None else [1.0] * channels))


def fold_constants(
    mean: Sequence[float] | None, std: Sequence[float] | None, weight: Tensor
) -> Uint8Fold:
    """Offset c, shift c - 255 mean and scale 255 std of each channel of ``weight`` (D, C, ph, pw).

    Without ``mean`` and ``std`` the images are divided by 255.
    """
    dtype, device = wide(weight.dtype), weight.device
    return Uint8Fold(
        *(
            torch.tensor(constant, dtype=dtype, device=device).view(-1, 1, 1)
            for constant in fold_numbers(mean, std, weight.shape[1])
        )
    )


def fold_uint8(
    weight: Tensor, bias: Tensor | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight W' and bias for images that were centred by the offset, which comes third.

    Args:
        weight: (D, C, ph, pw).
        bias: (D,) or None.
        mean, std: C floats each, of images in 0..1, or None.

    Returns:
        (D, C, ph, pw) and (D,) in float32 (float64 for float64 weights), and (C, 1, 1).
    """
    constants = fold_constants(mean, std, weight)
    weight = weight.detach().to(wide(weight.dtype)).contiguous()
    bias = None if bias is None else bias.detach().to(weight.dtype).contiguous()
    if weight.device.type == "cpu" and _native.reason() is None:
        mean = [0.0] * weight.shape[1] if mean is None else list(mean)
        std = [1.0] * weight.shape[1] if std is None else list(std)
        folded, folded_bias = torch.empty_like(weight), weight.new_empty(weight.shape[0])
        _native.load().fold_uint8(weight, bias, mean, std, folded, folded_bias)
        return folded, folded_bias, constants.offset
    folded = weight / constants.scale
    folded_bias = (folded * constants.shift).sum((1, 2, 3))
    return folded, folded_bias if bias is None else folded_bias + bias, constants.offset

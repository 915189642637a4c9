# SPDX-License-Identifier: Apache-2.0
"""Patch embedding of backend ``torch``: a matrix product by PyTorch's operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit.ops.library import picked
from fastvit.ops.linear import linear
from fastvit.ops.tokens import assemble, token_gradients, wide
from fastvit.ops.uint8_fold import fold_constants, fold_uint8
from fastvit.reference import normalize_images

Floats = Sequence[float] | None


def _patches(images: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Images (B, C, H, W) as their patches (B, gh, gw, C, ph, pw), a view."""
    (ph, pw), (height, width) = patch_size, images.shape[-2:]
    grid = images.unflatten(3, (width // pw, pw)).unflatten(2, (height // ph, ph))
    return grid.permute(0, 2, 4, 1, 3, 5)


def _rows(patches: Tensor) -> Tensor:
    """Patches (B, gh, gw, C, ph, pw) as the rows (B, N, C ph pw) of a matrix, copied once."""
    return patches.flatten(3).flatten(1, 2)


def _pixel_unit(dtype: torch.dtype) -> float:
    """What pixels count in. W / (255 std) can be subnormal in float16, where 1 / 256 costs
    nothing: the pixels stay exact.
    """
    return 1 / 256 if dtype == torch.float16 else 1.0


def _centred(images: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images minus the offset of their channel, in pixel units; exact."""
    centred = images.to(dtype).sub_(offset.to(dtype))
    unit = _pixel_unit(dtype)
    return centred if unit == 1.0 else centred.mul_(unit)


def _folds(images: Tensor, dtype: torch.dtype) -> bool:
    """Whether normalisation goes into the weights: in half precision, where it gains accuracy.
    A processor normalises in float32 faster than it folds.
    """
    return images.dtype == torch.uint8 and (dtype != wide(dtype) or images.device.type != "cpu")


def forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    cls_token: Tensor | None,
    mean: Floats,
    std: Floats,
) -> Tensor:
    dtype = weight.dtype
    if _folds(images, dtype):
        weight, bias, offset = fold_uint8(weight, bias, mean, std)
        weight, bias = (weight / _pixel_unit(dtype)).to(dtype), bias.to(dtype)
        images = _centred(images, offset, dtype)
    else:
        images = normalize_images(images, mean, std, dtype)
    rows = _rows(_patches(images, weight.shape[-2:]))
    return assemble(linear(rows, weight.flatten(1), bias), pos_embed, cls_token)


def backward(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    cls_token: Tensor | None,
    mean: Floats,
    std: Floats,
    wanted: Sequence[bool],
) -> list[Tensor]:
    dx, dpos, dcls = token_gradients(grad, pos_embed, cls_token)
    dx = dx.reshape(-1, dx.shape[-1])
    patch_size = weight.shape[-2:]
    dimages = dweight = dbias = None
    if wanted[0]:
        dpatches = (dx @ weight.flatten(1)).view(_patches(images, patch_size).shape)
        dimages = torch.empty_like(images, memory_format=torch.contiguous_format)
        _patches(dimages, patch_size).copy_(dpatches)
    if wanted[2] or _folds(images, weight.dtype):
        dbias = dx.sum(0, dtype=wide(dx.dtype))
    if wanted[1]:
        dweight = _weight_gradient(dx, images, weight, dbias, mean, std)
    if dbias is not None:
        dbias = dbias.to(weight.dtype)
    results = (dimages, dweight, dbias, dpos, dcls)
    return picked(wanted, results)


def _weight_gradient(
    dx: Tensor, images: Tensor, weight: Tensor, dbias: Tensor | None, mean: Floats, std: Floats
) -> Tensor:
    """DW (D, C, ph, pw) from the gradient of the tokens (B N, D)."""
    patch_size = weight.shape[-2:]
    if not _folds(images, weight.dtype):
        images = normalize_images(images, mean, std, weight.dtype)
        return (dx.mT @ _rows(_patches(images, patch_size)).flatten(0, 1)).view(weight.shape)
    # The folded bias depends on the weight too: its share is dbias times the shift.
    offset, shift, scale = fold_constants(mean, std, weight)
    centred = _centred(images, offset, weight.dtype)
    dweight = (dx.mT @ _rows(_patches(centred, patch_size)).flatten(0, 1)).view(weight.shape).to(
        scale.dtype
    ) / _pixel_unit(weight.dtype)
    assert dbias is not None
    return ((dweight + dbias.view(-1, 1, 1, 1) * shift) / scale).to(weight.dtype)

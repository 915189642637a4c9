# SPDX-License-Identifier: Apache-2.0
"""Patch embedding of backend ``native`` on a processor: the compiled module gathers, normalises
and places; the product is PyTorch's.

uint8 pixels are normalised while they are gathered, by a table of their 256 values, which costs
no more than converting them. Folding the statistics into the weights would cost a pass over these
and gain no accuracy: in bfloat16 the error is 2.4e-3 of the result either way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit import _native
from fastvit.ops.library import picked
from fastvit.ops.linear import linear
from fastvit.ops.patch_order import image_gradient, is_interleaved, is_planar, matrix, weight_of
from fastvit.ops.tokens import token_gradients, wide

Floats = Sequence[float] | None

#: Elements of the images for one of the weight from which reordering the weight takes less time.
_FEWEST_IMAGE_ELEMENTS = 3


def _readable(images: Tensor, weight: Tensor, reordered: bool) -> tuple[Tensor, bool]:
    """Images as their patches can be read, and whether the columns of the rows are interleaved,
    (ph, pw, C), else planar, (C, ph, pw); ``reordered``: whether that order costs a pass over the
    weight, which few images are not worth.
    """
    patch_width = weight.shape[-1]
    if is_interleaved(images, patch_width) and (
        not reordered or images.numel() >= _FEWEST_IMAGE_ELEMENTS * weight.numel()
    ):
        return images, True
    return images if is_planar(images, patch_width) else images.contiguous(), False


def _rows(images: Tensor, weight: Tensor, interleaved: bool, mean: Floats, std: Floats) -> Tensor:
    """The patches as rows (B, N, K), normalised."""
    batch, channels, height, width = images.shape
    ph, pw = weight.shape[-2:]
    patches = (height // ph) * (width // pw)
    rows = weight.new_empty(batch, patches, channels * ph * pw)
    threads = torch.get_num_threads()
    _native.load().patch_rows(images, ph, pw, interleaved, mean, std, rows, threads)
    return rows


def forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    cls_token: Tensor | None,
    mean: Floats,
    std: Floats,
) -> Tensor:
    """Tokens (B, N[+1], D) of images (B, C, H, W) and a weight (D, C, ph, pw), both float32,
    float16 or bfloat16, or uint8 images.
    """
    reordered = not weight.is_contiguous(memory_format=torch.channels_last)
    images, interleaved = _readable(images, weight, reordered)
    rows = _rows(images, weight, interleaved, mean, std)
    x = linear(rows, matrix(weight, interleaved), bias)
    if pos_embed is None and cls_token is None:
        return x
    pos_embed, cls_token = (
        None if t is None else t.to(x.dtype).contiguous() for t in (pos_embed, cls_token)
    )
    B, N, D = x.shape
    out = x if cls_token is None else x.new_empty(B, N + 1, D)
    _native.load().place_tokens(x, pos_embed, cls_token, out, torch.get_num_threads())
    return out


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
    """The gradients of the five tensors that are wanted, from that of the tokens."""
    dx, dpos, dcls = token_gradients(grad, pos_embed, cls_token)
    dx = dx.reshape(-1, dx.shape[-1])
    dimages = dweight = dbias = None
    if wanted[0]:
        dimages = image_gradient(dx, images, weight)
    if wanted[1]:
        images, interleaved = _readable(images, weight, reordered=True)
        rows = _rows(images, weight, interleaved, mean, std)
        dweight = weight_of(dx.mT @ rows.flatten(0, 1), weight, interleaved)
    if wanted[2]:
        dbias = dx.sum(0, dtype=wide(dx.dtype)).to(weight.dtype)
    return picked(wanted, (dimages, dweight, dbias, dpos, dcls))

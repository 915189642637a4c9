# SPDX-License-Identifier: Apache-2.0
"""Patch embedding of backend ``native`` on a GPU: gather, product, bias, position and class token
in one launch; uint8 pixels are normalised by folding the statistics into the weight first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvit import _native
from fastvit.ops import patch_embed_torch
from fastvit.ops.library import picked
from fastvit.ops.patch_order import image_gradient, is_interleaved, is_planar, matrix, weight_of
from fastvit.ops.tokens import token_gradients
from fastvit.reference import normalize_images

Floats = Sequence[float] | None

#: The rows of a half-precision matrix that the TMA reads begin at multiples of that many elements.
_TMA_ELEMENTS = 8
#: Outputs and elements of a patch that a block of the weight's gradient computes, and the fewest
#: patches worth a block.
_GRADIENT_TILE = 128
_FEWEST_PATCHES = 512


class Kernels(NamedTuple):
    """Which of the kernels run. The two methods are those of the other implementations."""

    #: Whether float32 operands are rounded to tf32.
    tf32: bool
    #: Tokens by the kernel of compute capability 9.0 where it takes the call.
    hopper: bool = False
    #: For the check: the small or the large tile, instead of the choice by size.
    small_tile: bool | None = None
    #: For the check: NaN in what is to be written, where else the right numbers of an earlier call
    #: could lie.
    poisoned: bool = False

    def forward(
        self,
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
        B, C, height, width = images.shape
        D, _C, ph, pw = weight.shape
        if _is_empty(images, weight):
            tensors = (images, weight, bias, pos_embed, cls_token)
            return patch_embed_torch.forward(*tensors, mean, std)
        images, interleaved, mean, std = _readable(images, weight, mean, std)
        dtype = weight.dtype
        bias, pos_embed, cls_token = _as(dtype, bias), _as(dtype, pos_embed), _as(dtype, cls_token)
        patches = (height // ph) * (width // pw)
        out = self._empty(weight, B, patches + int(cls_token is not None), D)
        module = _native.load()
        K = C * ph * pw
        # Rows that the TMA cannot read as they are get gaps, where it is to read them.
        gap = -K % _TMA_ELEMENTS if self.hopper else 0
        if gap and not module.hopper_has_work(B * patches, D, weight.device.index or 0):
            gap = 0
        if images.dtype == torch.uint8:
            columns = self._matrix(weight, D, K, gap)
            folded_bias = self._empty(weight, D, dtype=torch.float32)
            module.fold_patch_weight(
                weight.contiguous(), bias, mean, std, interleaved, columns, folded_bias
            )
            bias = folded_bias
        elif gap:
            columns = self._matrix(weight, D, K, gap).copy_(matrix(weight, interleaved))
        else:
            columns = (matrix(weight, interleaved) if interleaved else weight).contiguous()
        module.patch_embed(
            images, columns, bias, pos_embed, cls_token, mean, std, ph, pw,
            interleaved, self.tf32, out, self.small_tile, self.hopper,
        )  # fmt: skip
        return out

    def backward(
        self,
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
        if _is_empty(images, weight):
            tensors = (images, weight, bias, pos_embed, cls_token)
            return patch_embed_torch.backward(grad, *tensors, mean, std, wanted)
        dx, dpos, dcls = token_gradients(grad, pos_embed, cls_token)
        dimages = dweight = dbias = None
        if wanted[0]:
            dimages = image_gradient(dx.flatten(0, 1), images, weight)
        if wanted[2] or (wanted[1] and images.dtype == torch.uint8):
            dbias = dx.sum((0, 1), dtype=torch.float32)
        if wanted[1]:
            dweight = self._weight_gradient(dx, images, weight, dbias, mean, std)
        if dbias is not None:
            dbias = dbias.to(weight.dtype)
        return picked(wanted, (dimages, dweight, dbias, dpos, dcls))

    def _weight_gradient(
        self,
        dx: Tensor,
        images: Tensor,
        weight: Tensor,
        dbias: Tensor | None,
        mean: Floats,
        std: Floats,
    ) -> Tensor:
        """DW (D, C, ph, pw) from the gradient of the patch tokens (B, N, D)."""
        images, interleaved, mean, std = _readable(images, weight, mean, std)
        if dx.stride(2) != 1:
            dx = dx.contiguous()
        D, K = weight.shape[0], math.prod(weight.shape[1:])
        rows = dx.shape[0] * dx.shape[1]
        splits = _splits(rows, D, K, weight.device)
        partial = self._empty(weight, splits, D, K, dtype=torch.float32)
        dweight = self._empty(weight, D, K)
        _native.load().patch_weight_gradient(
            images, dx, mean, std, dbias if images.dtype == torch.uint8 else None,
            *weight.shape[-2:], interleaved, self.tf32, partial, dweight,
        )  # fmt: skip
        return weight_of(dweight, weight, interleaved)

    def _matrix(self, like: Tensor, rows: int, columns: int, gap: int) -> Tensor:
        if gap == 0:
            return self._empty(like, rows, columns)
        return self._empty(like, rows, columns + gap).narrow(1, 0, columns)

    def _empty(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        out = like.new_empty(shape, dtype=dtype)
        return out.fill_(float("nan")) if self.poisoned else out


def _as(dtype: torch.dtype, x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    # Comparing first: a conversion that has nothing to do takes 0.7 µs.
    return (x if x.dtype == dtype else x.to(dtype)).contiguous()


def _is_empty(images: Tensor, weight: Tensor) -> bool:
    """Whether there are no patches, or patches of nothing: no kernel is needed."""
    return images.numel() == 0 or weight.numel() == 0


def _readable(
    images: Tensor, weight: Tensor, mean: Floats, std: Floats
) -> tuple[Tensor, bool, Floats, Floats]:
    """Images that the kernels can read, whether their pixels are interleaved, and the statistics
    that are left to be applied.
    """
    # The statistics of more do not fit into the arguments of a kernel.
    if images.dtype == torch.uint8 and images.shape[1] > _native.load().MOST_PIXEL_CHANNELS:
        images, mean, std = normalize_images(images, mean, std, weight.dtype), None, None
    patch_width = weight.shape[-1]
    if is_planar(images, patch_width):
        return images, False, mean, std
    if is_interleaved(images, patch_width):
        return images, True, mean, std
    return images.contiguous(), False, mean, std


def _splits(rows: int, outputs: int, columns: int, device: torch.device) -> int:
    """Into how many shares the patches go: two blocks for each multiprocessor; the same for the
    same device, hence the same sums.
    """
    tiles = -(-outputs // _GRADIENT_TILE) * -(-columns // _GRADIENT_TILE)
    return max(1, min(2 * multiprocessors(device) // tiles, rows // _FEWEST_PATCHES))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

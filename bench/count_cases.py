# SPDX-License-Identifier: Apache-2.0
"""What ``bench/counts.py`` counts on the composed path: every op of the package at fixed shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvit import functional
from fastvit.functional import ConvStage

_BACKEND = "torch"
_DTYPES = (torch.float32, torch.bfloat16)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Case(NamedTuple):
    """A call, its inputs, and what else it learns."""

    name: str
    forward: Callable[..., Tensor]
    inputs: Sequence[Tensor]
    learned: Sequence[Tensor] = ()


def cases() -> list[Case]:
    """In the order of the table."""
    found = []
    for dtype in _DTYPES:
        found += [_gpsa(dtype), _mhsa(dtype), _stem(dtype, False), _stem(dtype, True)]
        found += [_patch_embed(dtype, False), _patch_embed(dtype, True)]
    return found


def _name(what: str, dtype: torch.dtype) -> str:
    return f"{what} {str(dtype).removeprefix('torch.')}"


def _leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    # Values play no part; zeros would make a softmax of equal scores, which is fine.
    return torch.zeros(shape, dtype=dtype).requires_grad_()


def _gpsa(dtype: torch.dtype) -> Case:
    """ConViT-S: more images than a tile has, so that there are several."""
    q, k, v = (_leaf(2, 196, 9, 48, dtype=dtype) for _ in range(3))
    position = _leaf(9, 3, dtype=dtype), _leaf(9, dtype=dtype)

    def forward(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, gating: Tensor) -> Tensor:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return functional.gpsa_attention(*heads, weight, gating, (14, 14), backend=_BACKEND)

    return Case(_name("gpsa B2 H9 14x14 d48", dtype), forward, (q, k, v, *position))


def _mhsa(dtype: torch.dtype) -> Case:
    q, k, v = (_leaf(2, 197, 6, 64, dtype=dtype) for _ in range(3))

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return functional.attention(*heads, backend=_BACKEND)

    return Case(_name("mhsa B2 H6 N197 d64", dtype), forward, (q, k, v))


def _stem(dtype: torch.dtype, training: bool) -> Case:
    """ViT_C-1GF's stem on small images."""
    channels, D = (24, 48, 96, 192), 192
    stages, learned, before = [], [], 3
    for C in channels:
        weight = _leaf(C, before, 3, 3, dtype=dtype)
        norm = [_leaf(C, dtype=dtype) for _ in range(2)]
        running = [torch.zeros(C, dtype=dtype), torch.ones(C, dtype=dtype)]
        stages.append(ConvStage(weight, *norm, *running, 2))
        learned += [weight, *norm]
        before = C
    projection = [_leaf(D, before, 1, 1, dtype=dtype), _leaf(D, dtype=dtype)]

    def forward(images: Tensor) -> Tensor:
        return functional.conv_stem(
            images, stages, *projection, training=training, backend=_BACKEND
        )

    name = f"conv_stem {'training' if training else 'eval'} B2 3x32x32 c24-48-96-192 D192"
    images = torch.zeros(2, 3, 32, 32, dtype=dtype)
    return Case(_name(name, dtype), forward, (images,), (*learned, *projection))


def _patch_embed(dtype: torch.dtype, pixels: bool) -> Case:
    weight, bias = _leaf(192, 3, 16, 16, dtype=dtype), _leaf(192, dtype=dtype)
    position, first = _leaf(1, 17, 192, dtype=dtype), _leaf(1, 1, 192, dtype=dtype)
    images = torch.zeros(4, 3, 64, 64, dtype=torch.uint8 if pixels else dtype)
    statistics = {"mean": _MEAN, "std": _STD} if pixels else {}

    def forward(images: Tensor) -> Tensor:
        return functional.patch_embed(
            images, weight, bias, pos_embed=position, cls_token=first, backend=_BACKEND,
            **statistics,
        )  # fmt: skip

    name = f"patch_embed {'uint8' if pixels else 'float'} B4 3x64x64 p16 D192"
    return Case(_name(name, dtype), forward, (images,), (weight, bias, position, first))

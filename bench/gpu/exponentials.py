# SPDX-License-Identifier: Apache-2.0
"""A kernel of nothing but exponentials, whose unit bounds attention as much as the products do."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNT = 256
_BLOCK = 1024


@triton.jit
def _exponentials(x, out, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at)
    for _ in range(COUNT):
        value = tl.exp2(-value)
    tl.store(out + at, value)


def exponentials(x: Tensor) -> Tensor:
    """COUNT of them for each element of a float32 vector of a multiple of 1024 elements."""
    out = torch.empty_like(x)
    _exponentials[(x.numel() // _BLOCK,)](x, out, COUNT, _BLOCK)
    return out

# SPDX-License-Identifier: Apache-2.0
"""Plain attention in PyTorch's operators, with a backward that recomputes."""

from __future__ import annotations

from torch import Tensor

from fastvit.ops.content import content_gradients, contents
from fastvit.ops.tokens import like_heads, like_packed, unpack_heads


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """(B, H, N, d) laid out as (B, N, H, d)."""
    out = like_heads(q)
    for content in contents(q, k, v, scale):
        out[content.where] = content.out
    return out


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The gradients of q, k and v as (B, N, 3, H, d)."""
    dqkv = like_packed(q, 3)
    dq, dk, dv = unpack_heads(dqkv)
    for tile in content_gradients(grad, q, k, v, scale):
        dq[tile.where], dk[tile.where], dv[tile.where] = tile.dq, tile.dk, tile.dv
    return dqkv

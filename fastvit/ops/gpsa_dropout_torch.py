# SPDX-License-Identifier: Apache-2.0
"""GPSA with attention dropout in PyTorch's operators, through the N x N maps: the same numbers and
the same mask as the kernels' (``kernels/dropout.py``), for calls whose kernels are not trusted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvit.ops.gpsa_torch import position_factors
from fastvit.ops.tokens import gradients_like, like_heads, wide
from fastvit.reference import relative_positions

_ROUNDS = 7
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _product(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word of a x, both of 32 bits, in int64."""
    high = (a * (x >> 16) + (a * (x & 0xFFFF) >> 16)) >> 16
    return high, (a * x) & _WORD


def _philox(counter: tuple[Tensor, ...], seed: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32 (Salmon et al. 2011) of four words, as int64, that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def kept(seed: Tensor, shape: tuple[int, int, int], dropout_p: float) -> Tensor:
    """Which weights of the mixed map stay: (B, H, N, N) of bool for ``shape`` (B, H, N).

    Key j takes word j % 4 of the counter (j // 4, query, head * B + image, 0); the upper 24 bits of
    it, as a number below 1, are at least ``dropout_p`` if the weight stays.
    """
    B, H, N = shape

    def count(size: int) -> Tensor:
        return torch.arange(size, device=seed.device)

    fours, queries = count((N + 3) // 4), count(N)[:, None]
    heads = (count(H) * B + count(B)[:, None])[:, :, None, None]
    words = torch.broadcast_tensors(*_philox((fours, queries, heads, seed.new_zeros(())), seed))
    word = torch.stack(words, -1).flatten(-2)[..., :N]
    # Not a copy from the host, which no CUDA graph takes.
    threshold = torch.full((), dropout_p, dtype=torch.float32, device=seed.device)
    return (word >> 8).float() * 2.0**-24 >= threshold


class _Maps(NamedTuple):
    """In float32, or float64 where the tokens are."""

    #: (B, H, N, N)
    content: Tensor
    #: (H, N, N)
    position: Tensor
    #: (H, 1, 1)
    gate: Tensor
    #: What every weight of the mixed map is multiplied by: 0 if it is dropped; (B, H, N, N).
    mask: Tensor

    def mixed(self) -> Tensor:
        """The mixed map under its mask."""
        return ((1.0 - self.gate) * self.content + self.gate * self.position) * self.mask


def _maps(
    q: Tensor,
    k: Tensor,
    pos_weight: Tensor,
    gating_param: Tensor,
    seed: Tensor,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
) -> _Maps:
    B, H, N, _ = q.shape
    content = (q @ k.mT * scale).softmax(-1)
    py, px, _, _ = position_factors(pos_weight, grid_size, q.dtype)
    position = (py[:, :, None, :, None] * px[:, None, :, None, :]).reshape(H, N, N)
    gate = torch.sigmoid(gating_param.to(position.dtype))[:, None, None]
    amplify = 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)
    mask = kept(seed, (B, H, N), dropout_p).to(content.dtype).mul_(amplify)
    return _Maps(content, position, gate, mask)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gating_param: Tensor,
    seed: Tensor,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
) -> Tensor:
    """The op's forward; (B, H, N, d) laid out as (B, N, H, d)."""
    out = like_heads(q)
    q, k, v = (x.to(wide(x.dtype)) for x in (q, k, v))
    maps = _maps(q, k, pos_weight, gating_param, seed, grid_size, scale, dropout_p)
    return out.copy_(maps.mixed().to(v.dtype) @ v)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gating_param: Tensor,
    seed: Tensor,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, ...]:
    """The gradients of q and k as (B, N, 2, H, d), of v, of ``pos_weight`` and ``gating_param``."""
    gradients, (dq, dk, dv) = gradients_like(q, v, packed=False)
    grad, q, k, v = (x.to(wide(x.dtype)) for x in (grad, q, k, v))
    maps = _maps(q, k, pos_weight, gating_param, seed, grid_size, scale, dropout_p)
    content, position, gate, mask = maps
    dv.copy_(maps.mixed().to(v.dtype).mT @ grad)
    dmixed = (grad @ v.mT) * mask
    inner = (content * dmixed).sum(-1, keepdim=True)
    scores = scale * (1.0 - gate) * content * (dmixed - inner)
    dq.copy_(scores.to(q.dtype) @ k)
    dk.copy_(scores.to(q.dtype).mT @ q)
    # One map serves all images, so the softmax's backward may follow their sum.
    total = position * dmixed.sum(0)
    logits = gate * (total - position * total.sum(-1, keepdim=True))
    offsets = relative_positions(grid_size, q.device, logits.dtype)[0]
    dpos_weight = torch.einsum("hij,ijc->hc", logits, offsets)
    moved = total.sum((1, 2)) - inner.sum((0, 2, 3))
    dgating = (gate * (1.0 - gate))[:, 0, 0] * moved
    return *gradients, dpos_weight.to(pos_weight.dtype), dgating.to(gating_param.dtype)

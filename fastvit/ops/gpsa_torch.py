# SPDX-License-Identifier: Apache-2.0
"""GPSA in PyTorch's operators: plain attention plus a separable position term.

The backward recomputes from q, k and v: nothing but the inputs is saved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvit.ops.content import content_gradients, contents
from fastvit.ops.tokens import gradients_like, like_heads, wide


class PositionFactors(NamedTuple):
    """Py (H, gh, gh) and Px (H, gw, gw), and the offsets that their logits are made of."""

    py: Tensor
    px: Tensor
    dy: Tensor
    dx: Tensor


def position_factors(
    pos_weight: Tensor, grid_size: tuple[int, int], dtype: torch.dtype
) -> PositionFactors:
    """The factors of P = Py ⊗ Px in float32, or float64 where it or ``dtype``, that of the
    tokens, is.
    """
    weight = pos_weight.to(wide(torch.promote_types(pos_weight.dtype, dtype)))
    a, b, c = weight[:, :, None, None].unbind(1)
    gh, gw = grid_size
    dy, dx = _offsets(gh, weight), _offsets(gw, weight)
    py = (b * dy + c * dy.square()).softmax(-1)
    px = (a * dx + c * dx.square()).softmax(-1)
    return PositionFactors(py, px, dy, dx)


def _offsets(side: int, like: Tensor) -> Tensor:
    """(side, side): coordinate of the key minus that of the query along one axis."""
    i = torch.arange(side, device=like.device, dtype=like.dtype)
    return i[None, :] - i[:, None]


def _on_grid(x: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """(B, H, N, d) as (B, H, gh, gw, d)."""
    return x.unflatten(2, grid_size)


def _along_x(factor: Tensor, x: Tensor) -> Tensor:
    """(I ⊗ factor) x for factor (H, gw, gw) and x (B, H, gh, gw, d)."""
    return factor[:, None] @ x


def _along_y(factor: Tensor, x: Tensor) -> Tensor:
    """(factor ⊗ I) x for factor (H, gh, gh) and x (B, H, gh, gw, d)."""
    return (factor @ x.flatten(3)).view(x.shape)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gating_param: Tensor,
    grid_size: tuple[int, int],
    scale: float,
) -> Tensor:
    """The op's forward; (B, H, N, d) laid out as (B, N, H, d)."""
    out = like_heads(q)
    factors = position_factors(pos_weight, grid_size, v.dtype)
    # The gate goes into the smaller factor, where it costs nothing.
    gate = torch.sigmoid(gating_param.to(factors.py.dtype))[:, None, None]
    gated_py, share = gate * factors.py, 1.0 - gate
    for where, content, value in contents(q, k, v, scale):
        heads = where[1]
        py, px, s = (x[heads].to(value.dtype) for x in (gated_py, factors.px, share))
        position = _along_y(py, _along_x(px, _on_grid(value, grid_size)))
        # In a contiguous tensor first: into a strided one, bfloat16 takes three times as long.
        out[where] = torch.addcmul(position.flatten(2, 3), content, s, out=content)
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gating_param: Tensor,
    grid_size: tuple[int, int],
    scale: float,
    packed: bool,
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v, ``packed`` as :func:`gradients_like` says, of ``pos_weight`` and
    of ``gating_param``.
    """
    factors = position_factors(pos_weight, grid_size, v.dtype)
    dtype = factors.py.dtype
    gate = torch.sigmoid(gating_param.to(dtype))
    gate_map = gate[:, None, None]
    gated_px, share = gate_map * factors.px, 1.0 - gate_map

    gradients, (dq, dk, dv) = gradients_like(q, v, packed)
    inner = torch.zeros_like(gate)
    grad_py, grad_px = torch.zeros_like(factors.py), torch.zeros_like(factors.px)
    for where, *content_gradient, dout, value in content_gradients(grad, q, k, v, scale):
        heads = where[1]
        content_dq, content_dk, content_dv = content_gradient
        py, px, gpx, s = (
            x[heads].to(value.dtype) for x in (factors.py, factors.px, gated_px, share)
        )
        dq[where], dk[where] = content_dq.mul_(s), content_dk.mul_(s)
        # Σ dO · Oc, since Oc = A v and content_dv = Aᵀ dO.
        inner[heads] += (content_dv * value).sum((0, 2, 3), dtype=dtype)

        # W = (I ⊗ Px) v and Y = (Pyᵀ ⊗ I) dO serve the value and both factors. The sums over
        # them cancel, and float16 would overflow in them.
        value, dout = _on_grid(value, grid_size), _on_grid(dout, grid_size)
        w = _along_x(px, value).to(dtype)
        grad_py[heads] += (dout.to(dtype).flatten(3) @ w.flatten(3).mT).sum(0)
        del w
        y = _along_y(py.mT, dout)
        grad_px[heads] += (y.to(dtype) @ value.to(dtype).mT).sum((0, 2))
        position_dv = _along_x(gpx.mT, y).flatten(2, 3)
        dv[where] = position_dv.addcmul_(content_dv, s)

    # dγ = g (1 - g) Σ dO · (Op - Oc), where Σ dO · Op = Σ Py · grad_py comes for free.
    moved = (factors.py * grad_py).sum((1, 2)) - inner
    dgating = gate * (1.0 - gate) * moved

    # Softmax backward on (H, side, side), then the coefficients of the logits.
    ty = gate_map * _softmax_backward(factors.py, grad_py)
    tx = gate_map * _softmax_backward(factors.px, grad_px)
    dx, dy = factors.dx, factors.dy
    da = (tx * dx).sum((1, 2))
    db = (ty * dy).sum((1, 2))
    dc = (tx * dx.square()).sum((1, 2)) + (ty * dy.square()).sum((1, 2))
    dpos_weight = torch.stack((da, db, dc), dim=1)
    return *gradients, dpos_weight.to(pos_weight.dtype), dgating.to(gating_param.dtype)


def _softmax_backward(probabilities: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the logits of a softmax over the last axis."""
    inner = probabilities * grad
    return inner - probabilities * inner.sum(-1, keepdim=True)

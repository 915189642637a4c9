# SPDX-License-Identifier: Apache-2.0
"""GPSA without N x N maps: plain attention plus a separable position term.

With j = (jy, jx) and i = (iy, ix) on the grid, the position score a dx + b dy + c (dx² + dy²)
splits into a part in x and a part in y, so its softmax is a Kronecker product P = Py ⊗ Px of two
row-stochastic matrices of the grid's sides, and pos_proj's bias cancels. Both maps have rows that
sum to one, so the renormalisation of the reference is the identity, and

    out = (1 - g) softmax(scale q kᵀ) v + g (Py ⊗ Px) v,    g = sigmoid(gating_param).

The backward recomputes from q, k and v: nothing but the inputs is saved.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit.ops.backend import Call, choose
from fastvit.ops.library import SingleBackward, differentiable, register, register_gradient
from fastvit.ops.sdpa import attention, attention_gradients
from fastvit.ops.tokens import wide


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


def _like_heads(q: Tensor) -> Tensor:
    """An empty (B, H, N, d) whose memory is (B, N, H, d), so that merging heads is a view."""
    B, H, N, d = q.shape
    # Not a transposed view, which the caller could not modify in place.
    return q.new_empty_strided((B, H, N, d), (N * H * d, d, H * d, 1))


def _in_heads_layout(x: Tensor) -> Tensor:
    """``x`` in the layout of :func:`_like_heads`, copied only if it has another."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _torch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gating_param: Tensor,
    grid_size: tuple[int, int],
    scale: float,
) -> Tensor:
    content = attention(q, k, v, scale)
    factors = position_factors(pos_weight, grid_size, v.dtype)
    # The gate goes into the smaller factor, where it costs nothing.
    gate = torch.sigmoid(gating_param.to(factors.py.dtype))[:, None, None]
    gated_py = (gate * factors.py).to(v.dtype)
    position = _along_y(gated_py, _along_x(factors.px.to(v.dtype), _on_grid(v, grid_size)))
    return torch.addcmul(
        position.flatten(2, 3), content, (1.0 - gate).to(v.dtype), out=_like_heads(q)
    )


def _torch_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gating_param: Tensor,
    grid_size: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    factors = position_factors(pos_weight, grid_size, v.dtype)
    dtype = factors.py.dtype
    gate = torch.sigmoid(gating_param.to(dtype))
    gate_map = gate[:, None, None]

    content = attention_gradients(grad, q, k, v, scale, 1.0 - gate)

    # Position: W = (I ⊗ Px) v and Y = (Pyᵀ ⊗ I) dO serve the value and both factors.
    py, px = factors.py.to(v.dtype), factors.px.to(v.dtype)
    v_grid, grad_grid = _on_grid(v, grid_size), _on_grid(grad, grid_size)
    w = _along_x(px, v_grid)
    y = _along_y(py.mT, grad_grid)
    dv_position = _along_x((gate_map * factors.px).mT.to(v.dtype), y)
    # These sums cancel, and float16 would overflow in them.
    grad_py = (grad_grid.to(dtype).flatten(3) @ w.to(dtype).flatten(3).mT).sum(0)
    grad_px = (y.to(dtype) @ v_grid.to(dtype).mT).sum((0, 2))

    # dγ = g (1 - g) Σ dO · (Op - Oc), where Σ dO · Op = Σ Py · grad_py comes for free.
    moved = (factors.py * grad_py).sum((1, 2)) - content.inner
    dgating = gate * (1.0 - gate) * moved

    # Softmax backward on (H, side, side), then the coefficients of the logits.
    ty = gate_map * _softmax_backward(factors.py, grad_py)
    tx = gate_map * _softmax_backward(factors.px, grad_px)
    dx, dy = factors.dx, factors.dy
    da = (tx * dx).sum((1, 2))
    db = (ty * dy).sum((1, 2))
    dc = (tx * dx.square()).sum((1, 2)) + (ty * dy.square()).sum((1, 2))
    return (
        _in_heads_layout(content.dq),
        _in_heads_layout(content.dk),
        torch.add(content.dv, dv_position.flatten(2, 3), out=_like_heads(v)),
        torch.stack((da, db, dc), dim=1).to(pos_weight.dtype),
        dgating.to(gating_param.dtype),
    )


def _softmax_backward(probabilities: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the logits of a softmax over the last axis."""
    inner = probabilities * grad
    return inner - probabilities * inner.sum(-1, keepdim=True)


_FORWARD = {"torch": _torch_forward}
_BACKWARD = {"torch": _torch_backward}


def _fake_forward(q: Tensor, *_: Any) -> Tensor:
    return _like_heads(q)


@register(
    "_gpsa_forward(Tensor q, Tensor k, Tensor v, Tensor pos_weight, Tensor gating_param, "
    "SymInt rows, SymInt columns, float scale, str backend) -> Tensor",
    _fake_forward,
)
def _gpsa_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gating_param: Tensor,
    rows: int,
    columns: int,
    scale: float,
    backend: str,
) -> Tensor:
    implementation = _FORWARD[choose(Call("gpsa", q.device, q.dtype), backend)]
    return implementation(q, k, v, pos_weight, gating_param, (rows, columns), scale)


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    like_parameters = (t.new_empty(t.shape) for t in (pos_weight, gating))
    return _like_heads(q), _like_heads(k), _like_heads(v), *like_parameters


@register(
    "_gpsa_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor pos_weight, "
    "Tensor gating_param, SymInt rows, SymInt columns, float scale, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
def _gpsa_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gating_param: Tensor,
    rows: int,
    columns: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    implementation = _BACKWARD[choose(Call("gpsa", q.device, q.dtype), backend)]
    return implementation(grad, q, k, v, pos_weight, gating_param, (rows, columns), scale)


def _fold(x: Tensor, dim: int | None, axis: int, count: int) -> Tensor:
    """Merge the dimension that ``vmap`` added at ``dim`` into ``axis``; None repeats ``x``."""
    if dim is None:
        x = x.unsqueeze(axis)
        return x.expand(*x.shape[:axis], count, *x.shape[axis + 1 :]).flatten(axis, axis + 1)
    return x.movedim(dim, axis).flatten(axis, axis + 1)


# Heads share nothing, so vmap's dimension becomes more of them, whatever it is mapped over.
_HEAD_AXES = {"grad": 1, "q": 1, "k": 1, "v": 1, "pos_weight": 0, "gating_param": 0}


def _over_more_heads(
    call: Any, names: tuple[str, ...], results: tuple[str, ...], info: Any, in_dims: Any, args: Any
) -> tuple[Any, Any]:
    """The ``vmap`` rule of ``call`` whose first arguments and results are those named."""
    count = info.batch_size
    axes = [_HEAD_AXES[name] for name in names]
    tensors = zip(args[: len(names)], in_dims[: len(names)], axes, strict=True)
    folded = [_fold(x, dim, axis, count) for x, dim, axis in tensors]
    out = call(*folded, *args[len(names) :])
    out_axes = tuple(_HEAD_AXES[name] for name in results)
    if isinstance(out, Tensor):
        return out.unflatten(1, (count, -1)), 1
    return tuple(
        x.unflatten(axis, (count, -1)) for x, axis in zip(out, out_axes, strict=True)
    ), out_axes


_INPUTS = ("q", "k", "v", "pos_weight", "gating_param")


class _GPSABackward(SingleBackward):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _gpsa_backward(*args)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        names = ("grad", *_INPUTS)
        return _over_more_heads(_GPSABackward.apply, names, _INPUTS, info, in_dims, args)


_backward = differentiable(_GPSABackward)(_gpsa_backward)


class _GPSA(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _gpsa_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.config = inputs[5:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return *_backward(grad, *ctx.saved_tensors, *ctx.config), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return _over_more_heads(_GPSA.apply, _INPUTS, ("q",), info, in_dims, args)


register_gradient("_gpsa_forward", _GPSA.backward, _GPSA.setup_context)

#: (q, k, v, pos_weight, gating_param, rows, columns, scale, backend) -> (B, H, N, d)
gpsa = differentiable(_GPSA)(_gpsa_forward)

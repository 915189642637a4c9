# SPDX-License-Identifier: Apache-2.0
"""GPSA without N x N maps, as an op.

With j = (jy, jx) and i = (iy, ix) on the grid, the position score a dx + b dy + c (dx² + dy²)
splits into a part in x and a part in y, so its softmax is a Kronecker product P = Py ⊗ Px of two
row-stochastic matrices of the grid's sides, and pos_proj's bias cancels. Both maps have rows that
sum to one, so the renormalisation of the reference is the identity, and

    out = (1 - g) softmax(scale q kᵀ) v + g (Py ⊗ Px) v,    g = sigmoid(gating_param).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastvit.ops import gpsa_torch
from fastvit.ops.backend import Call, choose
from fastvit.ops.flops import Shape, product
from fastvit.ops.library import SingleBackward, differentiable, register, register_gradient
from fastvit.ops.tokens import gradients_like, like_heads, unpack_heads
from fastvit.ops.vmap import over_more_heads
from fastvit.reference.arguments import untraced


@untraced
def call(q: Tensor, grid_size: tuple[int, int], dropout_p: float = 0.0) -> Call:
    """What the choice of a backend depends on."""
    return Call("gpsa", q.device, q.dtype, dropout_p, q.shape[-1], grid_size)


def flops(products: int, q: Shape) -> int:
    """Of ``products`` of an N x N map with tokens, and of one of the relative positions with the
    weights of the heads, for each image.
    """
    B, H, N, d = q
    return products * B * H * product(N, d, N) + B * product(N * N, 3, H)


def forward_flops(q: Shape, *_: Any, **__: Any) -> int:
    """The scores and the values; the weights are known where there are the positions."""
    return flops(2, q)


def backward_flops(_grad: Shape, q: Shape, *_: Any, **__: Any) -> int:
    """The gradients of the maps, of q, k and v and of the weights of the positions."""
    return flops(4, q)


def _fake_forward(q: Tensor, *_: Any) -> Tensor:
    return like_heads(q)


@register(
    "_gpsa_forward(Tensor q, Tensor k, Tensor v, Tensor pos_weight, Tensor gating_param, "
    "SymInt rows, SymInt columns, float scale, str backend) -> Tensor",
    _fake_forward,
    flops=forward_flops,
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
    grid_size = (rows, columns)
    if choose(call(q, grid_size), backend) == "triton":
        # Only here, since importing Triton takes time.
        from fastvit.ops import gpsa_triton
        from fastvit.ops.gpsa_trust import trusted_plan

        plan = trusted_plan("forward", q, grid_size, backend)
        if plan is not None:
            return gpsa_triton.forward(q, k, v, pos_weight, gating_param, grid_size, scale, plan)
    return gpsa_torch.forward(q, k, v, pos_weight, gating_param, grid_size, scale)


def _gradients(
    packed: bool,
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
) -> tuple[Tensor, ...]:
    grid_size = (rows, columns)
    inputs = (grad, q, k, v, pos_weight, gating_param, grid_size, scale, packed)
    if choose(call(q, grid_size), backend) == "triton":
        # Only here, since importing Triton takes time.
        from fastvit.ops import gpsa_triton
        from fastvit.ops.gpsa_trust import trusted_plan

        plan = trusted_plan("backward", q, grid_size, backend)
        if plan is not None:
            return gpsa_triton.backward(*inputs, plan)
    return gpsa_torch.backward(*inputs)


def _fake_gradients(packed: bool, *args: Any) -> tuple[Tensor, ...]:
    _, q, _, v, pos_weight, gating_param, *_ = args
    gradients, _ = gradients_like(q, v, packed)
    parameters = (pos_weight, gating_param)
    return *gradients, *(x.new_empty(x.shape) for x in parameters)


_BACKWARD_ARGUMENTS = (
    "Tensor grad, Tensor q, Tensor k, Tensor v, Tensor pos_weight, Tensor gating_param, "
    "SymInt rows, SymInt columns, float scale, str backend"
)


@register(
    f"_gpsa_backward({_BACKWARD_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    functools.partial(_fake_gradients, False),
    flops=backward_flops,
)
def _gpsa_backward(*args: Any) -> tuple[Tensor, ...]:
    return _gradients(False, *args)


@register(
    f"_gpsa_backward_qkvpacked({_BACKWARD_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    functools.partial(_fake_gradients, True),
    flops=backward_flops,
)
def _gpsa_backward_qkvpacked(*args: Any) -> tuple[Tensor, ...]:
    return _gradients(True, *args)


_PARAMETERS = ("pos_weight", "gating_param")
_SEPARATE = ("q", "k", "v", *_PARAMETERS)
_PACKED = ("qk", "v", *_PARAMETERS)
_ALL_PACKED = ("qkv", *_PARAMETERS)


class _GPSABackward(SingleBackward):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _gpsa_backward(*args)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        names = ("grad", *_SEPARATE)
        return over_more_heads(_GPSABackward.apply, names, _PACKED, info, in_dims, args)


class _AllPackedGPSABackward(SingleBackward):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _gpsa_backward_qkvpacked(*args)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        names = ("grad", *_SEPARATE)
        return over_more_heads(
            _AllPackedGPSABackward.apply, names, _ALL_PACKED, info, in_dims, args
        )


_backward = differentiable(_GPSABackward)(_gpsa_backward)
_backward_qkvpacked = differentiable(_AllPackedGPSABackward)(_gpsa_backward_qkvpacked)


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
        dqk, *others = _backward(grad, *ctx.saved_tensors, *ctx.config)
        return *unpack_heads(dqk), *others, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return over_more_heads(_GPSA.apply, _SEPARATE, ("out",), info, in_dims, args)


register_gradient("_gpsa_forward", _GPSA.backward, _GPSA.setup_context)

#: (q, k, v, pos_weight, gating_param, rows, columns, scale, backend) -> (B, H, N, d)
gpsa = differentiable(_GPSA)(_gpsa_forward)


def _packed_forward(qk: Tensor, *args: Any) -> Tensor:
    return _gpsa_forward(*unpack_heads(qk), *args)


class _PackedGPSA(torch.autograd.Function):
    """Autograd would stack the gradients of two views of one projection."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _packed_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.config = inputs[4:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        qk, *others = ctx.saved_tensors
        return *_backward(grad, *unpack_heads(qk), *others, *ctx.config), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return over_more_heads(_PackedGPSA.apply, _PACKED, ("out",), info, in_dims, args)


#: As :data:`gpsa`, with q and k as one (B, N, 2, H, d).
gpsa_qkpacked = differentiable(_PackedGPSA)(_packed_forward)


def _all_packed_forward(qkv: Tensor, *args: Any) -> Tensor:
    return _gpsa_forward(*unpack_heads(qkv), *args)


class _AllPackedGPSA(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _all_packed_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.config = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        qkv, *others = ctx.saved_tensors
        gradients = _backward_qkvpacked(grad, *unpack_heads(qkv), *others, *ctx.config)
        return *gradients, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return over_more_heads(_AllPackedGPSA.apply, _ALL_PACKED, ("out",), info, in_dims, args)


#: As :data:`gpsa`, with q, k and v as one (B, N, 3, H, d).
gpsa_qkvpacked = differentiable(_AllPackedGPSA)(_all_packed_forward)

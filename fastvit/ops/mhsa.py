# SPDX-License-Identifier: Apache-2.0
"""Plain attention as an op: in half precision on processors, where PyTorch's own takes twice as
long in the backward, there under ``torch.func``, and by the Triton kernels where they are asked
for. Elsewhere PyTorch's, which keeps its statistics and need not compute them again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import reference
from fastvit.ops import mhsa_torch
from fastvit.ops.backend import Call, choose
from fastvit.ops.flops import Shape, product
from fastvit.ops.library import (
    SingleBackward,
    differentiable,
    in_transform,
    plain_ops_wanted,
    register,
    register_gradient,
)
from fastvit.ops.tokens import like_heads, like_packed, unpack_heads, wide
from fastvit.ops.vmap import over_more_heads
from fastvit.reference.arguments import untraced

#: With fewer tokens PyTorch's CPU kernel takes a NaN in the scores for a masked row and gives
#: zeros (torch 2.11 and 2.15: its vectors are 16 wide).
_FEWEST_TOKENS = 16


@untraced
def call(x: Tensor, dropout_p: float = 0.0) -> Call:
    """What the choice of a backend depends on, for q or a packed projection."""
    return Call("mhsa", x.device, x.dtype, dropout_p, x.shape[-1])


def _flops(products: int, q: Shape) -> int:
    B, H, N, d = q
    return products * B * H * product(N, d, N)


# As PyTorch's formula has it for its own attention, which serves other devices and dtypes: with the
# scores that a backward without maps computes again.
def _forward_flops(q: Shape, *_: Any, **__: Any) -> int:
    return _flops(2, q)


def _backward_flops(_grad: Shape, q: Shape, *_: Any, **__: Any) -> int:
    return _flops(5, q)


@register(
    "_mhsa_forward(Tensor q, Tensor k, Tensor v, float scale, str backend) -> Tensor",
    lambda q, *_: like_heads(q),
    flops=_forward_flops,
)
def _mhsa_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Tensor:
    if choose(call(q), backend) == "triton":
        # Only here, since importing Triton takes time.
        from fastvit.ops import gpsa_triton
        from fastvit.ops.gpsa_trust import trusted_plan

        plan = trusted_plan("forward", q, None, backend)
        if plan is not None:
            return gpsa_triton.attention_forward(q, k, v, scale, plan)
    return mhsa_torch.forward(q, k, v, scale)


@register(
    "_mhsa_backward(Tensor grad, Tensor q, Tensor k, Tensor v, float scale, str backend) -> Tensor",
    lambda _, q, *__: like_packed(q, 3),
    flops=_backward_flops,
)
def _mhsa_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str
) -> Tensor:
    if choose(call(q), backend) == "triton":
        # Only here, since importing Triton takes time.
        from fastvit.ops import gpsa_triton
        from fastvit.ops.gpsa_trust import trusted_plan

        plan = trusted_plan("backward", q, None, backend)
        if plan is not None:
            return gpsa_triton.attention_backward(grad, q, k, v, scale, plan)
    return mhsa_torch.backward(grad, q, k, v, scale)


class _MHSABackward(SingleBackward):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _mhsa_backward(*args)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        names = ("grad", "q", "k", "v")
        return over_more_heads(_MHSABackward.apply, names, ("qkv",), info, in_dims, args)


_backward = differentiable(_MHSABackward)(_mhsa_backward)


class _MHSA(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _mhsa_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.config = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return *unpack_heads(_backward(grad, *ctx.saved_tensors, *ctx.config)), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return over_more_heads(_MHSA.apply, ("q", "k", "v"), ("out",), info, in_dims, args)


register_gradient("_mhsa_forward", _MHSA.backward, _MHSA.setup_context)
_separate = differentiable(_MHSA)(_mhsa_forward)


def _packed_forward(qkv: Tensor, scale: float, backend: str) -> Tensor:
    return _mhsa_forward(*unpack_heads(qkv), scale, backend)


class _PackedMHSA(torch.autograd.Function):
    """Autograd would stack the gradients of three views of one projection."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _packed_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.config = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (qkv,) = ctx.saved_tensors
        return _backward(grad, *unpack_heads(qkv), *ctx.config), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return over_more_heads(_PackedMHSA.apply, ("qkv",), ("out",), info, in_dims, args)


_packed = differentiable(_PackedMHSA)(_packed_forward)


def mhsa(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, backend: str) -> Tensor:
    """(B, H, N, d) three times to (B, H, N, d)."""
    if _is_op(q, dropout_p, backend):
        return _separate(q, k, v, scale, backend)
    if _has_few_tokens(q):
        return reference.attention(q, k, v, scale=scale, dropout_p=dropout_p)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)


def mhsa_qkvpacked(qkv: Tensor, scale: float, dropout_p: float, backend: str) -> Tensor:
    """(B, N, 3, H, d) to (B, H, N, d)."""
    if _is_op(qkv, dropout_p, backend):
        return _packed(qkv, scale, backend)
    q, k, v = unpack_heads(qkv)
    return mhsa(q, k, v, scale, dropout_p, backend)


@untraced
def _has_few_tokens(q: Tensor) -> bool:
    return q.shape[2] < _FEWEST_TOKENS


def _is_op(x: Tensor, dropout_p: float, backend: str) -> bool:
    if dropout_p > 0.0 or plain_ops_wanted():
        return False
    # Until kernels have been measured against PyTorch's on a GPU, they run if asked for.
    if backend == "triton":
        return True
    if x.device.type != "cpu":
        return False
    # PyTorch's own has neither a batching rule there nor words of ours on forward mode.
    transformed = not torch.compiler.is_compiling() and in_transform()
    return transformed or x.dtype != wide(x.dtype)

# SPDX-License-Identifier: Apache-2.0
"""GPSA with attention dropout, as an op that keeps no map.

Which weights are dropped is a function of a seed, which PyTorch's generator gives outside the op:
so the op is functional, its backward finds the same mask, and a checkpoint that restores the
generator, a compiled graph or a captured one draws as PyTorch's own dropout does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit.ops import gpsa_dropout_torch
from fastvit.ops.backend import choose
from fastvit.ops.gpsa import backward_flops, call, forward_flops
from fastvit.ops.library import (
    SingleBackward,
    differentiable,
    loop_over_batch,
    register,
    register_gradient,
)
from fastvit.ops.tokens import gradients_like, like_heads, unpack_heads


def _draw(like: Tensor) -> Tensor:
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=like.device)


_seed = register(
    "_gpsa_dropout_seed(Tensor like) -> Tensor",
    lambda like: like.new_empty(1, dtype=torch.int64),
    random=True,
)(_draw)


def new_seed(like: Tensor) -> Tensor:
    """(1,) in int64 from the generator of the device of ``like``."""
    # A compiler would rather draw a randint again in the backward than keep it; vmap knows what
    # to do with one.
    return _seed(like.detach()) if torch.compiler.is_compiling() else _draw(like)


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor pos_weight, Tensor gating_param, Tensor seed, "
    "SymInt rows, SymInt columns, float scale, float dropout_p, str backend"
)


def _run(direction: str, tensors: tuple[Tensor, ...], *options: Any) -> Any:
    rows, columns, scale, dropout_p, backend = options
    q, grid_size = tensors[-6], (rows, columns)
    if choose(call(q, grid_size, dropout_p), backend) == "triton":
        # Only here, since importing Triton takes time.
        from fastvit.ops import gpsa_dropout_triton
        from fastvit.ops.gpsa_trust import trusted_plan

        plan = trusted_plan(direction, q, grid_size, backend, dropout=True)
        if plan is not None:
            kernels = getattr(gpsa_dropout_triton, direction)
            return kernels(*tensors, grid_size, scale, dropout_p, plan)
    return getattr(gpsa_dropout_torch, direction)(*tensors, grid_size, scale, dropout_p)


@register(
    f"_gpsa_dropout_forward({_ARGUMENTS}) -> Tensor",
    lambda q, *_: like_heads(q),
    flops=forward_flops,
)
def _forward(*args: Any) -> Tensor:
    return _run("forward", args[:6], *args[6:])


def _fake_backward(_grad: Tensor, q: Tensor, _k: Tensor, v: Tensor, *args: Any) -> Any:
    gradients, _ = gradients_like(q, v, packed=False)
    return *gradients, *(x.new_empty(x.shape) for x in args[:2])


@register(
    f"_gpsa_dropout_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    flops=backward_flops,
)
def _backward_op(*args: Any) -> tuple[Tensor, ...]:
    return _run("backward", args[:7], *args[7:])


class _GPSADropoutBackward(SingleBackward):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _backward_op(*args)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return loop_over_batch(_GPSADropoutBackward.apply, info.batch_size, in_dims, args)


_backward = differentiable(_GPSADropoutBackward)(_backward_op)


class _GPSADropout(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.config = inputs[6:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dqk, *others = _backward(grad, *ctx.saved_tensors, *ctx.config)
        return *unpack_heads(dqk), *others, *[None] * 6

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return loop_over_batch(_GPSADropout.apply, info.batch_size, in_dims, args)


register_gradient("_gpsa_dropout_forward", _GPSADropout.backward, _GPSADropout.setup_context)

#: (q, k, v, pos_weight, gating_param, seed, rows, columns, scale, dropout_p, backend)
#: -> (B, H, N, d)
gpsa_dropout = differentiable(_GPSADropout)(_forward)

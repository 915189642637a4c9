# SPDX-License-Identifier: Apache-2.0
"""Patch embedding as one matrix product: the patches of an image are rows of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvit.ops import patch_embed_cpu, patch_embed_torch, patch_embed_trust
from fastvit.ops.backend import choose_once
from fastvit.ops.flops import Shape, convolution
from fastvit.ops.library import (
    SingleBackward,
    differentiable,
    loop_over_batch,
    masked,
    register,
    register_gradient,
)

Floats = Sequence[float] | None


def _implementation(direction: str, images: Tensor, weight: Tensor, asked: str) -> Any:
    """What has the forward and the backward of the backend that is to run."""
    if choose_once("patch_embed", images.device, weight.dtype, asked) != "native":
        return patch_embed_torch
    if images.is_cpu:
        return patch_embed_cpu
    return patch_embed_trust.trusted_kernels(direction, images, weight, asked) or patch_embed_torch


def _fake_forward(
    images: Tensor, weight: Tensor, bias: Any, pos_embed: Any, cls_token: Tensor | None, *_: Any
) -> Tensor:
    B, _C, height, width = images.shape
    D, _C, ph, pw = weight.shape
    return weight.new_empty(B, (height // ph) * (width // pw) + int(cls_token is not None), D)


def _flops(images: Shape, weight: Shape) -> int:
    (B, _C, height, width), (ph, pw) = images, weight[2:]
    return convolution(weight, B, (height // ph) * (width // pw))


def _forward_flops(images: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return _flops(images, weight)


def _backward_flops(_grad: Shape, images: Shape, weight: Shape, *args: Any, **_: Any) -> int:
    wanted = args[-2]
    return sum(wanted[:2]) * _flops(images, weight)


_ARGUMENTS = (
    "Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? cls_token, "
    "float[]? mean, float[]? std"
)


@register(
    f"_patch_embed_forward({_ARGUMENTS}, str backend) -> Tensor",
    _fake_forward,
    direct=True,
    flops=_forward_flops,
)
def _patch_embed_forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    cls_token: Tensor | None,
    mean: Floats,
    std: Floats,
    asked: str,
) -> Tensor:
    implementation = _implementation("forward", images, weight, asked)
    return implementation.forward(images, weight, bias, pos_embed, cls_token, mean, std)


def _fake_backward(grad: Tensor, *args: Any) -> list[Tensor]:
    *inputs, _mean, _std, wanted, _backend = args
    return [x.new_empty(x.shape) for x, w in zip(inputs, wanted, strict=True) if w]


@register(
    f"_patch_embed_backward(Tensor grad, {_ARGUMENTS}, bool[] wanted, str backend) -> Tensor[]",
    _fake_backward,
    direct=True,
    flops=_backward_flops,
)
def _patch_embed_backward(grad: Tensor, images: Tensor, weight: Tensor, *rest: Any) -> Any:
    *arguments, asked = rest
    implementation = _implementation("backward", images, weight, asked)
    return implementation.backward(grad, images, weight, *arguments)


class _PatchEmbedBackward(SingleBackward):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return tuple(_patch_embed_backward(*args))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return loop_over_batch(_PatchEmbedBackward.apply, info.batch_size, in_dims, args)


_backward = differentiable(_PatchEmbedBackward)(_patch_embed_backward)


class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _patch_embed_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.mean, ctx.std, ctx.backend = inputs[5:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        wanted = list(ctx.needs_input_grad[:5])
        grads = _backward(grad, *ctx.saved_tensors, ctx.mean, ctx.std, wanted, ctx.backend)
        return *masked(wanted, grads), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        # Images alone: one larger batch. Anything else has a weight per sample.
        if in_dims[0] is not None and all(dim is None for dim in in_dims[1:]):
            images = args[0].movedim(in_dims[0], 0)
            out = _PatchEmbed.apply(images.flatten(0, 1), *args[1:])
            return out.unflatten(0, images.shape[:2]), 0
        return loop_over_batch(_PatchEmbed.apply, info.batch_size, in_dims, args)


register_gradient("_patch_embed_forward", _PatchEmbed.backward, _PatchEmbed.setup_context)

#: (images, weight, bias, pos_embed, cls_token, mean, std, backend) -> (B, N[+1], D)
patch_embed = differentiable(_PatchEmbed)(_patch_embed_forward)

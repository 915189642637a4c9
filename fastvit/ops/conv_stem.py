# SPDX-License-Identifier: Apache-2.0
"""The convolutional stem as ops: a forward that may keep what the backward needs, the backward,
and the update of the running statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit.ops import conv_stem_torch
from fastvit.ops.backend import AUTO, Call, choose
from fastvit.ops.conv_stem_torch import (
    Floats,
    Forward,
    Stages,
    Tensors,
    channels_last,
    stage_shapes,
)
from fastvit.ops.flops import Shape, convolution
from fastvit.ops.library import (
    SingleBackward,
    differentiable,
    loop_over_batch,
    masked,
    register,
    register_gradient,
)
from fastvit.ops.tokens import wide
from fastvit.reference import stage_grids

_STEM = "Tensor x, Tensor proj_weight, Tensor? proj_bias, Tensor? pos_embed, Tensor? cls_token"
_STAGES = (
    "Tensor[] weights, Tensor[] bn_weights, Tensor[] bn_biases, Tensor[] means, "
    "Tensor[] variances, SymInt[] strides"
)
# ``group`` names the processes over which the batch of a training step is spread, "" this one. Its
# backward takes ``counts``, the values of each stage's batch norm there, else an empty list.
_OPTIONS = "bool training, float eps, float[]? mean, float[]? std"


def call(x: Tensor, proj_weight: Tensor) -> Call:
    """What the choice of a backend depends on, beside sizes."""
    return Call("conv_stem", x.device, proj_weight.dtype)


def _takes_kernels(x: Tensor, proj_weight: Tensor, stages: Stages, mode: str, asked: str) -> bool:
    """Whether the Triton kernels are to run a call: "infer", "train" or "backward".

    Raises:
        RuntimeError: they were ``asked`` for by name and do not take its sizes.
    """
    if choose(call(x, proj_weight), asked) != "triton":
        return False
    # Only here, since importing Triton takes time.
    from fastvit.ops import conv_stem_triton

    reason = conv_stem_triton.too_large(x, stages)
    if reason is not None and asked != AUTO:
        raise RuntimeError(f"backend: {asked!r} was asked for, but {reason}")
    if reason is not None:
        return False
    return asked != AUTO or not conv_stem_triton.torch_is_faster(x, proj_weight, stages, mode)


def _fake_forward(
    x: Tensor, proj_weight: Tensor, _bias: Any, _pos: Any, cls_token: Tensor | None, *args: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    stages, (training, _eps, _mean, _std, save, group, _backend) = Stages(*args[:6]), args[6:]
    shapes = stage_shapes(x, stages.weights, stages.strides)
    N = shapes[-1][2] * shapes[-1][3] + int(cls_token is not None)
    tokens = proj_weight.new_empty(x.shape[0], N, proj_weight.shape[0])
    raw = [channels_last(proj_weight.new_empty(shape)) for shape in shapes] if save else []
    channels = [shape[1] for shape in shapes] if training or save else []
    means = [proj_weight.new_empty(c, dtype=wide(proj_weight.dtype)) for c in channels]
    counts = [mean.new_empty(()) for mean in means] if group else []
    return tokens, raw, means, [torch.empty_like(mean) for mean in means], counts


def _flops(x: Shape, proj_weight: Shape, stages: Any) -> list[int]:
    """Of the convolutions, the last 1x1 at the end. The stages hold shapes."""
    positions = [height * width for height, width in stage_grids(x[2:], stages.strides)]
    layers = zip((*stages.weights, proj_weight), (*positions, positions[-1]), strict=True)
    return [convolution(weight, x[0], count) for weight, count in layers]


def _forward_flops(x: Shape, proj_weight: Shape, *args: Any, **_: Any) -> int:
    return sum(_flops(x, proj_weight, Stages(*args[3:9])))


def _backward_flops(_grad: Shape, x: Shape, proj_weight: Shape, *args: Any, **_: Any) -> int:
    stages, wanted = Stages(*args[4:10]), args[-4]
    flops = _flops(x, proj_weight, stages)
    depth = len(stages.strides)
    learned = [any(wanted[5 + i :: depth]) for i in range(depth)]
    # A convolution gives a gradient to its input where something that learns is below.
    below = [wanted[0] or any(learned[:i]) for i in range(depth + 1)]
    weights = [*wanted[5 : 5 + depth], wanted[1]]
    return sum(n * (a + b) for n, a, b in zip(flops, below, weights, strict=True))


@register(
    f"_conv_stem_forward({_STEM}, {_STAGES}, {_OPTIONS}, bool save, str group, str backend) "
    "-> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[])",
    _fake_forward,
    flops=_forward_flops,
)
def _conv_stem_forward(x: Tensor, proj_weight: Tensor, *args: Any) -> Forward:
    *arguments, backend = args
    stages = Stages(*arguments[3:9])
    inputs = (x, proj_weight, *arguments[:3], stages, *arguments[9:])
    training, *_, save, _group = arguments[9:]
    mode = "train" if training or save else "infer"
    if _takes_kernels(x, proj_weight, stages, mode, backend):
        # Only here, since importing Triton takes time.
        from fastvit.ops import conv_stem_triton
        from fastvit.ops.conv_stem_trust import trusted_plan

        plan = trusted_plan(x, proj_weight, stages, training, save, backend)
        if plan is not None:
            return conv_stem_triton.forward(plan, *inputs)
    return conv_stem_torch.forward(*inputs)


def _fake_backward(grad: Tensor, *args: Any) -> list[Tensor]:
    inputs, (weights, gammas, betas) = args[:5], args[6:9]
    wanted = args[-4]
    flat = (*inputs, *weights, *gammas, *betas)
    return [t.new_empty(t.shape) for t, w in zip(flat, wanted, strict=True) if w]


@register(
    f"_conv_stem_backward(Tensor grad, {_STEM}, Tensor[] raw, {_STAGES}, {_OPTIONS}, "
    "bool[] wanted, str group, Tensor[] counts, str backend) -> Tensor[]",
    _fake_backward,
    flops=_backward_flops,
)
def _conv_stem_backward(grad: Tensor, x: Tensor, proj_weight: Tensor, *args: Any) -> Any:
    *arguments, backend = args
    stages = Stages(*arguments[4:10])
    inputs = (grad, x, proj_weight, *arguments[:4], stages, *arguments[10:])
    if _takes_kernels(x, proj_weight, stages, "backward", backend):
        # Only here, since importing Triton takes time.
        from fastvit.ops import conv_stem_triton_backward
        from fastvit.ops.conv_stem_trust import trusted_backward

        kernels = trusted_backward(x, proj_weight, stages, arguments[10], backend)
        if kernels is not None:
            backward: Callable[..., list[Tensor]] = conv_stem_triton_backward.backward
            return backward(*inputs, kernels=kernels)
    return conv_stem_torch.backward(*inputs)


class Config(NamedTuple):
    """What is no tensor. Autograd sees tensors only as arguments of their own, so the lists of
    :class:`Stages` travel flat behind this, in its order.
    """

    strides: tuple[int, ...]
    training: bool
    eps: float
    mean: Floats
    std: Floats
    group: str
    backend: str

    def split(self, tensors: Sequence[Any]) -> list[list[Any]]:
        """Lists of one tensor a stage."""
        n = len(self.strides)
        return [list(tensors[i : i + n]) for i in range(0, len(tensors), n)]

    @property
    def options(self) -> tuple[Any, ...]:
        return self.training, self.eps, self.mean, self.std


def _forward_op(config: Config, *args: Any, save: bool = False) -> tuple[Tensor, ...]:
    """(x, proj_weight, proj_bias, pos_embed, cls_token, *stage tensors) to the tokens, then the
    raw tensors if they are to be saved, then the means and variances that the batch norms used,
    in training or if they are to be saved, and of how many values if a group has them. The stage
    tensors are weights, bn_weights, bn_biases and, in eval only, running means and variances.
    """
    lists = config.split(args[5:])
    if config.training:
        lists = [*lists, [], []]
    tokens, *kept = _conv_stem_forward(
        *args[:5], *lists, config.strides, *config.options, save, config.group, config.backend
    )
    return tokens, *(t for tensors in kept for t in tensors)


def _backward_op(
    config: Config, wanted: Sequence[bool], grad: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """The same inputs without running statistics, then raw tensors, statistics and, in a group,
    counts, to the gradients that are wanted.
    """
    weights, gammas, betas, raw, means, variances, *counts = config.split(args[5:])
    stages = weights, gammas, betas, means, variances, config.strides
    rest = wanted, config.group, counts[0] if counts else [], config.backend
    return tuple(_conv_stem_backward(grad, *args[:5], raw, *stages, *config.options, *rest))


class _ConvStemBackward(SingleBackward):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _backward_op(*args)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return loop_over_batch(_ConvStemBackward.apply, info.batch_size, in_dims, args)


_backward = differentiable(_ConvStemBackward)(_backward_op)


class _ConvStem(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _forward_op(*args, save=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.config, *args = inputs
        learned = 5 + 3 * len(ctx.config.strides)
        ctx.mark_non_differentiable(*output[1:])
        # Else autograd makes zeros as large as all that is kept.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:learned], *output[1:])
        ctx.constants = len(args) - learned

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        wanted = list(ctx.needs_input_grad[1 : 6 + 3 * len(ctx.config.strides)])
        grads = _backward(ctx.config, wanted, grad, *ctx.saved_tensors)
        return None, *masked(wanted, grads), *[None] * ctx.constants

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return loop_over_batch(_ConvStem.apply, info.batch_size, in_dims, args)


def _save_of_bare_op(ctx: Any, inputs: Any, output: Any) -> None:
    arguments, lists, options = inputs[:5], inputs[5:10], inputs[10:]
    strides, training, eps, mean, std, save, group, backend = options
    if not save:
        raise RuntimeError("fastvit: the stem was called without saving for a backward")
    ctx.config = Config(tuple(strides), training, eps, mean, std, group, backend)
    _tokens, *kept = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*arguments, *(t for tensors in (*lists[:3], *kept) for t in tensors))
    ctx.running = tuple(len(tensors) for tensors in lists[3:])


def _backward_of_bare_op(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    wanted = [*needs[:5], *(need for needs_of_list in needs[5:8] for need in needs_of_list)]
    found = masked(wanted, _backward(ctx.config, wanted, grad, *ctx.saved_tensors))
    running = ([None] * count for count in ctx.running)
    return *found[:5], *ctx.config.split(found[5:]), *running, *[None] * 8


register_gradient("_conv_stem_forward", _backward_of_bare_op, _save_of_bare_op)

#: (config, x, proj_weight, proj_bias, pos_embed, cls_token, *stage tensors) -> the tokens, then
#: what else the op returns: in training the last 2 n of it the batch means and biased variances,
#: in a group of processes followed by n counts.
conv_stem = differentiable(_ConvStem)(_forward_op)


@register(
    "_update_running_statistics(Tensor(a!)[] running, Tensor[] batch, SymInt[] counts, "
    "Tensor[] totals, float momentum, Tensor? shares) -> ()",
    lambda *_: None,
)
def update_running_statistics(
    running: Tensors,
    batch: Tensors,
    counts: Sequence[int],
    totals: Tensors,
    momentum: float,
    shares: Tensor | None,
) -> None:
    """Move running means and variances (n tensors each) towards those of the batch, in place.

    The running variance takes the unbiased one, so ``counts`` are the values per channel. An op
    of its own since ``torch.func.grad`` forbids in-place operators on what it did not pass in.

    Where only the device knows them, ``totals``, () each, replace ``counts`` unless they are empty,
    and ``shares`` (n,) replace ``momentum`` unless they are None.
    """
    n = len(counts)
    for i, (old, new) in enumerate(zip(running, batch, strict=True)):
        count = totals[i % n] if totals else counts[i % n]
        if i >= n:
            new = new * (count / (count - 1))
        if not totals and shares is None:
            old.lerp_(new.to(old.dtype), momentum)
            continue
        dtype = torch.promote_types(old.dtype, new.dtype)
        share = momentum if shares is None else shares[i % n].to(dtype)
        moved = torch.lerp(old.to(dtype), new.to(dtype), share)
        # An empty batch leaves them alone.
        old.copy_(torch.where(totals[i % n] > 0, moved, old) if totals else moved)

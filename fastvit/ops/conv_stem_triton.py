# SPDX-License-Identifier: Apache-2.0
"""The convolutional stem by the Triton kernels: which of them run, and on which memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit.kernels import stem_configs
from fastvit.kernels.configs import Config
from fastvit.kernels.stem_blocks import within_reach
from fastvit.kernels.stem_conv import stem_conv
from fastvit.kernels.stem_first import stem_first
from fastvit.kernels.stem_pair import stem_pair
from fastvit.kernels.stem_statistics import stem_affine, stem_statistics
from fastvit.kernels.stem_tokens import stem_tokens
from fastvit.ops import conv_stem_torch, stem_choices, tuned
from fastvit.ops.batch_statistics import synchronized
from fastvit.ops.conv_stem_torch import (
    Floats,
    Forward,
    Stages,
    _convolution,
    _normalize,
    _normalize_batch,
    channels_last,
    stage_shapes,
)
from fastvit.ops.gpsa_triton import architecture, precision
from fastvit.reference import normalize_images, stage_grids


class Plan(NamedTuple):
    """The kernels of a call, or cuDNN, in their order, and how float32 is multiplied."""

    arch: str
    #: "tf32" or "ieee".
    precision: str
    kernels: tuple[tuple[str, Config], ...]


def plan(
    x: Tensor, proj_weight: Tensor, stages: Stages, keeps: bool, built_in: bool = False
) -> Plan:
    """What runs for images x; ``keeps`` if the raw tensors of all stages are needed. ``built_in``:
    whatever was tuned.
    """
    posed = problem(x, proj_weight, stages, keeps)
    strides, raw = tuple(stages.strides), x.dtype == torch.uint8
    if built_in:
        kernels = stem_configs.forward(posed)
    else:
        kernels = tuned.stem_forward(posed, x.shape[0], tuple(x.shape[-2:]), strides, raw)
    kernels = stem_choices.with_cudnn(kernels, posed, strides)
    return Plan(posed.arch, precision(), kernels)


def problem(x: Tensor, proj_weight: Tensor, stages: Stages, keeps: bool) -> stem_configs.Problem:
    """What the choice of kernels for images x depends on."""
    grids = stage_grids(x.shape[-2:], stages.strides)
    return stem_configs.Problem(
        architecture(x.device),
        _arithmetic(proj_weight),
        tuple(x.shape[0] * math.prod(grid) for grid in grids),
        _widths(x, proj_weight, stages),
        keeps,
    )


def _arithmetic(proj_weight: Tensor) -> str:
    return precision() if proj_weight.dtype == torch.float32 else "half"


def _widths(x: Tensor, proj_weight: Tensor, stages: Stages) -> tuple[int, ...]:
    """Channels of the images and of the stages, and D."""
    return (x.shape[1], *(w.shape[0] for w in stages.weights), proj_weight.shape[0])


def too_large(x: Tensor, stages: Stages) -> str | None:
    """Why the kernels do not take images x: between the pixels of a tile, and between two rows of
    a map, offsets have 32 bits.
    """
    _, C, H, W = x.shape
    if 2 * C * H * W + 2**20 * C >= 2**31:
        return f"the Triton kernels take images of less than 2^30 numbers, and these are {C, H, W}"
    widest = max(C, *(w.shape[0] for w in stages.weights))
    if 3 * W * widest >= 2**31:
        return (
            "the Triton kernels take rows of less than 2^29 numbers, and there are some of "
            f"{W} pixels and {widest} channels"
        )
    return None


def torch_is_faster(x: Tensor, proj_weight: Tensor, stages: Stages, mode: str) -> bool:
    """Whether PyTorch's operators were measured to do the whole call faster."""
    faster = stem_choices.choices(architecture(x.device)).torch
    if not faster:
        return False
    B, _, H, W = x.shape
    widths = _widths(x, proj_weight, stages)
    arithmetic = _arithmetic(proj_weight)
    key = stem_choices.call_key(arithmetic, mode, widths, stages.strides, B * H * W)
    return key in faster


def forward(
    plan: Plan,
    x: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    pos_embed: Tensor | None,
    cls_token: Tensor | None,
    stages: Stages,
    training: bool,
    eps: float,
    mean: Floats,
    std: Floats,
    save: bool,
    group: str = "",
) -> Forward:
    """The op's forward by the kernels of ``plan``."""
    if x.shape[0] == 0:
        # Nothing to launch; what there is to say of no values, PyTorch says.
        return conv_stem_torch.forward(
            x, proj_weight, proj_bias, pos_embed, cls_token, stages, training, eps, mean, std, save,
            group,
        )  # fmt: skip
    *layers, (_, config) = plan.kernels
    if layers[0][0] == "stem_conv":
        x = channels_last(normalize_images(x, mean, std, proj_weight.dtype))
    elif not within_reach(x, max(config.rows for _, config in layers)):
        x = x.contiguous()
    pixels = _pixels(x, mean, std)
    parameters = (proj_bias, pos_embed, cls_token)
    bias, position, first = (None if p is None else p.contiguous() for p in parameters)
    with torch.cuda.device_of(x):
        if training or save:
            y, affine, kept = _keep(x, stages, training, eps, pixels, save, plan, group)
        else:
            y, affine, kept = _infer(x, stages, eps, pixels, plan), None, ([], [], [], [])
        B, _, H, W = y.shape
        tokens = y.new_empty(B, H * W + int(first is not None), proj_weight.shape[0])
        stem_tokens(
            y, proj_weight.contiguous(), bias, affine, position, first, tokens, plan.precision,
            config,
        )  # fmt: skip
    return Forward(tokens, *kept)


def _pixels(x: Tensor, mean: Floats, std: Floats) -> tuple[Sequence[float], Sequence[float]] | None:
    """The mean and std of uint8 images."""
    if x.dtype != torch.uint8:
        return None
    channels = x.shape[1]
    return mean or (0.0,) * channels, std or (1.0,) * channels


def _cudnn(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The sums of a later convolution by PyTorch, channels innermost; the scale of the batch norm
    is not rounded into the weights.
    """
    return channels_last(_convolution(x, channels_last(weight), None, stride))


def _map(weight: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """An empty map with channels innermost."""
    _, C, H, W = shape
    return weight.new_empty_strided(shape, (H * W * C, 1, W * C, C))


def _infer(x: Tensor, stages: Stages, eps: float, pixels: Any, plan: Plan) -> Tensor:
    """What the last stage gives, normalised by the running statistics."""
    norms = [
        tuple(t.contiguous() for t in norm)
        for norm in zip(
            stages.bn_weights, stages.bn_biases, stages.means, stages.variances, strict=True
        )
    ]
    shapes, done = stage_shapes(x, stages.weights, stages.strides), 0
    for name, config in plan.kernels[:-1]:
        last = done + 1 if name == "stem_pair" else done
        weight, stride = stages.weights[last], stages.strides[last]
        if name == stem_choices.CUDNN:
            gamma, beta, mean, variance = norms[last]
            raw = _cudnn(x, weight, stride)
            x, done = _normalize(raw, gamma, beta, mean, variance, eps), last + 1
            continue
        out = _map(weight, shapes[last])
        if name == "stem_pair":
            weights = (stages.weights[0].contiguous(), channels_last(weight))
            stem_pair(
                x, weights, norms[:2], eps, out, pixels, stages.strides[:2], plan.precision, config
            )
        elif name == "stem_first":
            stem_first(
                x, weight.contiguous(), norms[0], eps, out, None, pixels, stride, plan.precision,
                config,
            )  # fmt: skip
        else:
            stem_conv(
                x, channels_last(weight), None, norms[last], eps, out, None, stride,
                plan.precision, config,
            )  # fmt: skip
        x, done = out, last + 1
    return x


def _keep(
    x: Tensor,
    stages: Stages,
    training: bool,
    eps: float,
    pixels: Any,
    save: bool,
    plan: Plan,
    group: str,
) -> tuple[Tensor, Tensor | None, tuple[list[Tensor], ...]]:
    """The sums of the last stage and its batch norm as scale and shift, or what they give and None;
    and what is kept: the sums of every stage if they are to be saved, means and variances, and the
    values of each in a group.
    """
    raw: list[Tensor] = []
    means: list[Tensor] = []
    variances: list[Tensor] = []
    counts: list[Tensor] = []
    affine: Tensor | None = None
    shapes = stage_shapes(x, stages.weights, stages.strides)
    for i, (shape, (name, config)) in enumerate(zip(shapes, plan.kernels, strict=False)):
        weight, stride = stages.weights[i], stages.strides[i]
        gamma, beta = stages.bn_weights[i].contiguous(), stages.bn_biases[i].contiguous()
        values, partials = shape[0] * shape[2] * shape[3], None
        by_cudnn = name == stem_choices.CUDNN
        if by_cudnn and affine is not None:
            above = stages.bn_weights[i - 1], stages.bn_biases[i - 1]
            x = _normalize(x, *above, means[-1], variances[-1], eps)
        out = _cudnn(x, weight, stride) if by_cudnn else _map(weight, shape)
        if training and not by_cudnn:
            tiles = -(-values // config.rows)
            partials = x.new_empty(2, tiles, shape[1], dtype=torch.float32)
        if name == "stem_first":
            stem_first(
                x, weight.contiguous(), None, eps, out, partials, pixels, stride, plan.precision,
                config,
            )  # fmt: skip
        elif name == "stem_conv":
            stem_conv(
                x, channels_last(weight), affine, None, eps, out, partials, stride,
                plan.precision, config,
            )  # fmt: skip
        x = out
        if training and by_cudnn:
            x, mean, variance, count = _normalize_batch(out, gamma, beta, eps, group)
            affine = None
            if count is not None:
                counts.append(count)
        elif partials is not None:
            mean, variance = partials.new_empty(shape[1]), partials.new_empty(shape[1])
            affine = stem_statistics(
                partials, config.rows, values, gamma, beta, eps, mean, variance
            )
            if group:
                count, mean, variance = synchronized(values, mean, variance, group)
                # By the kernel that the check of training covers: a part of one value.
                part = torch.stack((mean, variance))[:, None]
                affine = stem_statistics(part, 1, 1, gamma, beta, eps, mean, variance)
                counts.append(count)
        else:
            # As they are now: a later training step changes the buffers in place.
            mean = stages.means[i].to(torch.float32, copy=True).contiguous()
            variance = stages.variances[i].to(torch.float32, copy=True).contiguous()
            affine = stem_affine(gamma, beta, mean, variance, eps)
        means.append(mean)
        variances.append(variance)
        if save:
            raw.append(out)
    return x, affine, (raw, means, variances, counts)

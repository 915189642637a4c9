# SPDX-License-Identifier: Apache-2.0
"""The backward of the convolutional stem by the Triton kernels.

Two tensors a stage are read and one is written: the raw output of its convolution, which the
forward kept, and the gradient before its ReLU. What lies between them is computed where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvit.kernels import stem_gradient_configs as configs
from fastvit.kernels.configs import Config
from fastvit.kernels.stem_blocks import within_reach
from fastvit.kernels.stem_configs import gathers
from fastvit.kernels.stem_image_gradient import stem_image_gradient
from fastvit.kernels.stem_input_gradient import stem_input_gradient
from fastvit.kernels.stem_raw_gradient import stem_raw_gradient
from fastvit.kernels.stem_sums import stem_norm_gradient, stem_weight_sum
from fastvit.kernels.stem_weight_gradient import stem_weight_gradient
from fastvit.kernels.tuned import Kernels
from fastvit.ops import conv_stem_torch, tuned
from fastvit.ops.batch_statistics import exchanged
from fastvit.ops.conv_stem_torch import Floats, Stages, Tensors, channels_last
from fastvit.ops.gpsa_triton import architecture, precision
from fastvit.ops.library import picked
from fastvit.ops.tokens import gradient_of, wide
from fastvit.ops.uint8_fold import fold_numbers
from fastvit.reference import normalize_images


class _Setting(NamedTuple):
    """What every step needs to know."""

    arch: str
    #: "half", "tf32" or "ieee".
    arithmetic: str
    precision: str
    training: bool
    eps: float
    #: Configurations in the place of those that are built in, by kernel and convolution.
    tuned: Mapping[str, Config]

    def input_gradient(self, weight: Tensor, level: int) -> Config:
        """The launch that leads back through the weights of a convolution."""
        out, channels = weight.shape[:2]
        return self.tuned.get(f"stem_input_gradient[{level}]") or configs.input_gradient(
            self.arch, self.arithmetic, out, channels, self.training
        )

    def weight_gradient(self, weight: Tensor, level: int) -> Config:
        """Of the gradient of a convolution's weights."""
        out, channels = weight.shape[:2]
        return self.tuned.get(f"stem_weight_gradient[{level}]") or configs.weight_gradient(
            self.arch, self.arithmetic, out, channels, weight[0, 0].numel()
        )

    def image_gradient(self, out: int) -> Config:
        """Of the gradient of the first convolution's weights."""
        built_in = configs.image_gradient(self.arch, self.arithmetic, out)
        return self.tuned.get("stem_image_gradient[0]", built_in)


class _Norm(NamedTuple):
    """A batch norm with the statistics that it used, each (C,)."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor


def plan(x: Tensor, proj_weight: Tensor, stages: Stages, training: bool) -> Kernels:
    """The kernels for images x that take other configurations than those that are built in."""
    arithmetic = precision() if proj_weight.dtype == torch.float32 else "half"
    widths = (x.shape[1], *(w.shape[0] for w in stages.weights), proj_weight.shape[0])
    return tuned.stem_backward(
        architecture(x.device), arithmetic, x.shape[0], tuple(x.shape[-2:]), widths,
        tuple(stages.strides), training, x.dtype == torch.uint8,
    )  # fmt: skip


def backward(
    grad: Tensor,
    x: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    pos_embed: Tensor | None,
    cls_token: Tensor | None,
    raw: Tensors,
    stages: Stages,
    training: bool,
    eps: float,
    mean: Floats,
    std: Floats,
    wanted: Sequence[bool],
    group: str = "",
    counts: Tensors = (),
    kernels: Kernels = (),
) -> list[Tensor]:
    """What :func:`fastvit.ops.conv_stem_torch.backward` gives, with ``kernels`` of :func:`plan`."""
    depth, raw = len(raw), [channels_last(y) for y in raw]
    if group and grad.numel() == 0:
        # Nothing to launch, but other processes wait for this one.
        return conv_stem_torch.backward(
            grad, x, proj_weight, proj_bias, pos_embed, cls_token, raw, stages, training, eps,
            mean, std, wanted, group, counts,
        )  # fmt: skip
    if grad.numel() == 0:
        learned = (*stages.weights, *stages.bn_weights, *stages.bn_biases)
        tensors = (x, proj_weight, proj_bias, pos_embed, cls_token, *learned)
        zeros = [None if t is None else t.new_zeros(t.shape) for t in tensors]
        return picked(wanted, zeros)
    arithmetic = precision() if proj_weight.dtype == torch.float32 else "half"
    arch = architecture(x.device)
    setting = _Setting(arch, arithmetic, precision(), training, eps, dict(kernels))
    norms = [
        _Norm(*(t.contiguous() for t in norm))
        for norm in zip(
            stages.bn_weights, stages.bn_biases, stages.means, stages.variances, strict=True
        )
    ]
    dproj_bias, dpos, dcls = _token_sums(grad, proj_bias, pos_embed, cls_token, wanted[2:5])
    dtokens = grad if cls_token is None else grad[:, 1:]
    if dtokens.stride(-1) != 1:
        dtokens = dtokens.contiguous()
    learns = [any(wanted[5 + i :: depth]) for i in range(depth)]
    # Frozen stages below the first that is learned cost nothing.
    first = 0 if wanted[0] else (learns.index(True) if any(learns) else depth)
    dimage = dproj = None
    dweights: list[Tensor | None] = [None] * depth
    dgammas, dbetas = dweights.copy(), dweights.copy()
    with torch.cuda.device_of(x):
        if wanted[1]:
            dproj = _weight_gradient(setting, depth, dtokens, 1, raw[-1], norms[-1], proj_weight)
        if first < depth:
            flat = proj_weight.flatten(1).contiguous()
            dz, partials = _input_gradient(setting, depth, dtokens, flat, 1, raw[-1], norms[-1])
        for i in reversed(range(first, depth)):
            weight, stride, norm = stages.weights[i], stages.strides[i], norms[i]
            dgammas[i], dbetas[i] = torch.empty_like(norm.weight), torch.empty_like(norm.bias)
            count = raw[i].numel() // raw[i].shape[1]
            k = stem_norm_gradient(partials, norm, eps, count, dgammas[i], dbetas[i])
            if group:
                k = _synchronized(partials, norm, eps, group, counts[i])
            above = (raw[i], k) if training else None
            if training and (i or wanted[0] or not gathers(x.shape[1])):
                # Else the one kernel that reads it makes it by itself.
                config = configs.raw_gradient(raw[i].shape[1])
                stem_raw_gradient(dz, raw[i], k, config)
                above = None
            if wanted[5 + i]:
                if i:
                    below = raw[i - 1], norms[i - 1]
                    dweights[i] = _weight_gradient(setting, i, dz, stride, *below, weight)
                else:
                    dweights[i] = _first_gradient(setting, dz, above, stride, x, mean, std, weight)
            if i > first:
                below = raw[i - 1], norms[i - 1]
                up = channels_last(weight)
                dz, partials = _input_gradient(setting, i, dz, up, stride, *below)
            elif wanted[0]:
                dimage = x.new_empty(x.shape)
                config = setting.input_gradient(weight, 0)
                stem_input_gradient(
                    dz, channels_last(weight), stride, None, None, eps, dimage, False,
                    setting.precision, config,
                )  # fmt: skip
    results = (dimage, dproj, dproj_bias, dpos, dcls, *dweights, *dgammas, *dbetas)
    return picked(wanted, results)


def _synchronized(partials: Tensor, norm: _Norm, eps: float, group: str, count: Tensor) -> Tensor:
    """The coefficients (4, C) of the gradient of what a batch norm over ``count`` values in a group
    of processes read, whose sums here ``partials`` (2, parts, C) have.
    """
    own = partials.sum(1)
    total = exchanged(own.flatten(), group).sum(0).view_as(own)
    # The kernel takes the count as a number, which only the device knows.
    unused = (torch.empty_like(norm.mean) for _ in range(2))
    return stem_norm_gradient((total / count)[:, None], norm, eps, 1, *unused)


def _token_sums(
    grad: Tensor,
    proj_bias: Tensor | None,
    pos_embed: Tensor | None,
    cls_token: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the bias, the positions and the class token: all from one sum over images."""
    found: list[Tensor | None] = [None, None, None]
    if not any(wanted):
        return None, None, None
    total = grad.sum(0, keepdim=True, dtype=wide(grad.dtype))
    if proj_bias is not None and wanted[0]:
        found[0] = total[:, 0 if cls_token is None else 1 :].sum((0, 1)).to(proj_bias.dtype)
    if pos_embed is not None and wanted[1]:
        found[1] = gradient_of(pos_embed, total[:, total.shape[1] - pos_embed.shape[1] :])
    if cls_token is not None and wanted[2]:
        found[2] = gradient_of(cls_token, total[:, :1])
    return found[0], found[1], found[2]


def _input_gradient(
    setting: _Setting,
    level: int,
    grad: Tensor,
    weight: Tensor,
    stride: int,
    below: Tensor,
    norm: _Norm,
) -> tuple[Tensor, Tensor]:
    """The gradient before the ReLU that follows ``below``, with fixed statistics that of ``below``,
    and the sums in parts that the batch norm needs.
    """
    config = setting.input_gradient(weight, level)
    dx = below.new_empty_strided(below.shape, below.stride())
    partials = stem_input_gradient(
        grad, weight, stride, below, norm, setting.eps, dx, not setting.training,
        setting.precision, config,
    )  # fmt: skip
    return dx, partials


def _weight_gradient(
    setting: _Setting,
    level: int,
    grad: Tensor,
    stride: int,
    below: Tensor,
    norm: _Norm | None,
    weight: Tensor,
) -> Tensor:
    """Of a 3x3 or, where ``grad`` are tokens, the last 1x1; without a norm, ``below`` is what the
    convolution read.
    """
    taps = weight[0, 0].numel()
    config = setting.weight_gradient(weight, level)
    partials = stem_weight_gradient(
        grad, stride, taps, below, norm, setting.eps, torch.float32, setting.precision, config
    )
    dweight = weight.new_empty(weight.shape)
    stem_weight_sum(partials, dweight, None, None)
    return dweight


def _first_gradient(
    setting: _Setting,
    dz: Tensor,
    above: tuple[Tensor, Tensor] | None,
    stride: int,
    x: Tensor,
    mean: Floats,
    std: Floats,
    weight: Tensor,
) -> Tensor:
    """Of the weights of the first convolution. ``above`` are its output and the coefficients of its
    gradient if ``dz`` is the gradient before the ReLU, else None.
    """
    if not gathers(x.shape[1]):
        image = channels_last(normalize_images(x, mean, std, dz.dtype))
        return _weight_gradient(setting, 0, dz, stride, image, None, weight)
    raw, coefficients = above if above is not None else (None, None)
    centers = shifts = scales = None
    if x.dtype == torch.uint8:
        centers, shifts, scales = fold_numbers(mean, std, x.shape[1])
    config = setting.image_gradient(weight.shape[0])
    if not within_reach(x, config.rows):
        x = x.contiguous()
    partials = stem_image_gradient(
        dz, raw, coefficients, x, centers, stride, torch.float32, setting.precision, config
    )
    dweight = weight.new_empty(weight.shape)
    stem_weight_sum(partials, dweight, shifts, scales)
    return dweight

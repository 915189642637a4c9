# SPDX-License-Identifier: Apache-2.0
"""The convolutional stem in PyTorch's operators: channels_last, the last 1x1 a matrix product.

With gradients, one tensor a stage is kept: the raw output of its convolution. What the next
convolution read, relu(batch_norm(raw)), is computed again in the backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.ops.batch_statistics import exchanged, pooled, synchronized
from fastvit.ops.library import picked
from fastvit.ops.linear import linear
from fastvit.ops.tokens import assemble, token_gradients, wide
from fastvit.reference import normalize_images, stage_grids

Floats = Sequence[float] | None
Tensors = Sequence[Tensor]


#: Elements of a tensor that a core works on at a time, about what its cache holds.
_CHUNK_PER_CORE = 120_000


class Stages(NamedTuple):
    """The 3x3 stages, one entry of every list a stage.

    ``means`` and ``variances`` are what the batch norms normalise with: running statistics in
    eval, empty in a training forward, which returns them.
    """

    weights: Tensors
    bn_weights: Tensors
    bn_biases: Tensors
    means: Tensors
    variances: Tensors
    strides: Sequence[int]


def stage_shapes(
    x: Tensor, weights: Tensors, strides: Sequence[int]
) -> list[tuple[int, int, int, int]]:
    """Shapes (B, C, H, W) of what the convolutions give."""
    grids = stage_grids(x.shape[-2:], strides)
    return [(x.shape[0], w.shape[0], *grid) for w, grid in zip(weights, grids, strict=True)]


def channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) with C innermost in memory, copied only if it is not.

    Not ``contiguous(memory_format=...)``, which leaves tensors of one channel or one pixel with
    the strides that they have.
    """
    _, C, H, W = x.shape
    strides = (H * W * C, 1, W * C, C)
    return x if x.stride() == strides else x.new_empty_strided(x.shape, strides).copy_(x)


def _infer(x: Tensor, stages: Stages, eps: float) -> Tensor:
    """The stages in eval without gradients.

    A batch norm is folded into its convolution where there are more values to normalise than
    weights to scale.
    """
    for weight, gamma, beta, mean, variance, stride in zip(*stages, strict=True):
        pixels = math.prod(stage_grids(x.shape[-2:], [stride])[0])
        if x.shape[0] * pixels < weight[0].numel():
            raw = channels_last(_convolution(x, weight, None, stride))
            x = _normalize(raw, gamma, beta, mean, variance, eps)
            continue
        dtype = wide(weight.dtype)
        scale = gamma.to(dtype) * torch.rsqrt(variance.to(dtype) + eps)
        bias = beta.to(dtype) - mean.to(dtype) * scale
        # oneDNN's convolution with the ReLU inside would gain a few per cent and lose every NaN.
        x = _convolution(x, _scaled(weight, scale), bias.to(weight.dtype), stride).relu_()
    return x


class Folded(NamedTuple):
    """A stem in eval whose batch norms were folded into its convolutions, a tensor a stage."""

    weights: Tensors
    biases: Tensors
    strides: Sequence[int]


def fold(stages: Stages, eps: float) -> Folded:
    """Rounded once, and laid out as the convolutions read them."""
    weights, biases = [], []
    for weight, gamma, beta, mean, variance in zip(*stages[:5], strict=True):
        dtype = wide(weight.dtype)
        scale = gamma.to(dtype) * torch.rsqrt(variance.to(dtype) + eps)
        weights.append(channels_last(_scaled(weight, scale)))
        biases.append((beta.to(dtype) - mean.to(dtype) * scale).to(weight.dtype))
    return Folded(weights, biases, stages.strides)


def infer_folded(
    x: Tensor, folded: Folded, proj_weight: Tensor, proj_bias: Tensor | None
) -> Tensor:
    """Tokens (B, N, D) of images in the dtype of the weights."""
    x = channels_last(x)
    for weight, bias, stride in zip(*folded, strict=True):
        x = _convolution(x, weight, bias, stride).relu_()
    return linear(_token_rows(x), proj_weight.flatten(1), proj_bias)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """3x3 with padding 1."""
    if not _is_garbage(x, (x.shape[3] - 1) // stride + 1):
        return F.conv2d(x, weight, bias, stride, padding=1)
    wide = None if bias is None else bias.float()
    return F.conv2d(x.float(), weight.float(), wide, stride, padding=1).to(x.dtype)


def _is_garbage(x: Tensor, columns: int) -> bool:
    """Whether a 3x3 convolution of x has to be made in float32.

    In bfloat16, oneDNN's gradient of the weights of one that gives a single column is garbage in
    channels_last; on processors with AMX it and the convolution itself are so in any layout (torch
    2.11 and 2.15).
    """
    return columns == 1 and x.device.type == "cpu" and x.dtype == torch.bfloat16


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """``weight`` times ``scale`` (C,) per output channel, in float32 and rounded once."""
    scale = scale[:, None, None, None]
    if weight.dtype == scale.dtype:
        return weight * scale
    out = torch.empty_like(weight)
    # A few channels at a time, so that what is in float32 stays in cache.
    for o, w, s in zip(out.split(64), weight.split(64), scale.split(64), strict=True):
        o.copy_(w.to(s.dtype).mul_(s))
    return out


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Channels_last tensors (B, C, H, W) as rows (n, C), as many at a time as stay in cache."""
    rows = [x.permute(0, 2, 3, 1).view(-1, x.shape[1]) for x in tensors]
    count, channels = rows[0].shape
    size = count
    if rows[0].device.type == "cpu":
        size = torch.get_num_threads() * _CHUNK_PER_CORE // channels
    return zip(*(x.split(max(1, size)) for x in rows), strict=True)


def _normalize(
    raw: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    """relu(batch_norm(raw)) with given statistics, computed in float32."""
    dtype = wide(raw.dtype)
    mean, variance, gamma, beta = (t.to(dtype) for t in (mean, variance, gamma, beta))
    if raw.dtype != dtype:
        return F.batch_norm(raw, mean, variance, gamma, beta, training=False, eps=eps).relu_()
    scale = gamma * torch.rsqrt(variance + eps)
    shift = beta - mean * scale
    out = torch.empty_like(raw)
    for y, x in _chunks(out, raw):
        torch.addcmul(shift, x, scale, out=y).relu_()
    return out


def _copied(running: Tensor) -> Tensor:
    """Running statistics as they are now: a later training step changes the buffers in place."""
    return running.to(wide(running.dtype), copy=True)


def _batch_statistics(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of channels_last (B, C, H, W).

    In two passes, combined over chunks by Chan's rule: a CPU takes six times as long for
    ``torch.var_mean`` along this axis, and the one pass of its batch norm costs a digit. An empty
    batch gives NaN, as PyTorch's does.
    """
    dtype, parts = wide(raw.dtype), []
    for (rows,) in _chunks(raw):
        mean = rows.mean(0, dtype=dtype)
        parts.append((rows.shape[0], mean, (rows - mean).square_().sum(0)))
    if len(parts) == 1:
        ((count, mean, square),) = parts
        return mean, square / count
    counts, means, squares = zip(*parts, strict=True)
    sizes = torch.tensor(counts, dtype=dtype, device=raw.device)[:, None]
    _, mean, variance = pooled(sizes, torch.stack(means), torch.stack(squares))
    return mean, variance


def _values(raw: Tensor) -> int:
    """How many values a channel of (B, C, H, W) has."""
    return raw.numel() // raw.shape[1]


def _normalize_batch(
    raw: Tensor, gamma: Tensor, beta: Tensor, eps: float, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """relu(batch_norm(raw)), the statistics of the batch that it used (biased variance), and how
    many values they are of where a ``group`` of processes has its parts.
    """
    dtype = wide(raw.dtype)
    if group or raw.dtype == dtype or raw.numel() == 0:
        total = None
        mean, variance = _batch_statistics(raw)
        if group:
            total, mean, variance = synchronized(_values(raw), mean, variance, group)
        return _normalize(raw, gamma, beta, mean, variance, eps), mean, variance, total
    # PyTorch's kernel sums half precision in float32. Its rstd would give tiny variances back
    # without a digit; with momentum 1 the running statistics are those of the batch.
    mean, unbiased = (torch.zeros_like(gamma, dtype=dtype) for _ in range(2))
    out, *_ = torch.native_batch_norm(
        raw, gamma.to(dtype), beta.to(dtype), mean, unbiased, True, 1.0, eps
    )
    count = _values(raw)
    return out.relu_(), mean, unbiased * ((count - 1) / count), None


class Forward(NamedTuple):
    """The tokens, and what the backward and the running statistics need.

    ``means`` and ``variances`` are those that the batch norms used, ``counts`` () of how many
    values in a group of processes; they and ``raw`` are empty where nothing needs them.
    """

    tokens: Tensor
    raw: list[Tensor]
    means: list[Tensor]
    variances: list[Tensor]
    counts: list[Tensor]


def forward(
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
    x = channels_last(normalize_images(x, mean, std, proj_weight.dtype))
    raw: list[Tensor] = []
    means: list[Tensor] = []
    variances: list[Tensor] = []
    counts: list[Tensor] = []
    if not (training or save):
        x = _infer(x, stages, eps)
    else:
        for i, (weight, gamma, beta, stride) in enumerate(
            zip(stages.weights, stages.bn_weights, stages.bn_biases, stages.strides, strict=True)
        ):
            # A convolution of one channel answers in another layout.
            y = channels_last(_convolution(x, weight, None, stride))
            del x
            if training:
                x, mean_i, variance_i, count = _normalize_batch(y, gamma, beta, eps, group)
                if count is not None:
                    counts.append(count)
            else:
                mean_i, variance_i = _copied(stages.means[i]), _copied(stages.variances[i])
                x = _normalize(y, gamma, beta, mean_i, variance_i, eps)
            means.append(mean_i)
            variances.append(variance_i)
            if save:
                raw.append(y)
    tokens = linear(_token_rows(x), proj_weight.flatten(1), proj_bias)
    return Forward(assemble(tokens, pos_embed, cls_token), raw, means, variances, counts)


def _token_rows(x: Tensor) -> Tensor:
    """Channels_last (B, C, H', W') as (B, N, C), a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


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
) -> list[Tensor]:
    image = channels_last(normalize_images(x, mean, std, proj_weight.dtype))
    dtokens, dpos, dcls = token_gradients(grad, pos_embed, cls_token)
    dtokens = dtokens.reshape(-1, dtokens.shape[-1])

    def activation(i: int) -> Tensor:
        """What follows stage i; the image follows stage -1."""
        if i < 0:
            return image
        gamma, beta = stages.bn_weights[i], stages.bn_biases[i]
        return _normalize(raw[i], gamma, beta, stages.means[i], stages.variances[i], eps)

    depth = len(raw)
    y = activation(depth - 1)
    rows = _token_rows(y)
    dproj = (dtokens.mT @ rows.flatten(0, 1)).view(proj_weight.shape)
    dproj_bias = None
    if proj_bias is not None:
        dproj_bias = dtokens.sum(0, dtype=wide(dtokens.dtype)).to(proj_bias.dtype)

    learned = [any(wanted[5 + i :: depth]) for i in range(depth)]
    # Frozen stages below the first that is learned cost nothing.
    first = 0 if wanted[0] else (learned.index(True) if any(learned) else depth)
    gradients: list[tuple[Tensor | None, ...]] = [(None, None, None)] * depth
    dy: Tensor | None = None
    if first < depth:
        dy = (dtokens @ proj_weight.flatten(1)).view(rows.shape)
        dy = dy.unflatten(1, y.shape[2:]).permute(0, 3, 1, 2)
    for i in reversed(range(first, depth)):
        assert dy is not None
        dz = torch.ops.aten.threshold_backward.grad_input(dy, y, 0, grad_input=dy)
        # The activation has served as the mask.
        del dy, y
        draw, dgamma, dbeta = _batch_norm_backward(
            dz, raw[i], stages.bn_weights[i], stages.means[i], stages.variances[i],
            training, eps, group, counts[i] if group else _values(raw[i]),
        )  # fmt: skip
        y = activation(i - 1)
        weight, dtype = stages.weights[i], stages.weights[i].dtype
        if _is_garbage(y, draw.shape[3]):
            draw, y, weight = (t.float() for t in (draw, y, weight))
        dy, dweight, _ = torch.ops.aten.convolution_backward(
            draw, y, weight, None, [stages.strides[i]] * 2,
            [1, 1], [1, 1], False, [0, 0], 1, [i > first or wanted[0], wanted[5 + i], False],
        )  # fmt: skip
        dy = None if dy is None else dy.to(dtype)
        y = y.to(dtype)
        del dz, draw
        gradients[i] = (
            None if dweight is None else dweight.to(dtype).contiguous(),
            dgamma.to(stages.bn_weights[i].dtype),
            dbeta.to(stages.bn_biases[i].dtype),
        )
    dweights, dgammas, dbetas = zip(*gradients, strict=True)
    dimage = dy.contiguous() if dy is not None and wanted[0] else None
    results = (dimage, dproj, dproj_bias, dpos, dcls, *dweights, *dgammas, *dbetas)
    return picked(wanted, results)


def _batch_norm_backward(
    dz: Tensor,
    raw: Tensor,
    gamma: Tensor,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    eps: float,
    group: str,
    count: Tensor | int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the raw tensor, of gamma and of beta; may overwrite ``dz``. Statistics of the
    batch are of ``count`` values in ``group``, or here; the last two are the sums of this process.
    """
    dtype = wide(raw.dtype)
    mean, gamma = mean.to(dtype), gamma.to(dtype)
    # Of dz and of dz (raw - mean).
    sums = mean.new_zeros(2, mean.shape[0])
    if raw.numel() == 0:
        # Without values the statistics are NaN, and PyTorch's kernel divides by zero.
        if group:
            exchanged(sums.flatten(), group)
        return dz, torch.zeros_like(mean), torch.zeros_like(mean)
    rstd = torch.rsqrt(variance.to(dtype) + eps)
    if raw.dtype != dtype and not group:
        # PyTorch's kernel sums half precision in float32.
        return torch.ops.aten.native_batch_norm_backward(
            dz, raw, gamma, mean, variance.to(dtype), mean, rstd, training, eps, [True, True, True]
        )
    # In channels_last that kernel adds up row by row, which in float32 costs a digit (2e-6 where
    # this makes 2e-7, for 48 channels of 2 x 112 x 112 values).
    dz = channels_last(dz)
    for d, x in _chunks(dz, raw):
        sums[0] += d.sum(0, dtype=dtype)
        sums[1] += (x - mean).mul_(d).sum(0)
    dbeta, dgamma = sums[0].clone(), sums[1] * rstd
    scale = gamma * rstd
    if not training:
        return dz.mul_(scale[:, None, None]), dgamma, dbeta
    if group:
        sums = exchanged(sums.flatten(), group).sum(0).view_as(sums)
    shift, slope = -scale * sums / count
    slope *= rstd.square()
    for d, x in _chunks(dz, raw):
        # In float32, and rounded once.
        w = d.to(dtype).mul_(scale).addcmul_(x - mean, slope).add_(shift)
        d.copy_(w)
    return dz, dgamma, dbeta

# SPDX-License-Identifier: Apache-2.0
"""The differentiable operations behind the layers.

Every function takes ``backend``: "reference", "torch", "triton", "native", "auto" (the fastest
that supports the call), or None for the default of the process (see
:func:`fastvit.set_backend`). A backend that was asked for by name and cannot run the call raises
``RuntimeError`` with the reason; an unknown name raises ``ValueError``.

Under autocast the matrix products run in the autocast dtype, in which the result comes; gates,
positional logits, softmax sums and batch statistics stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvit import reference
from fastvit.checks import (
    check_conv_stem,
    check_gpsa,
    check_packed,
    check_patch_embed,
    check_process_group,
    check_qkv,
)
from fastvit.ops import conv_stem as _conv_stem
from fastvit.ops import gpsa as _gpsa
from fastvit.ops import gpsa_dropout as _gpsa_dropout
from fastvit.ops import mhsa as _mhsa
from fastvit.ops import patch_embed as _patch_embed
from fastvit.ops.backend import choose, choose_once, requested
from fastvit.ops.conv_stem_torch import stage_shapes
from fastvit.ops.library import autocast_dtype, autocast_enabled, plain_ops_wanted
from fastvit.ops.tokens import unpack_heads
from fastvit.reference import ConvStage
from fastvit.reference.arguments import check_probability, default_scale

__all__ = [
    "ConvStage",
    "attention",
    "attention_qkvpacked",
    "conv_stem",
    "gpsa_attention",
    "gpsa_attention_qkpacked",
    "gpsa_attention_qkvpacked",
    "patch_embed",
]


def _cast(dtype: torch.dtype | None, *tensors: Tensor | None) -> Sequence[Any]:
    """The tensors in the autocast dtype; float64 and integers as they are, None stays None."""
    if dtype is None:
        return tensors
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]


def _plain(function: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run a reference function whose matrix products were cast already: autocast itself would
    round positional logits too.
    """
    if not autocast_enabled(x.device.type):
        return function(x, *args, **kwargs)
    with torch.autocast(x.device.type, enabled=False):
        return function(x, *args, **kwargs)


def gpsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gating_param: Tensor,
    grid_size: tuple[int, int],
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Gated positional self-attention (ConViT, arXiv 2103.10697, equation 7).

    ``out = (1 - g) softmax(scale q kᵀ) v + g softmax(position) v`` with ``g = sigmoid(gating)``
    per head and ``position[i, j] = pos_weight · (dx, dy, dx² + dy²)``, where dx and dy are the
    column and the row of key j minus those of query i.

    Args:
        q, k, v: (B, H, N, d), one floating dtype, any strides.
        pos_weight: (H, 3), any floating dtype.
        gating_param: (H,), before the sigmoid, any floating dtype.
        grid_size: (rows, columns) of the tokens, which are numbered row by row.
        scale: of the content scores; ``d ** -0.5`` when None.
        dropout_p: probability of dropping an entry of the mixed map; active whenever it is
            above 0. The Triton kernels drop weights while they pass over the map; elsewhere the
            reference backend serves, through the N x N maps.
        backend: see the module.

    Returns:
        (B, H, N, d) in the dtype of q (under autocast, the autocast dtype). All backends but the
        reference lay it out as (B, N, H, d), so that merging the heads copies nothing.

    Raises:
        ValueError: shapes, devices or grid do not fit, or ``dropout_p`` is outside [0, 1].
        TypeError: a dtype is not floating, or those of q, k, v differ.
        RuntimeError: the backend that was asked for cannot run the call.
    """
    cast = autocast_dtype(q)
    check_gpsa(q, k, v, pos_weight, gating_param, grid_size, dropout_p, cast is not None)
    q, k, v = _cast(cast, q, k, v)
    asked = requested(backend)
    scale = default_scale(q) if scale is None else float(scale)
    if choose(_gpsa.call(q, grid_size, dropout_p), asked) == "reference" or plain_ops_wanted():
        return _plain(
            reference.gpsa_attention, q, k, v, pos_weight, gating_param, grid_size,
            scale=scale, dropout_p=dropout_p,
        )  # fmt: skip
    rows, columns = grid_size
    if dropout_p > 0.0:
        return _gpsa_dropout.gpsa_dropout(
            q, k, v, pos_weight, gating_param, _gpsa_dropout.new_seed(q),
            rows, columns, scale, float(dropout_p), asked,
        )  # fmt: skip
    return _gpsa.gpsa(q, k, v, pos_weight, gating_param, rows, columns, scale, asked)


def gpsa_attention_qkpacked(
    qk: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gating_param: Tensor,
    grid_size: tuple[int, int],
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """:func:`gpsa_attention` of q and k in the one tensor that their projection gives.

    Its gradient comes in one piece too, without the copy that two views would cost.

    Args:
        qk: (B, N, 2, H, d), any strides.
        v: (B, H, N, d), of the same floating dtype.
        pos_weight, gating_param, grid_size, scale, dropout_p, backend: as there.

    Returns:
        (B, H, N, d), as there.

    Raises:
        ValueError, TypeError, RuntimeError: as there.
    """
    check_packed("qk", qk, 2)
    q, k = unpack_heads(qk)
    cast = autocast_dtype(qk)
    check_gpsa(q, k, v, pos_weight, gating_param, grid_size, dropout_p, cast is not None)
    asked = requested(backend)
    if (
        dropout_p > 0.0
        or choose(_gpsa.call(q, grid_size), asked) == "reference"
        or plain_ops_wanted()
    ):
        return gpsa_attention(
            q, k, v, pos_weight, gating_param, grid_size,
            scale=scale, dropout_p=dropout_p, backend=backend,
        )  # fmt: skip
    qk, v = _cast(cast, qk, v)
    scale = default_scale(qk) if scale is None else float(scale)
    rows, columns = grid_size
    return _gpsa.gpsa_qkpacked(qk, v, pos_weight, gating_param, rows, columns, scale, asked)


def gpsa_attention_qkvpacked(
    qkv: Tensor,
    pos_weight: Tensor,
    gating_param: Tensor,
    grid_size: tuple[int, int],
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """:func:`gpsa_attention` of q, k and v in the one tensor that one projection gives, as when the
    weights of several are stacked. Its gradient comes in one piece too.

    Args:
        qkv: (B, N, 3, H, d), any strides.
        pos_weight, gating_param, grid_size, scale, dropout_p, backend: as there.

    Returns:
        (B, H, N, d), as there.

    Raises:
        ValueError, TypeError, RuntimeError: as there.
    """
    check_packed("qkv", qkv, 3)
    q, k, v = unpack_heads(qkv)
    cast = autocast_dtype(qkv)
    check_gpsa(q, k, v, pos_weight, gating_param, grid_size, dropout_p, cast is not None)
    asked = requested(backend)
    if (
        dropout_p > 0.0
        or choose(_gpsa.call(q, grid_size), asked) == "reference"
        or plain_ops_wanted()
    ):
        return gpsa_attention(
            q, k, v, pos_weight, gating_param, grid_size,
            scale=scale, dropout_p=dropout_p, backend=backend,
        )  # fmt: skip
    (qkv,) = _cast(cast, qkv)
    scale = default_scale(qkv) if scale is None else float(scale)
    rows, columns = grid_size
    return _gpsa.gpsa_qkvpacked(qkv, pos_weight, gating_param, rows, columns, scale, asked)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Scaled dot-product attention without a mask (arXiv 1706.03762, equation 1).

    Args:
        q, k, v: (B, H, N, d), one floating dtype, any strides.
        scale: of the scores; ``d ** -0.5`` when None.
        dropout_p: probability of dropping an entry of the map; active whenever it is above 0.
        backend: see the module.

    Returns:
        (B, H, N, d) in the dtype of q (under autocast, the autocast dtype). Where all scores of
        a query are -inf the torch backend may give zeros, as PyTorch's attention does, and the
        reference gives NaN.

    Raises:
        ValueError: shapes or devices differ, or ``dropout_p`` is outside [0, 1].
        TypeError: a dtype is not floating, or they differ.
        RuntimeError: the backend that was asked for cannot run the call.
    """
    cast = autocast_dtype(q)
    check_qkv(q, k, v, cast is not None)
    check_probability("dropout_p", dropout_p)
    q, k, v = _cast(cast, q, k, v)
    scale = default_scale(q) if scale is None else float(scale)
    asked = requested(backend)
    if choose(_mhsa.call(q, dropout_p), asked) == "reference":
        return _plain(reference.attention, q, k, v, scale=scale, dropout_p=dropout_p)
    return _mhsa.mhsa(q, k, v, scale, dropout_p, asked)


def attention_qkvpacked(
    qkv: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """:func:`attention` of one projection's output, whose gradient comes in one piece too.

    Args:
        qkv: (B, N, 3, H, d), one floating dtype, any strides.
        scale, dropout_p, backend: as there.

    Returns:
        (B, H, N, d), as there.

    Raises:
        ValueError, TypeError, RuntimeError: as there.
    """
    check_packed("qkv", qkv, 3)
    asked = requested(backend)
    if choose(_mhsa.call(qkv, dropout_p), asked) == "reference":
        q, k, v = unpack_heads(qkv)
        return attention(q, k, v, scale=scale, dropout_p=dropout_p, backend=backend)
    check_probability("dropout_p", dropout_p)
    (qkv,) = _cast(autocast_dtype(qkv), qkv)
    scale = default_scale(qkv) if scale is None else float(scale)
    return _mhsa.mhsa_qkvpacked(qkv, scale, dropout_p, asked)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    cls_token: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Images to tokens by a projection of their patches (ViT, arXiv 2010.11929, equation 1).

    Args:
        images: (B, C, H, W), contiguous or channels_last; of the weight's dtype (under autocast
            any floating dtype), or uint8, which is normalised as ``(x / 255 - mean) / std``.
        weight: (D, C, ph, pw), of the convolution with stride (ph, pw) that this is.
        bias: (D,) or None.
        pos_embed: (1, N, D), added to the patches, or (1, N + 1, D), to the class token too.
        cls_token: (1, 1, D), put before the patches.
        mean, std: C floats each, of images in 0..1; for uint8 images only. Without them uint8
            images are divided by 255.
        backend: see the module.

    Returns:
        (B, N[+1], D) in the dtype of the weight (under autocast, the autocast dtype), with
        N = (H / ph) (W / pw) in row-major order.

    Raises:
        ValueError: shapes do not fit, the image does not divide into patches, mean and std are
            incomplete, of the wrong length, given with float images, or a std is 0.
        TypeError: a dtype is neither floating nor, for images, uint8; or dtypes differ.
        RuntimeError: the backend that was asked for cannot run the call.
    """
    cast = autocast_dtype(weight)
    check_patch_embed(images, weight, bias, pos_embed, cls_token, mean, std, cast is not None)
    if cast is not None:
        images, weight, bias = _cast(cast, images, weight, bias)
    asked = requested(backend)
    chosen = choose_once("patch_embed", images.device, weight.dtype, asked)
    if chosen == "reference" or plain_ops_wanted():
        return _plain(
            reference.patch_embed, images, weight, bias,
            pos_embed=pos_embed, cls_token=cls_token, mean=mean, std=std,
        )  # fmt: skip
    if mean is not None:
        mean, std = _floats(mean), _floats(std)
    return _patch_embed.patch_embed(images, weight, bias, pos_embed, cls_token, mean, std, asked)


def _floats(values: Sequence[float] | None) -> list[float] | None:
    return None if values is None else [float(v) for v in values]


def conv_stem(
    x: Tensor,
    stages: Sequence[ConvStage],
    proj_weight: Tensor,
    proj_bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    pos_embed: Tensor | None = None,
    cls_token: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    backend: str | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Images to tokens by a convolutional stem (ViT_C, arXiv 2106.14881, section 3).

    3x3 convolution without bias, batch norm, ReLU, a stage each; then a 1x1 convolution.

    Args:
        x: images (B, C, H, W), as in :func:`patch_embed`.
        stages: the 3x3 stages, see :class:`ConvStage`.
        proj_weight: (D, C_last, 1, 1).
        proj_bias: (D,) or None.
        training: normalise with the statistics of the batch, and move the running ones.
        momentum: share of the batch in the new running statistics: a number, or a tensor () or
            (stages,) where only the device knows it, as of a cumulative average.
        eps: added to the variances.
        pos_embed, cls_token, mean, std, backend: as in :func:`patch_embed`.
        process_group: processes over whose batches, of any sizes and images, ``training`` takes
            statistics and their part of the gradients, as ``torch.nn.SyncBatchNorm`` does, but on
            processors too; gradients of parameters stay those of this process. All must make the
            same calls, and all or none of them on the reference backend, which sends other
            messages. None, or a group of one: this process alone.

    Returns:
        (B, N[+1], D) in the dtype of ``proj_weight`` (under autocast, the autocast dtype), with
        N = H' W' in row-major order.

    Raises:
        ValueError: shapes do not fit, a stride is neither 1 nor 2, there is one value per
            channel in training, or mean and std do not fit as in :func:`patch_embed`.
        TypeError: a dtype is neither floating nor, for images, uint8; dtypes differ; ``momentum``
            is no number or ``process_group`` no group.
        RuntimeError: the backend that was asked for cannot run the call.
    """
    try:
        stages = [ConvStage(*stage) for stage in stages]
    except TypeError as error:
        raise TypeError(f"stages: expected a sequence of ConvStage, got {stages!r}") from error
    cast = autocast_dtype(proj_weight)
    check_process_group(process_group)
    if process_group is not None and (not training or process_group.size() == 1):
        process_group = None
    check_conv_stem(
        x, stages, proj_weight, proj_bias, training, momentum, pos_embed, cls_token, mean, std,
        cast is not None, process_group is not None,
    )  # fmt: skip
    x, proj_weight, proj_bias = _cast(cast, x, proj_weight, proj_bias)
    stages = [stage._replace(weight=_cast(cast, stage.weight)[0]) for stage in stages]
    asked = requested(backend)
    call = _conv_stem.call(x, proj_weight)
    if choose(call, asked) == "reference" or plain_ops_wanted():
        return _plain(
            reference.conv_stem, x, stages, proj_weight, proj_bias,
            training=training, momentum=momentum, eps=eps,
            pos_embed=pos_embed, cls_token=cls_token, mean=mean, std=std,
            process_group=process_group,
        )  # fmt: skip
    weights, gammas, betas, means, variances, strides = map(list, zip(*stages, strict=True))
    tracked = means[0] is not None
    running = (*means, *variances) if tracked else ()
    training = training or not tracked
    group = "" if process_group is None else process_group.group_name
    config = _conv_stem.Config(
        tuple(strides), training, float(eps), _floats(mean), _floats(std), group, asked
    )
    tokens, *extra = _conv_stem.conv_stem(
        config, x, proj_weight, proj_bias, pos_embed, cls_token,
        *weights, *gammas, *betas, *(() if training else running),
    )  # fmt: skip
    if training and tracked:
        n, shapes = len(stages), stage_shapes(x, weights, strides)
        counts = [B * height * width for B, _, height, width in shapes]
        totals = extra[len(extra) - n :] if group else []
        # An empty batch leaves them alone, as PyTorch's batch norm does.
        if group or counts[0] > 0:
            batch = extra[: len(extra) - len(totals)][-2 * n :]
            number, shares = momentum, None
            if isinstance(momentum, Tensor):
                number, shares = 0.0, momentum.detach().expand(n)
            _conv_stem.update_running_statistics(running, batch, counts, totals, number, shares)
    return tokens

# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments of :mod:`fastvit.functional`, made before anything is computed.

Every message names the argument, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvit.reference import ConvStage, stage_grids
from fastvit.reference.arguments import (
    check_grid,
    check_images,
    check_normalization,
    check_probability,
    untraced,
)


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _check_tensor(name: str, x: Any, shape: str, ndim: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(x).__name__}")
    if x.ndim != ndim:
        raise ValueError(f"{name}: expected {shape}, got shape {_shape(x)}")


def _check_floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")


def _check_shape(name: str, x: Tensor, expected: tuple[int, ...], why: str) -> None:
    if x.shape != expected:
        raise ValueError(f"{name}: expected shape {expected} ({why}), got {_shape(x)}")


def _check_parameter(
    name: str, x: Any, expected: tuple[int, ...], why: str, device: torch.device
) -> None:
    """A floating tensor of one shape on one device; its dtype is its own."""
    # What is right is asked at once, which takes half the time; here as below.
    if (
        isinstance(x, Tensor)
        and x.shape == expected
        and x.device == device
        and x.is_floating_point()
    ):
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {expected}, got {type(x).__name__}")
    _check_floating(name, x)
    _check_shape(name, x, expected, why)
    _check_device(name, x, device)


def _check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name}: expected device {device}, got {x.device}")


@untraced
def check_qkv(q: Tensor, k: Tensor, v: Tensor, autocast: bool) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x, "(B, H, N, d)", 4)
        _check_floating(name, x)
        if x.shape != q.shape:
            raise ValueError(f"{name}: expected the shape of q, {_shape(q)}, got {_shape(x)}")
        if x.dtype != q.dtype and not autocast:
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}")
        _check_device(name, x, q.device)


@untraced
def check_packed(name: str, x: Tensor, count: int) -> None:
    """One projection's output (B, N, count, H, d)."""
    shape = f"(B, N, {count}, H, d)"
    _check_tensor(name, x, shape, 5)
    _check_floating(name, x)
    if x.shape[2] != count:
        raise ValueError(f"{name}: expected {shape}, got shape {_shape(x)}")


@untraced
def check_gpsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gating_param: Tensor,
    grid_size: tuple[int, int],
    dropout_p: float,
    autocast: bool,
) -> None:
    check_qkv(q, k, v, autocast)
    heads = q.shape[1]
    _check_parameter("pos_weight", pos_weight, (heads, 3), "(H, 3)", q.device)
    _check_parameter("gating_param", gating_param, (heads,), "(H,)", q.device)
    rows, columns = check_grid(grid_size)
    if rows * columns != q.shape[2]:
        raise ValueError(
            f"grid_size: expected rows * columns == N = {q.shape[2]}, "
            f"got {rows} * {columns} = {rows * columns}"
        )
    check_probability("dropout_p", dropout_p)


def _check_images(
    name: str,
    images: Any,
    weight: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    autocast: bool,
) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"{name}: expected a tensor (B, C, H, W), got {type(images).__name__}")
    check_images(name, images, weight.shape[1])
    _check_device(name, images, weight.device)
    if images.dtype == torch.uint8:
        return check_normalization(mean, std, weight.shape[1])
    if images.dtype != weight.dtype and not autocast:
        raise TypeError(
            f"{name}: expected uint8 or the dtype of the weight, {weight.dtype}, got {images.dtype}"
        )
    if mean is not None or std is not None:
        raise ValueError(
            f"mean, std: expected None for images of {images.dtype}, since they normalise uint8 "
            f"images; got {mean} and {std}"
        )


def _check_token_parameters(
    pos_embed: Tensor | None,
    cls_token: Tensor | None,
    tokens: int,
    width: int,
    device: torch.device,
) -> None:
    if cls_token is not None:
        _check_parameter("cls_token", cls_token, (1, 1, width), "(1, 1, D)", device)
    if pos_embed is None:
        return
    if not (isinstance(pos_embed, Tensor) and pos_embed.ndim == 3):
        _check_tensor("pos_embed", pos_embed, "(1, N, D)", 3)
    length = pos_embed.shape[1]
    lengths = (tokens,) if cls_token is None else (tokens, tokens + 1)
    if length not in lengths:
        expected = " or ".join(map(str, lengths))
        raise ValueError(
            f"pos_embed: expected {expected} positions for {tokens} patches, "
            f"got shape {_shape(pos_embed)}"
        )
    expected_shape = (1, length, width)
    _check_parameter("pos_embed", pos_embed, expected_shape, "(1, N[+1], D)", device)


def _check_projection(weight: Tensor, bias: Tensor | None, names: tuple[str, str]) -> None:
    if not (isinstance(weight, Tensor) and weight.ndim == 4 and weight.is_floating_point()):
        _check_tensor(names[0], weight, "(D, C, height, width)", 4)
        _check_floating(names[0], weight)
    if bias is not None:
        _check_parameter(names[1], bias, (weight.shape[0],), "(D,)", weight.device)


@untraced
def check_patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    cls_token: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    autocast: bool,
) -> None:
    _check_projection(weight, bias, ("weight", "bias"))
    D, _C, ph, pw = weight.shape
    if ph == 0 or pw == 0:
        raise ValueError(f"weight: expected patches of at least one pixel, got {_shape(weight)}")
    _check_images("images", images, weight, mean, std, autocast)
    _B, _C, height, width = images.shape
    if height % ph or width % pw:
        raise ValueError(
            f"images: expected sides divisible by the patch size {ph} x {pw}, "
            f"got {height} x {width}"
        )
    tokens = (height // ph) * (width // pw)
    _check_token_parameters(pos_embed, cls_token, tokens, D, images.device)


def _check_stage(i: int, stage: ConvStage, channels: int, device: torch.device) -> None:
    name = f"stages[{i}]"
    if stage.stride not in (1, 2):
        raise ValueError(f"{name}.stride: expected 1 or 2, got {stage.stride}")
    _check_tensor(f"{name}.weight", stage.weight, "(C_out, C_in, 3, 3)", 4)
    out = stage.weight.shape[0]
    shape = (out, channels, 3, 3)
    _check_parameter(f"{name}.weight", stage.weight, shape, "(C_out, C_in, 3, 3)", device)
    for field in ("bn_weight", "bn_bias", "running_mean", "running_var"):
        value = getattr(stage, field)
        if value is None and field.startswith("running"):
            continue
        _check_parameter(f"{name}.{field}", value, (out,), "(C_out,)", device)
    if (stage.running_mean is None) != (stage.running_var is None):
        raise ValueError(f"{name}: expected running_mean and running_var both or neither")


def _check_momentum(momentum: float | Tensor, stages: int, device: torch.device) -> None:
    if isinstance(momentum, Tensor):
        _check_floating("momentum", momentum)
        if momentum.shape not in ((), (stages,)):
            raise ValueError(
                f"momentum: expected shape () or (stages,) = ({stages},), got {_shape(momentum)}"
            )
        _check_device("momentum", momentum, device)
    elif isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
        raise TypeError(f"momentum: expected a float or a tensor, got {momentum!r}")


def check_process_group(group: torch.distributed.ProcessGroup | None) -> None:
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"process_group: expected a ProcessGroup or None, got {group!r}")


@untraced
def check_conv_stem(
    x: Tensor,
    stages: Sequence[ConvStage],
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    pos_embed: Tensor | None,
    cls_token: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    autocast: bool,
    synchronized: bool,
) -> None:
    _check_projection(proj_weight, proj_bias, ("proj_weight", "proj_bias"))
    if not stages:
        raise ValueError("stages: expected at least one stage, got none")
    _check_momentum(momentum, len(stages), proj_weight.device)
    first = stages[0].weight
    channels = first.shape[1] if isinstance(first, Tensor) and first.ndim == 4 else 0
    for i, stage in enumerate(stages):
        _check_stage(i, stage, channels, proj_weight.device)
        if stage.weight.dtype != proj_weight.dtype and not autocast:
            raise TypeError(
                f"stages[{i}].weight: expected the dtype of proj_weight, {proj_weight.dtype}, "
                f"got {stage.weight.dtype}"
            )
        channels = stage.weight.shape[0]
    if len({stage.running_mean is None for stage in stages}) != 1:
        raise ValueError("stages: expected running statistics in all stages or in none")
    _check_images("x", x, stages[0].weight, mean, std, autocast)
    height, width = stage_grids(x.shape[-2:], [stage.stride for stage in stages])[-1]
    _check_shape(
        "proj_weight", proj_weight, (proj_weight.shape[0], channels, 1, 1), "(D, C_last, 1, 1)"
    )
    alone = (training or stages[0].running_mean is None) and not synchronized
    if alone and x.shape[0] * height * width == 1:
        raise ValueError(
            "x: expected more than one value per channel to take batch statistics of, "
            f"got one in the last stage from shape {_shape(x)}"
        )
    _check_token_parameters(pos_embed, cls_token, height * width, proj_weight.shape[0], x.device)

# SPDX-License-Identifier: Apache-2.0
"""The convolutional stem of ViT_C, Xiao et al. 2021, arXiv 2106.14881, section 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.reference.arguments import check_images, check_normalization, floating_dtype
from fastvit.reference.patch_embed import assemble_tokens, normalize_images


class ConvStage(NamedTuple):
    """One 3x3 convolution (padding 1, no bias) with its batch norm; a ReLU follows.

    Attributes:
        weight: (C_out, C_in, 3, 3).
        bn_weight, bn_bias: (C_out,).
        running_mean, running_var: (C_out,), or None for batch statistics always.
        stride: 1 or 2.
    """

    weight: Tensor
    bn_weight: Tensor
    bn_bias: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    stride: int


def stage_grids(image_size: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(height, width) after each 3x3 convolution with padding 1."""
    height, width = image_size
    grids = []
    for stride in strides:
        height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
        grids.append((height, width))
    return grids


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
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Images to tokens layer by layer: what :func:`fastvit.functional.conv_stem` computes, with
    its arguments. Returns (B, N[+1], D).
    """
    x = normalize_images(x, mean, std, proj_weight.dtype)
    shares: list[Any] = [momentum] * len(stages)
    if isinstance(momentum, Tensor):
        # PyTorch's batch norm takes numbers.
        shares = momentum.expand(len(stages)).tolist()
    for stage, share in zip(stages, shares, strict=True):
        x = F.conv2d(x, stage.weight, stride=stage.stride, padding=1)
        if process_group is not None and training:
            x = _synchronized_batch_norm(x, stage, share, eps, process_group)
        else:
            x = F.batch_norm(
                x,
                stage.running_mean,
                stage.running_var,
                stage.bn_weight,
                stage.bn_bias,
                training=training or stage.running_mean is None,
                momentum=share,
                eps=eps,
            )
        x = F.relu(x)
    x = F.conv2d(x, proj_weight, proj_bias)
    return assemble_tokens(x.flatten(2).transpose(1, 2), pos_embed, cls_token)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of what the processes of a group have. Each reads it, so that its gradient is the sum
    of theirs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOverProcesses.apply(grad.contiguous(), ctx.group), None


def _synchronized_batch_norm(
    x: Tensor,
    stage: ConvStage,
    momentum: float,
    eps: float,
    group: torch.distributed.ProcessGroup,
) -> Tensor:
    """A training step of ``torch.nn.SyncBatchNorm`` on (B, C, H, W), on any device."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    values = wide.new_tensor([x.numel() // x.shape[1]])
    totals = _SumOverProcesses.apply(torch.cat((wide.sum((0, 2, 3)), values)), group)
    count, mean = totals[-1], totals[:-1] / totals[-1]
    centered = wide - mean[:, None, None]
    variance = _SumOverProcesses.apply(centered.square().sum((0, 2, 3)), group) / count
    if stage.running_mean is not None and stage.running_var is not None and count > 0:
        with torch.no_grad():
            unbiased = variance * (count / (count - 1))
            for running, new in ((stage.running_mean, mean), (stage.running_var, unbiased)):
                running.lerp_(new.to(running.dtype), momentum)
    rstd = torch.rsqrt(variance + eps)
    out = centered * (stage.bn_weight * rstd)[:, None, None] + stage.bn_bias[:, None, None]
    return out.to(x.dtype)


class ConvBNReLU(nn.Module):
    """3x3 convolution without bias, batch norm, ReLU; keys ``conv.weight`` and ``bn.*``."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        stride: int,
        norm_eps: float,
        norm_momentum: float | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_chans, out_chans, 3, stride, padding=1, bias=False, **factory)
        self.bn = nn.BatchNorm2d(out_chans, eps=norm_eps, momentum=norm_momentum, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Projection(nn.Module):
    """The last 1x1 convolution, with bias; keys ``conv.weight`` and ``conv.bias``."""

    conv: nn.Conv2d

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ConvStem(nn.Sequential):
    """The convolutional stem with the keys of timm's ConvStem.

    3x3 convolution (no bias), BatchNorm2d, ReLU, once per entry of ``channels``; then a 1x1
    convolution with bias (section 3 and appendix of the paper).

    Args:
        in_chans: channels of the image.
        channels: output channels of the 3x3 convolutions.
        strides: their strides, 1 or 2 each.
        embed_dim: D.
        norm_eps, norm_momentum: of the batch norms.
        flatten: (B, N, D) with N = H' * W'; otherwise (B, D, H', W').
        mean, std: ``in_chans`` numbers each in 0..1 that normalise uint8 images; without them
            uint8 is divided by 255.

    Shapes: images (B, in_chans, H, W), floating or uint8. Parameters: ``{i}.conv.weight``,
    ``{i}.bn.*`` and, of the last, ``{n}.conv.weight``, ``{n}.conv.bias``.

    Raises:
        ValueError: ``channels`` and ``strides`` differ in length or are empty, a stride is
            neither 1 nor 2, or mean and std do not fit; at the call, images with other channels.
        TypeError: at the call, images neither floating nor uint8.
    """

    def __init__(
        self,
        in_chans: int = 3,
        channels: Sequence[int] = (48, 96, 192, 384),
        strides: Sequence[int] = (2, 2, 2, 2),
        embed_dim: int = 384,
        *,
        norm_eps: float = 1e-5,
        norm_momentum: float | None = 0.1,
        flatten: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(channels) != len(strides):
            raise ValueError(
                "channels, strides: expected the same length, "
                f"got {len(channels)} channels and {len(strides)} strides"
            )
        if not channels:
            raise ValueError("channels: expected at least one stage, got none")
        check_normalization(mean, std, in_chans)
        if any(stride not in (1, 2) for stride in strides):
            raise ValueError(f"strides: expected 1 or 2 each, got {tuple(strides)}")
        self.in_chans = in_chans
        self.flatten = flatten
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)
        widths = (in_chans, *channels)
        for i, stride in enumerate(strides):
            stage = ConvBNReLU(
                widths[i], widths[i + 1], stride, norm_eps, norm_momentum, device, dtype
            )
            self.append(stage)
        self.append(Projection(widths[-1], embed_dim, device, dtype))

    @property
    def stages(self) -> list[ConvBNReLU]:
        """The 3x3 stages, in order."""
        return [cast(ConvBNReLU, self[i]) for i in range(len(self) - 1)]

    @property
    def projection(self) -> Projection:
        """The last 1x1 convolution."""
        return cast(Projection, self[-1])

    def forward(self, x: Tensor) -> Tensor:
        check_images("x", x, self.in_chans)
        if x.dtype == torch.uint8:
            x = normalize_images(x, self.mean, self.std, floating_dtype(self.projection.conv))
        for layer in self:
            x = layer(x)
        return x.flatten(2).transpose(1, 2) if self.flatten else x

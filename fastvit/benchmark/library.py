# SPDX-License-Identifier: Apache-2.0
"""The two models of a row: what timm or torchvision gives a user today, and fastvit's."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastvit.benchmark.rows import RegNetConfig, Row, StemLayer

if TYPE_CHECKING:
    from fastvit.models import ConViT, VisionTransformer

_NUM_CLASSES = 1000


def build_library(row: Row) -> nn.Module:
    """The row's model from timm or torchvision, in training mode, every dropout rate 0.

    Builds on the current default device, so ``with torch.device("meta")`` costs no memory.

    Raises:
        ImportError: timm or torchvision is not installed.
        ValueError: the row's family is unknown.
    """
    if row.family == "DeiT":
        return timm_vit(row)
    if row.family == "ConViT":
        return _timm_convit(row)
    if row.family in ("ViT_P", "ViT_C"):
        return _torchvision_vit(row)
    if row.family == "ResNet":
        return _torchvision_resnet(row)
    if row.family in ("RegNetY", "RegNetZ"):
        return _timm_regnet(row)
    if row.family == "EfficientNet":
        return _timm_efficientnet(row)
    raise ValueError(f"{row.name}: no constructor for the family {row.family!r}")


def build_fastvit(row: Row) -> ConViT | VisionTransformer:
    """The row's model from ``fastvit.create_model``, on the current default device."""
    from fastvit.models import create_model

    if row.fastvit is None:
        raise ValueError(f"{row.name} is a convolutional network; fastvit has no model of it")
    options = dict(row.options)
    return create_model(row.fastvit, num_classes=_NUM_CLASSES, img_size=row.image_size, **options)


def timm_vit(row: Row) -> nn.Module:
    """timm's plain vision transformer with the row's patch embedding or convolutional stem.

    The tables take ViT_P and ViT_C from torchvision, which trained them.

    Raises:
        ImportError: timm is not installed.
    """
    from timm.models.vision_transformer import VisionTransformer

    options: dict[str, Any] = {"patch_size": row.stem[0].kernel}
    if len(row.stem) > 1:
        options = {"embed_layer": functools.partial(_timm_stem, row.stem)}
    return VisionTransformer(
        img_size=row.image_size,
        num_classes=_NUM_CLASSES,
        embed_dim=row.embed_dim,
        depth=row.depth,
        num_heads=row.heads,
        mlp_ratio=row.mlp_ratio,
        qkv_bias=row.qkv_bias,
        **options,
    )


def _timm_stem(layers: Sequence[StemLayer], img_size: int, embed_dim: int, **_: Any) -> nn.Module:
    from timm.layers import HybridEmbed
    from timm.models.vision_transformer_hybrid import ConvStem

    stem = ConvStem(
        depth=len(layers),
        channels=tuple(layer.out_ch for layer in layers),
        kernel_size=tuple(layer.kernel for layer in layers),
        stride=tuple(layer.stride for layer in layers),
    )
    return HybridEmbed(stem, img_size=img_size, proj=False, embed_dim=embed_dim)


def _timm_convit(row: Row) -> nn.Module:
    from timm.models.convit import ConVit

    assert row.embed_dim is not None
    assert row.heads is not None
    return ConVit(
        img_size=row.image_size,
        patch_size=row.stem[0].kernel,
        num_classes=_NUM_CLASSES,
        # timm multiplies by the number of heads itself.
        embed_dim=row.embed_dim // row.heads,
        depth=row.depth,
        num_heads=row.heads,
        mlp_ratio=row.mlp_ratio,
        qkv_bias=row.qkv_bias,
        local_up_to_layer=row.local_up_to_layer,
        locality_strength=1.0,
    )


def _torchvision_vit(row: Row) -> nn.Module:
    from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

    assert row.embed_dim is not None
    assert row.mlp_ratio is not None
    stem = None
    if row.family == "ViT_C":
        # torchvision appends the final 1x1 convolution itself.
        stem = [
            ConvStemConfig(layer.out_ch, layer.kernel, layer.stride)
            for layer in row.stem
            if layer.norm is not None
        ]
    return VisionTransformer(
        image_size=row.image_size,
        patch_size=16,
        num_layers=row.depth,
        num_heads=row.heads,
        hidden_dim=row.embed_dim,
        mlp_dim=row.mlp_ratio * row.embed_dim,
        num_classes=_NUM_CLASSES,
        conv_stem_configs=stem,
    )


def _torchvision_resnet(row: Row) -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    depths = {
        "ResNet-50": [3, 4, 6, 3],
        "ResNet-101": [3, 4, 23, 3],
        "ResNet-152": [3, 8, 36, 3],
        "ResNet-200": [3, 24, 36, 3],
    }
    return ResNet(Bottleneck, depths[row.name], num_classes=_NUM_CLASSES)


def _timm_efficientnet(row: Row) -> nn.Module:
    import timm

    name = row.name.lower().replace("effnet-", "efficientnet_")
    return timm.create_model(name, num_classes=_NUM_CLASSES)


def _timm_regnet(row: Row) -> nn.Module:
    """The RegNets of the table, which are not the zoo's models of the same names.

    timm's configuration generates stage widths from three numbers; the scaled networks of the
    table have widths that no three numbers generate, so their stages are given one by one.
    """
    from timm.models.regnet import RegNet, RegNetCfg

    net = row.regnet
    assert net is not None
    z = row.family == "RegNetZ"
    options: dict[str, Any] = {
        "group_size": net.group_width,
        "bottle_ratio": net.bottleneck_multiplier,
        "se_ratio": net.se_ratio,
        "num_features": net.head_width,
        "downsample": None if z else "conv1x1",
        "linear_out": z,
        "act_layer": "silu" if z else "relu",
    }
    if net.depths is None:
        config = RegNetCfg(depth=net.depth, w0=net.w0, wa=net.wa, wm=net.wm, **options)
        return RegNet(config, num_classes=_NUM_CLASSES, zero_init_last=False)

    stages = _listed_stages(net)

    class ListedStagesRegNet(RegNet):
        def _get_stage_args(self, cfg: RegNetCfg, **_: Any) -> tuple[list[dict], dict]:
            return stages, {
                "downsample": cfg.downsample,
                "se_ratio": cfg.se_ratio,
                "linear_out": cfg.linear_out,
                "act_layer": cfg.act_layer,
                "norm_layer": cfg.norm_layer,
            }

    return ListedStagesRegNet(RegNetCfg(**options), num_classes=_NUM_CLASSES, zero_init_last=False)


def _listed_stages(net: RegNetConfig) -> list[dict[str, Any]]:
    assert net.depths is not None
    assert net.widths is not None
    return [
        {
            "out_chs": width,
            "stride": 2,
            "dilation": 1,
            "depth": depth,
            "bottle_ratio": net.bottleneck_multiplier,
            "group_size": net.group_width,
            "drop_path_rates": [0.0] * depth,
        }
        for depth, width in zip(net.depths, net.widths, strict=True)
    ]


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a built model whose parameters and buffers live on the meta device.

    Its modules are the model's own, copied; its memory is none. Buffers that a model computes
    from its parameters' sizes have no values there: use the copy for shapes only.
    """
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        shadow = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            shadow = nn.Parameter(shadow, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = shadow
    return copy.deepcopy(model, memo)

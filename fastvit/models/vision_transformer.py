# SPDX-License-Identifier: Apache-2.0
"""Plain vision transformers: DeiT (arXiv 2012.12877), ViT_P and ViT_C (arXiv 2106.14881)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastvit.layers import MHSA, PatchEmbed
from fastvit.models.blocks import LAYER_NORM_EPS, Block, Mlp, drop_path_rates
from fastvit.models.classifier import TokenClassifier
from fastvit.models.embed import ConvStemEmbed

WEIGHT_INITS = ("deit", "early_convs")


class VisionTransformer(TokenClassifier):
    """Vision transformer with timm's keys, over a patch embedding or a convolutional stem.

    Args:
        img_size: pixels, an int or (height, width), divisible by ``patch_size``.
        patch_size: pixels, an int or (height, width); with a stem, the product of its strides.
        in_chans: image channels.
        num_classes: classes; 0 leaves the head out.
        global_pool: ``"token"`` classifies the class token, ``"avg"`` the mean patch token,
            ``""`` every token.
        embed_dim: token width.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over ``embed_dim``.
        qkv_bias: bias of the query, key and value projections.
        stem_channels: channels of the stem's 3x3 convolutions; None embeds patches with one
            convolution of ``patch_size``.
        stem_strides: strides of the stem's 3x3 convolutions.
        fc_norm: normalise behind the pooling (key ``fc_norm``) instead of in front of it (key
            ``norm``); None does so for ``global_pool="avg"``, as timm.
        drop_rate: dropout in front of the head.
        pos_drop_rate: dropout behind the position embedding.
        proj_drop_rate: dropout behind the attention's projection and in the MLP.
        attn_drop_rate: dropout on the attention weights.
        drop_path_rate: stochastic depth of the last block, decaying linearly to 0 at the first.
        weight_init: ``"deit"``, truncated normals of deviation 0.02, or ``"early_convs"``, the
            scheme of the authors of ViT_P and ViT_C, which torchvision shares.
        mean, std: per channel, for uint8 images (see ``fastvit.PatchEmbed``).
        backend: backend of the layers; None follows ``fastvit.set_backend``.

    Raises:
        ValueError: if an argument is out of range or does not fit another.
    """

    pos_embed: nn.Parameter

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        *,
        stem_channels: Sequence[int] | None = None,
        stem_strides: Sequence[int] | None = None,
        fc_norm: bool | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "deit",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            class_token_block=0,
        )
        if weight_init not in WEIGHT_INITS:
            raise ValueError(f"weight_init must be one of {WEIGHT_INITS}, got {weight_init!r}")
        if (stem_channels is None) != (stem_strides is None):
            raise ValueError(
                f"stem_channels and stem_strides go together, got {stem_channels=}, {stem_strides=}"
            )
        self.weight_init = weight_init
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, device=device, dtype=dtype))
        num_tokens = 1 + self.num_patches
        pos_embed = torch.empty(1, num_tokens, embed_dim, device=device, dtype=dtype)
        self.pos_embed = nn.Parameter(pos_embed)
        shared: dict[str, Any] = {
            "mean": mean,
            "std": std,
            "backend": backend,
            "device": device,
            "dtype": dtype,
        }
        if stem_channels is None or stem_strides is None:
            self.patch_embed = PatchEmbed(
                self.img_size, self.patch_size, in_chans, embed_dim, **shared
            )
        else:
            self.patch_embed = ConvStemEmbed(
                self.img_size, in_chans, stem_channels, stem_strides, embed_dim, **shared
            )
        if self.patch_embed.patch_size != self.patch_size:
            raise ValueError(
                f"patch_size {self.patch_size} must be the product of stem_strides {stem_strides}"
            )
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=rate,
                backend=backend,
                device=device,
                dtype=dtype,
            )
            for rate in drop_path_rates(drop_path_rate, depth)
        )
        norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS, device=device, dtype=dtype)
        norm_after_pool = global_pool == "avg" if fc_norm is None else fc_norm
        self.norm = nn.Identity() if norm_after_pool else norm
        self.fc_norm = norm if norm_after_pool else nn.Identity()
        self._set_head(num_classes, drop_rate)
        self._init_weights()

    def _embed(self, x: Tensor) -> Tensor:
        x = self._prepend_class_token(self.patch_embed(x))
        return self.pos_drop(x + self.pos_embed)

    def _init_weights(self) -> None:
        if self.weight_init == "deit":
            self._init_deit()
        else:
            self._init_early_convs()

    def _init_deit(self) -> None:
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _init_early_convs(self) -> None:
        """Initialise as the authors' configurations do (facebookresearch/pycls, vitconfigs).

        The stem's 3x3 convolutions and the attention's output projection keep PyTorch's
        default weights.
        """
        nn.init.zeros_(self.cls_token)
        nn.init.normal_(self.pos_embed, std=0.02)
        if isinstance(self.patch_embed, ConvStemEmbed):
            last = cast("nn.Conv2d", self.patch_embed.backbone[-1].conv)
            nn.init.normal_(last.weight, std=math.sqrt(2.0 / last.out_channels))
        else:
            last = self.patch_embed.proj
            fan_in = last.in_channels * math.prod(last.kernel_size)
            nn.init.trunc_normal_(last.weight, std=math.sqrt(1.0 / fan_in))
        biases = [last.bias]
        for module in self.modules():
            if isinstance(module, MHSA):
                nn.init.xavier_uniform_(module.qkv.weight)
                biases += [module.qkv.bias, module.proj.bias]
            elif isinstance(module, Mlp):
                for linear in (module.fc1, module.fc2):
                    nn.init.xavier_uniform_(linear.weight)
                    nn.init.normal_(linear.bias, std=1e-6)
        for bias in biases:
            if bias is not None:
                nn.init.zeros_(bias)

    def _init_head(self, head: nn.Linear) -> None:
        if self.weight_init == "deit":
            nn.init.trunc_normal_(head.weight, std=0.02)
        else:
            nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)

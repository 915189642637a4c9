# SPDX-License-Identifier: Apache-2.0
"""ConViT: a vision transformer whose first blocks start out convolutional (arXiv 2103.10697)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastvit.layers import GPSA, PatchEmbed
from fastvit.models.blocks import LAYER_NORM_EPS, Block, drop_path_rates
from fastvit.models.classifier import TokenClassifier


class ConViT(TokenClassifier):
    """ConViT with the parameters, keys and numbers of timm's and the authors' models.

    Blocks below ``local_up_to_layer`` use gated positional self-attention on patch tokens; the
    class token joins in front of block ``local_up_to_layer``, from where plain self-attention
    takes over. The position embedding covers the patch tokens only. Each GPSA gets the true
    patch grid, so images need not be square (timm's version infers a square grid).

    Args:
        img_size: pixels, an int or (height, width), divisible by ``patch_size``.
        patch_size: pixels, an int or (height, width).
        in_chans: image channels.
        num_classes: classes; 0 leaves the head out.
        global_pool: ``"token"`` classifies the class token, ``"avg"`` the mean patch token,
            ``""`` every token.
        embed_dim: total token width, ``num_heads`` times the width per head. (timm's ``ConVit``
            takes the width per head under this name.)
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over ``embed_dim``.
        qkv_bias: bias of the query, key and value projections.
        drop_rate: dropout in front of the head.
        pos_drop_rate: dropout behind the position embedding.
        proj_drop_rate: dropout behind the attention's projection and in the MLP.
        attn_drop_rate: dropout on the attention weights.
        drop_path_rate: stochastic depth of the last block, decaying linearly to 0 at the first.
        local_up_to_layer: number of leading GPSA blocks. If it is ``depth`` or more, no block
            reads the class token and none is inserted; ``cls_token`` stays, frozen, for the
            sake of the keys, and ``global_pool="token"`` is refused. (timm then classifies
            from the top left patch.)
        locality_strength: initial focus of the heads on their centres (paper eq. 8).
        use_pos_embed: add a learned position embedding to the patch tokens.
        mean, std: per channel, for uint8 images (see ``fastvit.PatchEmbed``).
        backend: backend of the layers; None follows ``fastvit.set_backend``.

    Raises:
        ValueError: if an argument is out of range or does not fit another.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        local_up_to_layer: int = 10,
        locality_strength: float = 1.0,
        use_pos_embed: bool = True,
        *,
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
            class_token_block=local_up_to_layer,
        )
        self.local_up_to_layer = local_up_to_layer
        self.locality_strength = locality_strength
        self.use_pos_embed = use_pos_embed

        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, device=device, dtype=dtype))
        pos_embed = torch.empty(1, self.num_patches, embed_dim, device=device, dtype=dtype)
        self.pos_embed = nn.Parameter(pos_embed) if use_pos_embed else None
        self.patch_embed = PatchEmbed(
            self.img_size,
            self.patch_size,
            in_chans,
            embed_dim,
            mean=mean,
            std=std,
            backend=backend,
            device=device,
            dtype=dtype,
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
                use_gpsa=index < local_up_to_layer,
                locality_strength=locality_strength,
                grid_size=self.grid_size,
                backend=backend,
                device=device,
                dtype=dtype,
            )
            for index, rate in enumerate(drop_path_rates(drop_path_rate, depth))
        )
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS, device=device, dtype=dtype)
        self.fc_norm = nn.Identity()
        self._set_head(num_classes, drop_rate)
        self._init_weights()
        # DistributedDataParallel and weight decay should not meet a parameter that nothing reads.
        self.cls_token.requires_grad_(self.num_prefix_tokens > 0)

    def _embed(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        x = self.pos_drop(x)
        return self._prepend_class_token(x) if self.class_token_block == 0 else x

    def _init_weights(self) -> None:
        """Truncated normals of deviation 0.02, then GPSA's convolutional start (paper §3)."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                self._init_linear(module)
        for module in self.modules():
            if isinstance(module, GPSA):
                module.local_init()

    def _init_linear(self, linear: nn.Linear) -> None:
        nn.init.trunc_normal_(linear.weight, std=0.02)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)

    def _init_head(self, head: nn.Linear) -> None:
        self._init_linear(head)

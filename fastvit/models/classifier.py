# SPDX-License-Identifier: Apache-2.0
"""What ConViT and VisionTransformer share: running the blocks, pooling, the head, feature taps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastvit.layers import PatchEmbed
from fastvit.models.embed import ConvStemEmbed, divide_image

GLOBAL_POOLS = ("token", "avg", "")


class TokenClassifier(nn.Module):
    """Transformer over patch tokens with a linear classifier: the part that models share.

    A subclass sets ``patch_embed``, ``cls_token``, ``pos_embed``, ``pos_drop``, ``blocks``,
    ``norm`` and ``fc_norm``, then calls ``_set_head``; it defines ``_embed`` and ``_init_head``.

    Attributes:
        img_size, patch_size: pixels, as (height, width).
        grid_size: rows and columns of patches.
        embed_dim, num_features, head_hidden_size: token width, under each of timm's names.
        class_token_block: index of the block before which the class token joins the patch
            tokens; for 0, ``_embed`` has joined it already.
    """

    patch_embed: PatchEmbed | ConvStemEmbed
    cls_token: nn.Parameter
    pos_embed: nn.Parameter | None
    blocks: nn.ModuleList
    norm: nn.Module
    fc_norm: nn.Module
    head: nn.Module

    def __init__(
        self,
        *,
        img_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        num_classes: int,
        in_chans: int,
        global_pool: str,
        embed_dim: int,
        depth: int,
        class_token_block: int,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if class_token_block < 0:
            raise ValueError(f"local_up_to_layer must not be negative, got {class_token_block}")
        self.img_size, self.patch_size, self.grid_size = divide_image(img_size, patch_size)
        self.num_patches = math.prod(self.grid_size)
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.depth = depth
        self.class_token_block = class_token_block
        self.num_prefix_tokens = int(class_token_block < depth)
        self.global_pool = self._check_global_pool(global_pool)
        self.num_classes = num_classes

    def _embed(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the tokens that enter the first block (B, N, embed_dim)."""
        raise NotImplementedError

    def _init_weights(self) -> None:
        """Initialise what the model's scheme sets otherwise than PyTorch's layers do."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Initialise every parameter and statistic anew, with the bits of the constructor for the
        same seed: after ``to_empty`` of a model that was built on the meta device.
        """
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        if isinstance(self.head, nn.Linear):
            self._init_head(self.head)
        self._init_weights()

    def _init_head(self, head: nn.Linear) -> None:
        """Initialise a new classifier as the model's scheme says."""
        raise NotImplementedError

    def _check_global_pool(self, global_pool: str) -> str:
        if global_pool not in GLOBAL_POOLS:
            raise ValueError(f"global_pool must be one of {GLOBAL_POOLS}, got {global_pool!r}")
        if global_pool == "token" and not self.num_prefix_tokens:
            raise ValueError(
                f"global_pool='token' needs a class token, but local_up_to_layer="
                f"{self.class_token_block} with depth={self.depth} leaves no block that would "
                f"read it: choose local_up_to_layer < depth, or global_pool='avg' or ''"
            )
        return global_pool

    def _make_head(self, num_classes: int) -> nn.Module:
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {num_classes}")
        if num_classes == 0:
            return nn.Identity()
        like = self.cls_token
        head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
        self._init_head(head)
        return head

    def _prepend_class_token(self, x: Tensor) -> Tensor:
        return torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)

    def _run_blocks(self, x: Tensor, take: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """Embed images and run every block; also keep the outputs of the blocks in ``take``."""
        x = self._embed(x)
        kept = []
        for index, block in enumerate(self.blocks):
            if 0 < index == self.class_token_block:
                x = self._prepend_class_token(x)
            x = block(x)
            if index in take:
                kept.append(x)
        return x, kept

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens after the last block and the final norm.

        Args:
            x: images (B, in_chans, H, W) of the size the model was built for.

        Returns:
            (B, num_prefix_tokens + N, embed_dim); the class token, if any, comes first.

        Raises:
            ValueError: if the images do not have the model's size or channel count.
        """
        return self.norm(self._run_blocks(x)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens and classify them.

        Args:
            x: tokens from ``forward_features`` (B, num_prefix_tokens + N, embed_dim).
            pre_logits: stop before the linear classifier.

        Returns:
            (B, num_classes), or (B, embed_dim) with ``pre_logits`` or without a head; with
            ``global_pool=""`` the token axis stays.
        """
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(dim=1)
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images (B, in_chans, H, W): logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a newly initialised one; 0 classes remove it.

        Args:
            num_classes: classes of the new head.
            global_pool: new pooling, ``"token"``, ``"avg"`` or ``""``; None keeps the present
                one. The final norm stays where the constructor put it.

        Raises:
            ValueError: if ``num_classes`` is negative or the pooling is not possible.
        """
        pool = self.global_pool if global_pool is None else self._check_global_pool(global_pool)
        self.head = self._make_head(num_classes).train(self.training)
        self.num_classes, self.global_pool = num_classes, pool

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Tensor] | list[tuple[Tensor, Tensor]]:
        """Patch tokens after chosen blocks, as timm's method of the same name gives them.

        Args:
            x: images (B, in_chans, H, W).
            n: the last ``n`` blocks, or indices of blocks (negative ones count from the end).
            reshape: maps (B, embed_dim, gh, gw) instead of tokens (B, N, embed_dim).
            return_prefix_tokens: pairs (patch tokens, prefix tokens (B, P, embed_dim)). P is 1
                where the class token has joined and 0 in ConViT's blocks before that.
            norm: apply the final norm.

        Returns:
            One entry per chosen block, in the order of the blocks.

        Raises:
            ValueError: if ``n`` asks for blocks that do not exist.
        """
        indices = self._block_indices(n)
        _, outputs = self._run_blocks(x, indices)
        if norm:
            outputs = [self.norm(y) for y in outputs]
        prefix_lengths = [int(i >= self.class_token_block) for i in indices]
        prefixes = [y[:, :p] for y, p in zip(outputs, prefix_lengths, strict=True)]
        patches = [y[:, p:] for y, p in zip(outputs, prefix_lengths, strict=True)]
        if reshape:
            patches = [y.mT.unflatten(2, self.grid_size).contiguous() for y in patches]
        return list(zip(patches, prefixes, strict=True)) if return_prefix_tokens else patches

    def _block_indices(self, n: int | Sequence[int]) -> list[int]:
        """Resolve ``n`` of ``get_intermediate_layers`` to sorted block indices."""
        if isinstance(n, int):
            if not 0 < n <= self.depth:
                raise ValueError(f"n must be between 1 and the {self.depth} blocks, got {n}")
            return list(range(self.depth - n, self.depth))
        if any(not -self.depth <= i < self.depth for i in n):
            raise ValueError(f"n must index the {self.depth} blocks, got {list(n)}")
        return sorted({i % self.depth for i in n})

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that training recipes exempt from weight decay."""
        return {"pos_embed", "cls_token"}

    def _set_head(self, num_classes: int, drop_rate: float) -> None:
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head(num_classes)

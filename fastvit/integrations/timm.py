# SPDX-License-Identifier: Apache-2.0
"""timm: ConViT, the embeddings and the attention of its vision transformers."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from fastvit import reference
from fastvit.integrations.adapter import Accelerated
from fastvit.integrations.attention import AcceleratedAttention, AcceleratedGPSA
from fastvit.integrations.embedding import (
    AcceleratedEmbedding,
    AcceleratedModel,
    AcceleratedPatchEmbed,
    Unembedded,
)
from fastvit.integrations.stem import AcceleratedStem
from fastvit.layers.children import is_plain


class GPSA(AcceleratedGPSA):
    """A leaf for ``torch.fx``, as timm's is."""

    @classmethod
    def _announce(cls, adapted: type[nn.Module], original: type[nn.Module]) -> None:
        fx = sys.modules.get("timm.layers._fx")
        if fx is not None and fx.is_notrace_module(original):
            fx.register_notrace_module(adapted)


class PatchEmbed(AcceleratedPatchEmbed):
    """timm's, in every output format; padding and its complaints stay timm's."""

    def _fits(self, images: Any) -> bool:
        strict = self.strict_img_size and self.img_size is not None
        return super()._fits(images) and (not strict or self._is_size(images, self.img_size))

    def forward(self, x: Any) -> Any:
        if isinstance(x, Unembedded):
            return x.through(self)
        if not self._fits(x):
            return super().forward(x)
        (height, width), (ph, pw) = x.shape[-2:], self.patch_size  # type: ignore[misc]
        # Of what timm's has, too.
        finish: Any = reference.PatchEmbed._finish
        return finish(self, self._fused(x), (height // ph, width // pw))


class HybridEmbed(AcceleratedModel, AcceleratedEmbedding):
    """The embedding around a ViT_C stem that makes tokens of the right width by itself."""

    _embedding = "backbone"

    @classmethod
    def _refusal(cls, module: Any) -> str | None:
        if not is_plain(module.proj, nn.Identity):
            return f"a {type(module.proj).__name__} follows its backbone"
        return None

    def _last_weight(self) -> Tensor:
        return self.backbone._last_weight()  # type: ignore[union-attr, operator]

    def _fused(self, images: Tensor, **token_parameters: Any) -> Tensor:
        return self.backbone._fused(images, **token_parameters)  # type: ignore[union-attr, operator]

    def _fits(self, images: Any) -> bool:
        return self._completes(images) and self._refusal(self) is None

    def forward(self, x: Any) -> Any:
        # On images, the views that timm makes of the stem's tokens cost nothing.
        return x.through(self) if isinstance(x, Unembedded) else super().forward(x)


class _Model(AcceleratedModel):
    """Models whose class and positions follow ``patch_embed``."""

    _embedding = "patch_embed"

    @classmethod
    def _embedding_refusal(cls, module: Any) -> str | None:
        embed = module.patch_embed
        if not getattr(embed, "flatten", True):
            return f"its embedding gives {embed.output_fmt}"
        if not is_plain(getattr(embed, "norm", _IDENTITY), nn.Identity):
            return "its embedding ends with a norm"
        return None

    def forward_features(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if self._completes(x) and self._refusal(self) is None:
            x = Unembedded(x)
        return super().forward_features(x, *args, **kwargs)  # type: ignore[misc]


_IDENTITY = nn.Identity()


class ConViT(_Model):
    """Adds the positions of the patches; its class token comes later."""

    _note = "with positions"

    @classmethod
    def _refusal(cls, module: Any) -> str | None:
        if not module.use_pos_embed:
            return "it has no positions"
        return cls._embedding_refusal(module)


class VisionTransformer(_Model):
    """Adds class token and positions in ``_pos_embed``."""

    @classmethod
    def _refusal(cls, module: Any) -> str | None:
        if module.pos_embed is None:
            return "it has no learned positions"
        if module.dynamic_img_size:
            return "its positions are resampled to the image"
        if module.reg_token is not None:
            return "it has register tokens"
        return cls._embedding_refusal(module)

    def _pos_embed(self, x: Any) -> Any:
        if not isinstance(x, Unembedded):
            return super()._pos_embed(x)  # type: ignore[misc]
        return self.pos_drop(x.tokens(self.cls_token, self.pos_embed))  # type: ignore[operator, arg-type]


#: By the qualified names of the library's classes.
ADAPTERS: dict[str, type[Accelerated]] = {
    "timm.models.convit.GPSA": GPSA,
    "timm.models.convit.MHSA": AcceleratedAttention,
    "timm.layers.attention.Attention": AcceleratedAttention,
    # Where it was before timm 1.0.17.
    "timm.models.vision_transformer.Attention": AcceleratedAttention,
    "timm.layers.patch_embed.PatchEmbed": PatchEmbed,
    "timm.models.vision_transformer_hybrid.ConvStem": AcceleratedStem,
}
MODELS: dict[str, type[AcceleratedModel]] = {
    "timm.layers.hybrid_embed.HybridEmbed": HybridEmbed,
    "timm.models.convit.ConVit": ConViT,
    "timm.models.vision_transformer.VisionTransformer": VisionTransformer,
}

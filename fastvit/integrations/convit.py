# SPDX-License-Identifier: Apache-2.0
"""The authors' ConViT, whose classes are in a file ``convit.py`` wherever that was put."""

from __future__ import annotations

from typing import Any

from fastvit.integrations.adapter import Accelerated
from fastvit.integrations.attention import AcceleratedAttention, AcceleratedGPSA
from fastvit.integrations.embedding import AcceleratedModel, AcceleratedPatchEmbed, Unembedded


class PatchEmbed(AcceleratedPatchEmbed):
    """Gives tokens of images of one size."""

    def _fits(self, images: Any) -> bool:
        return super()._fits(images) and self._is_size(images, self.img_size)

    def forward(self, x: Any) -> Any:
        if isinstance(x, Unembedded):
            return x.through(self)
        return self._fused(x) if self._fits(x) else super().forward(x)


class VisionTransformer(AcceleratedModel):
    """Adds the positions of the patches; its class token comes later."""

    _embedding = "patch_embed"
    _note = "with positions"

    @classmethod
    def _refusal(cls, module: Any) -> str | None:
        return None if getattr(module, "use_pos_embed", True) else "it has no positions"

    def forward_features(self, x: Any) -> Any:
        if self._completes(x) and self._refusal(self) is None:
            x = Unembedded(x)
        return super().forward_features(x)  # type: ignore[misc]


ADAPTERS: dict[str, type[Accelerated]] = {
    "convit.GPSA": AcceleratedGPSA,
    "convit.MHSA": AcceleratedAttention,
    "convit.PatchEmbed": PatchEmbed,
}
MODELS: dict[str, type[AcceleratedModel]] = {"convit.VisionTransformer": VisionTransformer}

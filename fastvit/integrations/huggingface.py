# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers: the patch embeddings of ViT and DeiT. DeiT has two tokens in front,
one more than the op puts there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastvit.integrations.adapter import Accelerated
from fastvit.integrations.embedding import AcceleratedModel, AcceleratedPatchEmbed


class PatchEmbeddings(AcceleratedPatchEmbed):
    """Older versions take an argument to interpolate, and then run as they are."""

    @classmethod
    def _projection(cls, module: Any) -> nn.Conv2d:
        return module.projection

    def forward(self, pixel_values: Any, *args: Any, **kwargs: Any) -> Any:
        if any((*args, *kwargs.values())) or not self._fits(pixel_values):
            return super().forward(pixel_values, *args, **kwargs)
        return self._fused(pixel_values)


class ViTEmbeddings(AcceleratedModel):
    """Adds class token and positions, unless there is a mask or they are interpolated."""

    _embedding = "patch_embeddings"

    @classmethod
    def _refusal(cls, module: nn.Module) -> str | None:
        return None

    def forward(self, pixel_values: Any, *args: Any, **kwargs: Any) -> Tensor:
        asked = (*args, *kwargs.values())
        usual = all(a is None or a is False for a in asked) and self._completes(pixel_values)
        if not usual or pixel_values.shape[-2:] != tuple(self.image_size):  # type: ignore[arg-type]
            return super().forward(pixel_values, *args, **kwargs)
        patches: Any = self.patch_embeddings
        tokens = patches._tokens(pixel_values, self.cls_token, self.position_embeddings)
        return self.dropout(tokens)  # type: ignore[operator]


_VIT = "transformers.models.vit.modeling_vit"
_DEIT = "transformers.models.deit.modeling_deit"

ADAPTERS: dict[str, type[Accelerated]] = {
    f"{_VIT}.ViTPatchEmbeddings": PatchEmbeddings,
    f"{_DEIT}.DeiTPatchEmbeddings": PatchEmbeddings,
}
MODELS: dict[str, type[AcceleratedModel]] = {f"{_VIT}.ViTEmbeddings": ViTEmbeddings}

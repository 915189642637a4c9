# SPDX-License-Identifier: Apache-2.0
"""torchvision: the vision transformer, with patches or a convolutional stem."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastvit.integrations.embedding import AcceleratedModel
from fastvit.layers.children import is_plain

_MODEL = "torchvision.models.vision_transformer.VisionTransformer"
_ENCODER = "torchvision.models.vision_transformer.Encoder"


class VisionTransformer(AcceleratedModel):
    """Adds the class token itself and the positions in its encoder."""

    _embedding = "conv_proj"

    @classmethod
    def _refusal(cls, module: Any) -> str | None:
        if "_process_input" in module.__dict__:
            return "it was given a _process_input of its own"
        encoder = type(module.encoder)
        if f"{encoder.__module__}.{encoder.__qualname__}" != _ENCODER:
            return f"its encoder is a {encoder.__qualname__}"
        if not is_plain(module.encoder, encoder):
            return "a hook sits on its encoder, or a forward of its own"
        return None

    def forward(self, x: Any) -> Tensor:
        size = (self.image_size, self.image_size)
        if not self._completes(x) or self._refusal(self) is not None or x.shape[-2:] != size:
            return super().forward(x)
        encoder: Any = self.encoder
        embedding: Any = self.conv_proj
        tokens = embedding._tokens(x, self.class_token, encoder.pos_embedding)
        x = encoder.ln(encoder.layers(encoder.dropout(tokens)))
        return self.heads(x[:, 0])  # type: ignore[operator]


MODELS: dict[str, type[AcceleratedModel]] = {_MODEL: VisionTransformer}
#: Convolutions that make patches, by the model and the place in it.
PATCH_CONVOLUTIONS = {_MODEL: "conv_proj"}

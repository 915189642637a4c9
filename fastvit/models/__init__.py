# SPDX-License-Identifier: Apache-2.0
"""The papers' models, built from fastvit's layers, and loading of other libraries' weights."""

from __future__ import annotations

from fastvit.models.checkpoint import LoadReport, load_checkpoint
from fastvit.models.convit import ConViT
from fastvit.models.registry import create_model, list_models
from fastvit.models.vision_transformer import VisionTransformer

__all__ = [
    "ConViT",
    "LoadReport",
    "VisionTransformer",
    "create_model",
    "list_models",
    "load_checkpoint",
]

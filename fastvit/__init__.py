# SPDX-License-Identifier: Apache-2.0
"""Fused GPSA, convolutional stems and patch embedding for vision transformers.

Not Apple's FastViT: this package runs ConViT's gated positional self-attention
(arXiv 2103.10697), ViT_C's convolutional stem (arXiv 2106.14881) and the patch embedding fast,
behind layers with the parameters, keys and numbers of the originals.
"""

from __future__ import annotations

import importlib
from typing import Any

from fastvit._version import __version__

# Where each public name lives; nothing is imported before it is used.
_EXPORTS = {
    "AttentionMap": "fastvit.inspection",
    "ConvStem": "fastvit.layers",
    "GPSA": "fastvit.layers",
    "MHSA": "fastvit.layers",
    "NotAccelerated": "fastvit._report",
    "PatchEmbed": "fastvit.layers",
    "accelerate": "fastvit._accelerate",
    "attention_maps": "fastvit.inspection",
    "backend": "fastvit.ops.backend",
    "create_model": "fastvit.models",
    "info": "fastvit._info",
    "list_models": "fastvit.models",
    "report": "fastvit._accelerate",
    "restore": "fastvit._accelerate",
    "set_backend": "fastvit.ops.backend",
    "supports": "fastvit._supports",
}
_MODULES = ("functional", "layers", "models", "reference", "testing")

__all__ = ["__version__", *_EXPORTS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"fastvit.{name}")
    raise AttributeError(f"module 'fastvit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

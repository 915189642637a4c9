# SPDX-License-Identifier: Apache-2.0
"""The papers' models by name."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any

from fastvit.models.convit import ConViT
from fastvit.models.vision_transformer import VisionTransformer

# Strides and channels of the convolutional stems, arXiv 2106.14881 appendix; the 36GF model
# keeps the stem of 18GF.
_STEM_1GF = {"stem_channels": (24, 48, 96, 192), "stem_strides": (2, 2, 2, 2)}
_STEM_4GF = {"stem_channels": (48, 96, 192, 384), "stem_strides": (2, 2, 2, 2)}
_STEM_18GF = {
    "stem_channels": (64, 128, 128, 256, 256, 512),
    "stem_strides": (2, 2, 1, 2, 1, 2),
}


def _convit(num_heads: int, head_dim: int) -> dict[str, Any]:
    return {"num_heads": num_heads, "embed_dim": num_heads * head_dim}


def _deit(num_heads: int) -> dict[str, Any]:
    return {"num_heads": num_heads, "embed_dim": num_heads * 64}


def _early_convs(
    num_heads: int, depth: int, mlp_ratio: float, stem: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "num_heads": num_heads,
        "embed_dim": num_heads * 64,
        "depth": depth,
        "mlp_ratio": mlp_ratio,
        "weight_init": "early_convs",
        **(stem or {}),
    }


_CONVIT: dict[str, dict[str, Any]] = {
    # arXiv 2103.10697, Table 1
    "convit_tiny": _convit(num_heads=4, head_dim=48),
    "convit_small": _convit(num_heads=9, head_dim=48),
    "convit_base": _convit(num_heads=16, head_dim=48),
    "convit_tiny_plus": _convit(num_heads=4, head_dim=64),
    "convit_small_plus": _convit(num_heads=9, head_dim=64),
    "convit_base_plus": _convit(num_heads=16, head_dim=64),
}

_VISION_TRANSFORMER: dict[str, dict[str, Any]] = {
    # arXiv 2012.12877; the plus sizes are those of arXiv 2103.10697, Table 1
    "deit_tiny": _deit(num_heads=3),
    "deit_small": _deit(num_heads=6),
    "deit_base": _deit(num_heads=12),
    "deit_tiny_plus": _deit(num_heads=4),
    "deit_small_plus": _deit(num_heads=9),
    "deit_base_plus": _deit(num_heads=16),
    # arXiv 2106.14881, section 3
    "vit_p_1gf": _early_convs(num_heads=3, depth=12, mlp_ratio=3.0),
    "vit_p_4gf": _early_convs(num_heads=6, depth=12, mlp_ratio=3.0),
    "vit_p_18gf": _early_convs(num_heads=12, depth=12, mlp_ratio=4.0),
    "vit_p_36gf": _early_convs(num_heads=16, depth=14, mlp_ratio=4.0),
    "vit_c_1gf": _early_convs(num_heads=3, depth=11, mlp_ratio=3.0, stem=_STEM_1GF),
    "vit_c_4gf": _early_convs(num_heads=6, depth=11, mlp_ratio=3.0, stem=_STEM_4GF),
    "vit_c_18gf": _early_convs(num_heads=12, depth=11, mlp_ratio=4.0, stem=_STEM_18GF),
    "vit_c_36gf": _early_convs(num_heads=16, depth=13, mlp_ratio=4.0, stem=_STEM_18GF),
}


def list_models(pattern: str | None = None) -> list[str]:
    """Names that ``create_model`` knows, sorted.

    Args:
        pattern: shell-style pattern such as ``"convit_*"``; None gives all names.
    """
    names = sorted([*_CONVIT, *_VISION_TRANSFORMER])
    return names if pattern is None else fnmatch.filter(names, pattern)


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | Sequence[int] = 224,
    drop_path_rate: float = 0.0,
    global_pool: str = "token",
    backend: str | None = None,
    **kwargs: Any,
) -> ConViT | VisionTransformer:
    """Build a model of the papers' tables, with newly initialised weights.

    Args:
        name: one of ``list_models()``.
        num_classes: classes; 0 leaves the head out.
        in_chans: image channels.
        img_size: pixels, an int or (height, width), divisible by the patch size 16.
        drop_path_rate: stochastic depth of the last block, decaying linearly to 0 at the first.
        global_pool: ``"token"``, ``"avg"`` or ``""``.
        backend: backend of the layers; None follows ``fastvit.set_backend``.
        **kwargs: any other argument of ``ConViT`` or ``VisionTransformer``; wins over what the
            name stands for (``mlp_ratio=3``, say).

    Returns:
        A ``ConViT`` for ``convit_*``, a ``VisionTransformer`` otherwise, in training mode.

    Raises:
        ValueError: if the name is unknown (with the nearest names) or an argument does not fit.
    """
    common = {
        "num_classes": num_classes,
        "in_chans": in_chans,
        "img_size": img_size,
        "drop_path_rate": drop_path_rate,
        "global_pool": global_pool,
        "backend": backend,
    }
    if name in _CONVIT:
        return ConViT(**{**_CONVIT[name], **common, **kwargs})
    if name in _VISION_TRANSFORMER:
        return VisionTransformer(**{**_VISION_TRANSFORMER[name], **common, **kwargs})
    known = list_models()
    nearest = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(nearest)}?" if nearest else f"known are {', '.join(known)}"
    raise ValueError(f"unknown model name {name!r}: {hint}")

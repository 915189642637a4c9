# SPDX-License-Identifier: Apache-2.0
"""The two models of a contest, as rows like those of the papers' tables."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastvit.benchmark.rows import Row, StemLayer, select_rows
from gpu.model_plan import CONVIT, CONVITS, Contest

_DRY = {"embed_dim": 32, "heads": 2, "depth": 2, "mlp_ratio": 2}
_DRY_CHANNELS = (3, 8, 8, 16, 16)


def rows(contest: Contest) -> tuple[Row, Row]:
    """Rows of the pair's first and second family: of one width, depth and heads where both are
    plain transformers of patches, as the papers pair them where a stem takes a block's place.
    """
    if contest.pair == CONVIT:
        names, shape = ("ConViT-S", "DeiT-S"), _DRY
        if contest.size != "dry":
            heads, channels = CONVITS[contest.size]
            shape = {"embed_dim": heads * channels, "heads": heads, "depth": 12, "mlp_ratio": 4}
    else:
        size = "4GF" if contest.size == "dry" else contest.size
        names, shape = (f"ViT_C-{size}", f"ViT_P-{size}"), _DRY if contest.size == "dry" else {}
    first, second = (_sized(name, shape, contest.image_size) for name in names)
    return first, second


def dry_row(name: str) -> Row:
    """A row of the tables, its model so small that a dry run can time it."""
    row = _sized(name, _DRY, 32)
    return dataclasses.replace(row, name=f"{name}, dry run")


def _sized(name: str, shape: dict[str, Any], image_size: int) -> Row:
    (row,) = select_rows([name])
    if not shape:
        return dataclasses.replace(row, image_size=image_size)
    options = {"num_heads" if k == "heads" else k: v for k, v in shape.items()}
    changes: dict[str, Any] = {"stem": _stem(row.stem, shape["embed_dim"])}
    if row.family == "ConViT":
        # All but the last two blocks, as in the paper.
        changes["local_up_to_layer"] = options["local_up_to_layer"] = max(1, shape["depth"] - 2)
    if row.family == "ViT_C":
        options["stem_channels"] = _DRY_CHANNELS[1:]
    return dataclasses.replace(
        row, image_size=image_size, options=tuple(options.items()), **shape, **changes
    )


def _stem(layers: tuple[StemLayer, ...], width: int) -> tuple[StemLayer, ...]:
    """The same layers: of few channels, and of ``width`` after the last."""
    before = _DRY_CHANNELS[: len(layers)]
    return tuple(
        dataclasses.replace(layer, in_ch=inner, out_ch=outer)
        for layer, inner, outer in zip(layers, before, (*before[1:], width), strict=True)
    )

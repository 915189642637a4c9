# SPDX-License-Identifier: Apache-2.0
"""What others published, and what a model predicts: nothing here was measured by this project."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from fastvit.benchmark.pictures.ratios import Series
from figures.models import CONVIT

ROOT = Path(__file__).resolve().parents[2]
_MODELS = ROOT / "fastvit" / "benchmark" / "models.json"
_PUBLISHED = ROOT / "bench" / "published.json"
_CONVITS = {"S": "small", "S+": "small+", "B": "base", "B+": "base+"}


@cache
def published() -> dict[str, Any]:
    """timm's own tables, as far as they hold the two families."""
    return json.loads(_PUBLISHED.read_text("utf-8"))


def published_ratios(table: dict[str, Any]) -> dict[str, float]:
    """ConViT ÷ DeiT by size, of one of the tables."""
    rates = table["images_per_s"]
    return {size: rates["convit"][size] / rates["deit"][size] for size in rates["convit"]}


def paper_ratios(pair: str) -> dict[str, float]:
    """Speed of the first family over the second, by size, as the papers print both."""
    rows = {row["name"]: row["paper"] for row in json.loads(_MODELS.read_text("utf-8"))}
    if pair == CONVIT:
        return {
            size: rows[f"ConViT-{short}"]["images_per_s"] / rows[f"DeiT-{short}"]["images_per_s"]
            for short, size in _CONVITS.items()
        }
    return {
        size: rows[f"ViT_P-{size}"]["time_min"] / rows[f"ViT_C-{size}"]["time_min"]
        for size in ("1GF", "4GF", "18GF", "36GF")
    }


def paper_series(pair: str) -> Series:
    """The same for a picture, with the papers' hardware."""
    name = "paper, Quadro GP100" if pair == CONVIT else "paper, training, 8 V100"
    return Series("cited", name, paper_ratios(pair))


def published_series() -> list[Series]:
    """Of timm's tables the newest of one card, eager and compiled."""
    names = {"eager": "timm, RTX 4090", "torch.compile": "timm compiled, RTX 4090"}
    return [
        Series("published", names[table["way"]], published_ratios(table))
        for table in published()["tables"]
        if (table["hardware"], table["mode"]) == ("RTX 4090", "inference")
    ]


def published_table() -> str:
    """All of them, as a block of a document."""
    source = published()
    lines = [
        f"*timm's own benchmarks, images/s at 224 x 224, cited from {source['source']} at "
        f"{source['commit'][:12]}; ConViT ÷ the DeiT of the same name.*",
        "",
        "| hardware | mode | dtype | torch | way | tiny | small | base | file |",
        "| :--- | :--- | :--- | :--- | :--- | ---: | ---: | ---: | :--- |",
    ]
    for table in source["tables"]:
        values = published_ratios(table)
        cells = [table[name] for name in ("hardware", "mode", "dtype", "torch", "way")]
        cells += [f"{values[size]:.2f}" for size in ("tiny", "small", "base")]
        cells.append(f"`{Path(table['file']).name}`")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def published_range() -> str:
    """The range of the eager table of an RTX 4090, for a sentence."""
    (table,) = (t for t in published()["tables"] if "pt291-cu128-4090.csv" in t["file"])
    values = published_ratios(table).values()
    return f"{min(values):.2f} to {max(values):.2f}"


def published_gpu_range() -> str:
    """The range of all tables of GPUs, for a sentence."""
    tables = [t for t in published()["tables"] if t["hardware"].startswith("RTX")]
    values = [value for table in tables for value in published_ratios(table).values()]
    return f"{min(values):.2f} to {max(values):.2f}"

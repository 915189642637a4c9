# SPDX-License-Identifier: Apache-2.0
"""The 31 rows of the papers' tables: what a model is, what the paper printed, what we counted."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

# GPUs of the server that arXiv 2106.14881 normalises batch and time to (Table 2, appendix D), and
# that arXiv 2103.10697 fitted its batches to (section 3, "Training details").
PAPER_GPUS = 8

#: What ``pytest bench/`` runs without ``--benchmark``: every family and layer that fastvit
#: replaces, both head widths, both stem shapes, and one convolutional network.
SMOKE_ROWS = (
    "DeiT-S",
    "ConViT-S",
    "ConViT-S+",
    "ViT_P-1GF",
    "ViT_C-1GF",
    "ViT_C-18GF",
    "RegNetY-1GF",
)


@dataclass(frozen=True)
class StemLayer:
    """One layer in front of the first block or stage."""

    op: str
    kernel: int
    stride: int
    padding: int
    in_ch: int | None = None
    out_ch: int | None = None
    bias: bool | None = None
    norm: str | None = None
    act: str | None = None


@dataclass(frozen=True)
class RegNetConfig:
    """Stages of a RegNet: listed (``depths``, ``widths``) or generated (``depth``, w0, wa, wm)."""

    group_width: int
    bottleneck_multiplier: float
    se_ratio: float
    depths: tuple[int, ...] | None = None
    widths: tuple[int, ...] | None = None
    depth: int | None = None
    w0: int | None = None
    wa: float | None = None
    wm: float | None = None
    head_width: int = 0


@dataclass(frozen=True)
class Paper:
    """Figures as the paper prints them: citations, never measured here.

    ``time_min`` is minutes per ImageNet-1k training epoch on 8 V100 GPUs; ``images_per_s`` is on
    one Quadro GP100 at batch 128; ``batch`` is the training batch over 8 GPUs; errors are top-1 in
    percent after training schedules of 100, 200 and 400 epochs and after ImageNet-21k
    pre-training; ``top1`` and ``top5`` are accuracies in percent.
    """

    flops_b: float
    params_m: float
    batch: int
    acts_m: float | None = None
    time_min: float | None = None
    images_per_s: int | None = None
    error_100: float | None = None
    error_200: float | None = None
    error_400: float | None = None
    error_in21k: float | None = None
    top1: float | None = None
    top5: float | None = None


@dataclass(frozen=True)
class Complexity:
    """What :func:`fastvit.benchmark.counter.count` counts, per image of the row's size."""

    flops: int
    params: int
    acts: int


@dataclass(frozen=True)
class Row:
    """One system of the papers' tables.

    ``fastvit`` is the name for ``fastvit.create_model``, None for a convolutional network.
    ``matched`` says which part of the configuration was chosen to meet the printed figures
    because the authors' is not public ("matched": all of it); None where it is known.
    ``options`` are arguments of ``fastvit.create_model`` beyond what the name stands for: those of
    a model that is in no table.
    """

    name: str
    family: str
    image_size: int
    stem: tuple[StemLayer, ...]
    paper: Paper
    verified: Complexity
    source: str
    fastvit: str | None = None
    embed_dim: int | None = None
    heads: int | None = None
    depth: int | None = None
    mlp_ratio: int | None = None
    qkv_bias: bool | None = None
    local_up_to_layer: int | None = None
    regnet: RegNetConfig | None = None
    matched: str | None = None
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def table(self) -> str:
        """The table that the row stands in."""
        if self.family in ("DeiT", "ConViT"):
            return "ConViT (arXiv 2103.10697), Table 1"
        return "Early Convolutions (arXiv 2106.14881), Table 2"

    @property
    def label(self) -> str:
        """The name, with "matched" where the authors' configuration is unknown."""
        return f"{self.name} ({self.matched})" if self.matched else self.name

    @property
    def batch_per_gpu(self) -> int:
        """Training images per GPU and optimiser step in the paper."""
        return self.paper.batch // PAPER_GPUS


def _row(entry: dict[str, Any]) -> Row:
    nested: dict[str, Any] = {
        "stem": tuple(StemLayer(**layer) for layer in entry["stem"]),
        "paper": Paper(**entry["paper"]),
        "verified": Complexity(**entry["verified"]),
    }
    if "regnet" in entry:
        lists = {k: tuple(v) for k, v in entry["regnet"].items() if isinstance(v, list)}
        nested["regnet"] = RegNetConfig(**{**entry["regnet"], **lists})
    return Row(**{**entry, **nested})


@functools.cache
def load_rows() -> tuple[Row, ...]:
    """All rows, in the order of the papers' tables."""
    text = resources.files("fastvit.benchmark").joinpath("models.json").read_text("utf-8")
    return tuple(_row(entry) for entry in json.loads(text))


def select_rows(patterns: Sequence[str], rows: Sequence[Row] | None = None) -> list[Row]:
    """The rows whose name fits one of the patterns, in the order of the tables.

    Args:
        patterns: names or shell-style patterns such as ``ViT_C-*``; case does not matter.
        rows: what to select from; None: all rows.

    Raises:
        ValueError: a pattern fits no row (the message has the nearest names), or there is none.
    """
    rows = load_rows() if rows is None else rows
    patterns = [p for p in (pattern.strip() for pattern in patterns) if p]
    if not patterns:
        raise ValueError("expected at least one name of a row, got none")
    chosen: set[str] = set()
    for pattern in patterns:
        fitting = {r.name for r in rows if fnmatch.fnmatchcase(r.name.lower(), pattern.lower())}
        if not fitting:
            raise ValueError(f"no row is called {pattern!r}; {_nearest(pattern, rows)}")
        chosen |= fitting
    return [row for row in rows if row.name in chosen]


def _nearest(pattern: str, rows: Sequence[Row]) -> str:
    lowered = {row.name.lower(): row.name for row in rows}
    near = difflib.get_close_matches(pattern.lower(), lowered, n=3, cutoff=0.5)
    if near:
        return f"the nearest names are {', '.join(lowered[name] for name in near)}"
    return f"the rows are {', '.join(row.name for row in rows)}"

# SPDX-License-Identifier: Apache-2.0
"""The papers' tables with our columns, from results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from fastvit.benchmark.result import Result
from fastvit.benchmark.text import NOTHING, Cell, Column, render_markdown, render_text

Groups = list[tuple[str, list[list[Cell]]]]


def epoch_table(results: Sequence[Result], *, markdown: bool = False) -> str:
    """Minutes per ImageNet epoch, under the papers' own columns."""
    columns = [
        Column("model", left=True),
        Column("flops (B)"),
        Column("params (M)"),
        Column("acts (M)"),
        Column("batch"),
        Column("paper"),
        Column("library min"),
        Column("fastvit min"),
        Column("speed-up"),
        Column("steps"),
    ]
    return _render(columns, _grouped(results, _epoch_cells), markdown)


def inference_table(results: Sequence[Result], *, markdown: bool = False) -> str:
    """Inference images per second."""
    columns = [
        Column("model", left=True),
        Column("batch"),
        Column("library images/s"),
        Column("fastvit images/s"),
        Column("speed-up"),
    ]
    return _render(columns, _grouped(results, _inference_cells), markdown)


def citation_table(results: Sequence[Result], *, markdown: bool = False) -> str:
    """The papers' other columns: citations, nothing measured, and how counts deviate from print."""
    columns = [
        Column("model", left=True),
        *map(Column, ("hidden", "MLP", "heads", "blocks")),
        *map(Column, ("err 100", "err 200", "err 400", "err IN-21k", "top-1", "top-5")),
        *map(Column, ("Δ flops", "Δ params", "Δ acts")),
    ]
    return _render(columns, _grouped(results, _citation_cells), markdown)


CITATION_NOTE = (
    "Hidden size, MLP multiplier, heads and blocks are the models'; top-1 errors (%) after 100, "
    "200 and 400 epochs and with ImageNet-21k pre-training are cited from arXiv 2106.14881, "
    "Table 2, top-1 and top-5 accuracies (%) from arXiv 2103.10697, Table 1; a dash stands "
    "where the paper prints none. Last three columns: our count against the printed value."
)


def _render(columns: list[Column], groups: Groups, markdown: bool) -> str:
    return (render_markdown if markdown else render_text)(columns, groups)


def _grouped(results: Sequence[Result], cells: Callable[[Result], list[Cell]]) -> Groups:
    by_table = groupby(results, key=lambda result: result.row.table)
    return [(title, [cells(result) for result in group]) for title, group in by_table]


def _epoch_cells(result: Result) -> list[Cell]:
    row, paper, counted = result.row, result.row.paper, result.counted
    printed = f"{paper.time_min} min" if paper.time_min else f"{paper.images_per_s} images/s"
    return [
        row.label,
        (f"{counted.flops / 1e9:.2f}" if counted else NOTHING, _plain(paper.flops_b)),
        (f"{counted.params / 1e6:.1f}" if counted else NOTHING, _plain(paper.params_m)),
        (f"{counted.acts / 1e6:.1f}" if counted else NOTHING, _plain(paper.acts_m)),
        (str(result.batch), str(paper.batch)),
        printed,
        _minutes(result.minutes_reference),
        _ours(result, _minutes(result.minutes_fastvit)),
        _times(result.speedup),
        str(result.steps) if result.steps else NOTHING,
    ]


def _inference_cells(result: Result) -> list[Cell]:
    return [
        result.row.label,
        str(result.batch),
        _rate(result.images_per_s_reference),
        _ours(result, _rate(result.images_per_s_fastvit)),
        _times(result.inference_speedup),
    ]


def _citation_cells(result: Result) -> list[Cell]:
    row, paper = result.row, result.row.paper
    counted = result.counted or row.verified
    return [
        row.label,
        _plain(row.embed_dim),
        _plain(row.mlp_ratio),
        _plain(row.heads),
        _plain(row.depth),
        _plain(paper.error_100),
        _plain(paper.error_200),
        _plain(paper.error_400),
        _plain(paper.error_in21k),
        _plain(paper.top1),
        _plain(paper.top5),
        _deviation(counted.flops / 1e9, paper.flops_b),
        _deviation(counted.params / 1e6, paper.params_m),
        _deviation(counted.acts / 1e6, paper.acts_m),
    ]


def _ours(result: Result, figure: str) -> str:
    """The figure of the fastvit model, or the word that stands in its place."""
    return figure if result.status == "ok" else result.status


def _plain(value: Any) -> str:
    """A printed figure with the paper's own digits."""
    return NOTHING if value is None else str(value)


def _minutes(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _rate(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}x"


def _deviation(counted: float, printed: float | None) -> str:
    if printed is None:
        return NOTHING
    percent = f"{100 * (counted / printed - 1):+.1f} %"
    return percent.replace("-0.0", "+0.0")

# SPDX-License-Identifier: Apache-2.0
"""Minutes per ImageNet epoch, a line for each model: library, fastvit, and the papers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastvit.benchmark.pictures.theme import (
    LIGHT,
    PLAIN,
    SMALL,
    NothingToDraw,
    Theme,
    canvas,
    head,
    plain_axes,
    plain_numbers,
    to_svg,
    wrapped,
)

#: Inches of a line.
_LINE = 0.225
#: Where columns of text end, and the axes between them, as parts of the width.
_SPEEDUP, _PAPER, _LEFT, _RIGHT = 0.985, 0.885, 0.215, 0.79
#: Papers' minutes within this factor of what was measured share its axis.
_NEAR = 8.0


class Line(NamedTuple):
    """One model. Minutes that were not measured are None, and ``remark`` says why."""

    label: str
    library: float | None
    fastvit: float | None
    #: Of the paper: minutes of training, if it prints those, and its column as text.
    paper: float | None
    printed: str
    remark: str
    failed: bool = False


def from_row(row: Mapping[str, Any]) -> Line:
    """A row of ``epoch.json``."""
    paper, speedup = row["paper"], row["speedup"]
    minutes = paper["time_min"]
    if row["status"] != "ok":
        remark = row["status"]
    else:
        remark = "library only" if speedup is None else f"{speedup:.2f}x"
    return Line(
        f"{row['name']} ({row['matched']})" if row["matched"] else row["name"],
        row["minutes_reference"],
        row["minutes_fastvit"],
        minutes,
        f"{minutes} min" if minutes else f"{paper['images_per_s']} images/s",
        remark,
        failed=row["status"] != "ok",
    )


def epoch_svg(
    rows: Sequence[Line], lines: Sequence[str], *, theme: Theme = LIGHT, dry: bool = False
) -> str:
    """The picture as text; arguments as of :func:`draw`."""
    return to_svg(lambda theme: draw(rows, lines, theme, dry=dry), theme)


def draw(rows: Sequence[Line], lines: Sequence[str], theme: Theme, *, dry: bool = False) -> Any:
    """Library hollow, fastvit filled, the papers' minutes as diamonds.

    The papers' have an axis of their own where theirs are far from those measured.

    Args:
        lines: what was measured on and how.

    Raises:
        NothingToDraw: there are no rows.
    """
    if not rows:
        raise NothingToDraw("no row of the papers' tables was measured")
    height = 1.05 + 0.16 * len(wrapped(lines)) + _LINE * len(rows)
    figure = canvas(theme, height)
    top = head(figure, theme, "Minutes per ImageNet epoch", lines, dry=dry) + 0.2
    measured = [m for row in rows for m in (row.library, row.fastvit) if m is not None]
    papers = [row.paper for row in rows if row.paper is not None]
    apart = bool(measured and papers) and not _near(measured, papers)
    split = _LEFT + 0.3 * (_RIGHT - _LEFT) if apart else _LEFT
    box = (0.42 / height, 1 - (top + 0.52) / height)
    axes = figure.add_axes((split, box[0], _RIGHT - split, box[1]))
    beside = figure.add_axes((_LEFT, box[0], split - _LEFT - 0.02, box[1])) if apart else axes
    for each in {id(a): a for a in (axes, beside)}.values():
        _frame(each, theme, rows)
    _draw(axes, beside, theme, rows)
    if not (measured or papers):
        axes.set_xlim(1, 10)
    for each in (axes, beside):
        plain_numbers(each.xaxis, most=5)
    if apart:
        axes.set_yticks([])
        beside.set_xlabel("papers, 8 V100", color=theme.cited, fontsize=SMALL)
    axes.set_xlabel("minutes, logarithmic; less is better", color=theme.ink, fontsize=SMALL)
    beside.set_yticks(range(len(rows)), [row.label for row in rows])
    _heads(figure, theme, 1 - top / height)
    return figure


def _near(measured: Sequence[float], papers: Sequence[float]) -> bool:
    return min(measured) <= _NEAR * max(papers) and min(papers) <= _NEAR * max(measured)


def _frame(axes: Any, theme: Theme, rows: Sequence[Line]) -> None:
    plain_axes(axes, theme, grid="x")
    axes.set_xscale("log")
    axes.set_ylim(len(rows) - 0.4, -0.6)


def _draw(axes: Any, beside: Any, theme: Theme, rows: Sequence[Line]) -> None:
    for y, row in enumerate(rows):
        if row.paper is not None:
            beside.plot(row.paper, y, "D", markersize=4, color=theme.cited, zorder=3)
        if row.library is not None:
            axes.plot(
                row.library, y, "o", markersize=6.5, markerfacecolor=theme.paper,
                markeredgecolor=theme.peer, markeredgewidth=1.5, zorder=4,
            )  # fmt: skip
        if row.library is not None and row.fastvit is not None:
            axes.plot([row.library, row.fastvit], [y, y], color=theme.peer, linewidth=1.2)
        if row.fastvit is not None:
            axes.plot(row.fastvit, y, "o", markersize=6, color=theme.ours, zorder=5)
        columns = ((_PAPER, row.printed, theme.cited), (_SPEEDUP, row.remark, _tone(row, theme)))
        for x, text, colour in columns:
            where = (x - axes.get_position().x0) / axes.get_position().width
            axes.text(
                where, y, text, transform=axes.get_yaxis_transform(), ha="right", va="center",
                color=colour, fontsize=SMALL,
            )  # fmt: skip
    for each in (axes, beside):
        each.margins(x=0.06)


def _tone(row: Line, theme: Theme) -> str:
    if row.failed:
        return theme.alarm
    return theme.ink if row.fastvit is not None else theme.muted


def _heads(figure: Any, theme: Theme, y: float) -> None:
    style = {"fontsize": PLAIN, "weight": "bold", "va": "center"}
    figure.text(_LEFT, y, "○ library", color=theme.muted, **style)
    figure.text(_LEFT + 0.11, y, "● fastvit", color=theme.ours, **style)
    figure.text(_LEFT + 0.22, y, "◆ paper, 8 V100", color=theme.cited, **style)
    figure.text(_PAPER, y, "paper", color=theme.cited, ha="right", **style)
    figure.text(_SPEEDUP, y, "speed-up", color=theme.ink, ha="right", **style)

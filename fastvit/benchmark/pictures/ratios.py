# SPDX-License-Identifier: Apache-2.0
"""ConViT ÷ DeiT and ViT_C ÷ ViT_P as bars: what papers and tables say, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
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
    to_svg,
    wrapped,
)

#: Inches of a bar and between groups.
_BAR, _GAP = 0.165, 0.16
#: Names of what a bar can be: cited from a paper or a table, the library here, fastvit here.
KINDS = ("cited", "published", "library", "fastvit")


class Series(NamedTuple):
    """Ratios by group, and whose they are; ``kind`` is one of :data:`KINDS`."""

    kind: str
    #: With the hardware, short enough to stand beside a bar.
    name: str
    values: dict[str, float]


class Panel(NamedTuple):
    """One pair of models: groups of bars, one group a size."""

    title: str
    groups: Sequence[str]
    series: Sequence[Series]


def ratios_svg(
    panels: Sequence[Panel], lines: Sequence[str], *, theme: Theme = LIGHT, dry: bool = False
) -> str:
    """The picture as text; arguments as of :func:`draw`."""
    return to_svg(lambda theme: draw(panels, lines, theme, dry=dry), theme)


def draw(panels: Sequence[Panel], lines: Sequence[str], theme: Theme, *, dry: bool = False) -> Any:
    """One panel beside the other, each bar with its value and whose it is.

    Args:
        lines: what was measured on and how.

    Raises:
        NothingToDraw: no series has a value.
    """
    panels = [panel for panel in panels if any(_bars(panel, g) for g in panel.groups)]
    if not panels:
        raise NothingToDraw("there are no ratios")
    tallest = max(_inches(panel) for panel in panels)
    height = tallest + 0.95 + 0.16 * len(wrapped(lines))
    figure = canvas(theme, height)
    title = "Images/s of one model over those of the other (1.00: the same speed)"
    top = head(figure, theme, title, lines, dry=dry)
    bottom = 0.3
    width = 0.985 / len(panels)
    for column, panel in enumerate(panels):
        left = 0.015 + column * width
        axes = figure.add_axes((left + 0.055, bottom / height, width - 0.07, tallest / height))
        _panel(axes, theme, panel, tallest)
        figure.text(
            left, 1 - (top + 0.2) / height, panel.title, color=theme.ink, fontsize=PLAIN,
            weight="bold", va="center",
        )  # fmt: skip
    return figure


def _bars(panel: Panel, group: str) -> list[tuple[Series, float]]:
    return [(s, s.values[group]) for s in panel.series if group in s.values]


def _inches(panel: Panel) -> float:
    groups = [len(_bars(panel, group)) for group in panel.groups]
    return sum(_BAR * bars + _GAP for bars in groups if bars)


def _panel(axes: Any, theme: Theme, panel: Panel, inches: float) -> None:
    plain_axes(axes, theme, grid="x")
    axes.set_ylim(inches, 0.0)
    values = [value for group in panel.groups for _, value in _bars(panel, group)]
    # The words beside a bar take as much room as a bar of 1.
    axes.set_xlim(0.0, max(1.0, *values) + 1.05)
    axes.set_xticks([0.0, 0.25, 0.5, 0.75, 1.0])
    axes.axvline(1.0, color=theme.ink, linewidth=1.0, zorder=1)
    colours = dict(zip(KINDS, (theme.cited, theme.published, theme.peer, theme.ours), strict=True))
    ticks, y = [], 0.0
    for group in panel.groups:
        bars = _bars(panel, group)
        if not bars:
            continue
        ticks.append((y + _BAR * len(bars) / 2, group))
        for series, value in bars:
            middle = y + _BAR / 2
            axes.barh(middle, value, height=0.8 * _BAR, color=colours[series.kind], zorder=3)
            weight = "bold" if series.kind == "fastvit" else "normal"
            # In paper's colour behind, so that the line at 1 does not cross the words.
            axes.text(
                value + 0.02, middle, f"{value:.2f} {series.name}", va="center", color=theme.ink,
                fontsize=SMALL, weight=weight, zorder=4,
                bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 0.6},
            )  # fmt: skip
            y += _BAR
        y += _GAP
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])

# SPDX-License-Identifier: Apache-2.0
"""Time of one image against the number of tokens, the batch and the resolution."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastvit.benchmark.pictures.labels import Label, place
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


class Line(NamedTuple):
    """Seconds of one image by what a panel varies; ``ours`` decides how it is drawn."""

    name: str
    ours: bool
    points: Sequence[tuple[float, float]]


class Panel(NamedTuple):
    """What is varied, named at the axis, and lines over it."""

    title: str
    axis: str
    lines: Sequence[Line]


def scaling_svg(
    panels: Sequence[Panel], lines: Sequence[str], *, theme: Theme = LIGHT, dry: bool = False
) -> str:
    """The picture as text; arguments as of :func:`draw`."""
    return to_svg(lambda theme: draw(panels, lines, theme, dry=dry), theme)


def draw(panels: Sequence[Panel], lines: Sequence[str], theme: Theme, *, dry: bool = False) -> Any:
    """Panels beside each other with both axes logarithmic; one without data says so.

    Args:
        lines: what was measured on and how.

    Raises:
        NothingToDraw: no panel has a line.
    """
    if not any(line.points for panel in panels for line in panel.lines):
        raise NothingToDraw("no times over tokens, batch or resolution")
    height = 3.4 + 0.16 * len(wrapped(lines))
    figure = canvas(theme, height)
    top = head(figure, theme, "Time of one image, µs", lines, dry=dry)
    width = 0.985 / len(panels)
    for column, panel in enumerate(panels):
        left = 0.015 + column * width
        axes = figure.add_axes(
            (left + 0.05, 0.45 / height, width - 0.065, 1 - (top + 0.8) / height)
        )
        plain_axes(axes, theme)
        figure.text(
            left, 1 - (top + 0.2) / height, panel.title, color=theme.ink, fontsize=PLAIN,
            weight="bold", va="center",
        )  # fmt: skip
        axes.set_xlabel(panel.axis, color=theme.ink, fontsize=SMALL)
        _panel(axes, theme, panel)
    return figure


def _panel(axes: Any, theme: Theme, panel: Panel) -> None:
    found = [line for line in panel.lines if line.points]
    if not found:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(
            0.5, 0.5, "not measured", color=theme.muted, fontsize=PLAIN, ha="center",
            transform=axes.transAxes,
        )  # fmt: skip
        return
    axes.set_xscale("log")
    axes.set_yscale("log")
    xs = sorted({x for line in found for x, _ in line.points})
    ys = [y * 1e6 for line in found for _, y in line.points]
    span = max(xs) / min(xs)
    # Room for the labels: on the right of the last points, above and below.
    axes.set_xlim(min(xs) / max(span**0.12, 1.15), max(xs) * max(span**0.12, 1.15))
    reach = max((max(ys) / min(ys)) ** 0.35, 1.9)
    axes.set_ylim(min(ys) / reach, max(ys) * reach)
    plain_numbers(axes.yaxis)
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.set_xticks([], minor=True)
    labels: list[Label] = []
    marks: list[tuple[float, float]] = []
    drawn: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for line in found:
        points = [(x, 1e6 * y) for x, y in sorted(line.points)]
        colour = theme.ours if line.ours else theme.peer
        face = colour if line.ours else theme.paper
        axes.plot(
            *zip(*points, strict=True), "o-", color=colour, linewidth=1.5, markersize=5,
            markerfacecolor=face, markeredgewidth=1.3, zorder=4 if line.ours else 3,
        )  # fmt: skip
        x, y = points[-1]
        labels.append(Label(x, y, line.name, theme.ours if line.ours else theme.ink))
        marks += points
        drawn += itertools.pairwise(points)
    place(axes, theme, labels, marks, drawn)

# SPDX-License-Identifier: Apache-2.0
"""A roofline: what was reached of the measured ceilings, by what a problem offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastvit.benchmark.pictures.labels import Label, place
from fastvit.benchmark.pictures.theme import (
    LIGHT,
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


class Point(NamedTuple):
    """One problem: its necessary work, our time for it, and that of the fastest other way.

    ``bytes`` and ``flops`` are those of the floor; ``ours`` and ``theirs`` are seconds. Without a
    peer ``theirs`` is None.
    """

    label: str
    bytes: float
    flops: float
    ours: float
    peer: str = ""
    theirs: float | None = None


class Roof(NamedTuple):
    """Measured ceilings: bytes/s, and FLOP/s of matrix products by arithmetic."""

    bandwidth: float
    rates: dict[str, float]


def roofline_svg(
    title: str, points: Sequence[Point], roof: Roof | None, lines: Sequence[str], *,
    theme: Theme = LIGHT, dry: bool = False,
) -> str:  # fmt: skip
    """The picture as text; arguments as of :func:`draw`."""
    return to_svg(lambda theme: draw(title, points, roof, lines, theme, dry=dry), theme)


def draw(
    title: str, points: Sequence[Point], roof: Roof | None, lines: Sequence[str], theme: Theme, *,
    dry: bool = False,
) -> Any:  # fmt: skip
    """Ours filled, the fastest other way hollow below or above it, labels at the points.

    Args:
        roof: None where no ceilings were measured: there is no picture without them.
        lines: what was measured on and how.

    Raises:
        NothingToDraw: there are no points, or no ceilings.
    """
    if not points:
        raise NothingToDraw("no such problem was timed")
    if roof is None or not roof.rates:
        raise NothingToDraw("the ceilings are not known")
    height = 4.9 + 0.16 * len(wrapped(lines))
    figure = canvas(theme, height)
    top = head(figure, theme, title, lines, dry=dry)
    axes = figure.add_axes((0.075, 0.47 / height, 0.91, 1 - (top + 0.6) / height))
    plain_axes(axes, theme)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _limits(axes, points, roof)
    plain_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)
    axes.set_xlabel("FLOP a byte that has to be moved", color=theme.ink, fontsize=SMALL)
    axes.set_ylabel("TFLOP/s of the necessary work", color=theme.ink, fontsize=SMALL)
    labels = _draw_roof(axes, theme, roof)
    marks, pairs = [], []
    for point in points:
        x, ours = point.flops / point.bytes, point.flops / point.ours / 1e12
        text = point.label
        if point.theirs is not None:
            theirs = point.flops / point.theirs / 1e12
            axes.plot([x, x], [ours, theirs], color=theme.muted, linewidth=1.0, zorder=2)
            axes.plot(
                x, theirs, "o", markersize=6, markerfacecolor=theme.paper,
                markeredgecolor=theme.peer, markeredgewidth=1.4, zorder=3,
            )  # fmt: skip
            marks.append((x, theirs))
            pairs.append(((x, ours), (x, theirs)))
            text += f": {point.theirs / point.ours:.2f}x {point.peer}"
        axes.plot(x, ours, "o", markersize=6.5, color=theme.ours, zorder=4)
        marks.append((x, ours))
        labels.append(Label(x, ours, text, theme.ink))
    place(axes, theme, labels, marks, [*pairs, *_roof_lines(axes, roof)])
    style = {"fontsize": SMALL, "va": "center"}
    words = "○ fastest other way (1.20x: that many times our time)"
    figure.text(0.075, 1 - (top + 0.03) / height, "● fastvit", color=theme.ours, **style)
    figure.text(0.155, 1 - (top + 0.03) / height, words, color=theme.muted, **style)
    return figure


def _limits(axes: Any, points: Sequence[Point], roof: Roof) -> None:
    intensities = [point.flops / point.bytes for point in points]
    speeds = [p.flops / t for p in points for t in (p.ours, p.theirs) if t is not None]
    best = max(roof.rates.values())
    ridge = best / roof.bandwidth
    # The ridge belongs into the picture, else one of the two ceilings has no place.
    axes.set_xlim(min(*intensities, ridge) / 2.2, max(*intensities, ridge) * 2.6)
    axes.set_ylim(min(speeds) / 1e12 / 2.5, max(best, *speeds) / 1e12 * 2.2)


def _roof_lines(axes: Any, roof: Roof) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The slope of the bandwidth up to the highest rate, and each rate."""
    low, high = axes.get_xlim()
    ridge = max(roof.rates.values()) / roof.bandwidth
    slope = ((low, low * roof.bandwidth / 1e12), (ridge, ridge * roof.bandwidth / 1e12))
    flats = [
        ((rate / roof.bandwidth, rate / 1e12), (high, rate / 1e12)) for rate in roof.rates.values()
    ]
    return [slope, *flats]


def _draw_roof(axes: Any, theme: Theme, roof: Roof) -> list[Label]:
    slope, *flats = _roof_lines(axes, roof)
    for (a, b), (c, d) in (slope, *flats):
        axes.plot([a, c], [b, d], color=theme.ink, linewidth=1.4, zorder=1)
    low, high = axes.get_xlim()
    floor = axes.get_ylim()[0]
    # Where the slope enters the picture, from the left or from below.
    seen = max(low * 1.3, 1.6 * floor * 1e12 / roof.bandwidth)
    found = [
        Label(seen, seen * roof.bandwidth / 1e12, f"{roof.bandwidth / 1e12:.3g} TB/s", theme.cited)
    ]
    for name, rate in roof.rates.items():
        text = f"{rate / 1e12:.3g} TFLOP/s, {name}"
        found.append(Label(high / 1.5, rate / 1e12, text, theme.cited))
    return found

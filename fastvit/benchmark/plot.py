# SPDX-License-Identifier: Apache-2.0
"""The epoch table as a picture: one line per model, minutes on a logarithmic axis."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from fastvit.benchmark.result import Result

# The panel brings its own light background, so that it reads the same on a dark page.
_PAPER = "#ffffff"
_INK = "#1f2328"
_MUTED = "#656d76"
_GRID = "#d8dee4"
_LIBRARY = "#8c959f"
_FASTVIT = "#0969da"

# Inches: a README shows about 8.3 at 100 dots per inch.
_WIDTH = 8.3
_LINE = 0.235


def epoch_svg(results: Sequence[Result], machine_line: str) -> str:
    """Dot plot of minutes per epoch, library hollow and fastvit filled, as SVG.

    Rows without figures are named and say why. The same results give the same bytes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style = {"font.size": 9.5, "svg.hashsalt": "fastvit", "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(style):
        height = 1.45 + _LINE * max(len(results), 1)
        figure = Figure(figsize=(_WIDTH, height), facecolor=_PAPER)
        axes = figure.add_axes((0.265, 0.55 / height, 0.61, 1 - 1.3 / height), facecolor=_PAPER)
        _draw_rows(axes, results)
        _label(figure, axes, height, machine_line)
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def _draw_rows(axes: Any, results: Sequence[Result]) -> None:
    axes.set_xscale("log")
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.set_yticks(range(len(results)), [result.row.label for result in results])
    margin = axes.get_yaxis_transform()
    for y, result in enumerate(results):
        library, ours = result.minutes_reference, result.minutes_fastvit
        if library is not None:
            axes.plot(
                library, y, "o", markersize=6.5, markerfacecolor=_PAPER,
                markeredgecolor=_LIBRARY, markeredgewidth=1.6, zorder=3,
            )  # fmt: skip
        if library is not None and ours is not None:
            axes.plot([library, ours], [y, y], color=_LIBRARY, linewidth=1.2, zorder=2)
            axes.plot(ours, y, "o", markersize=6.5, color=_FASTVIT, zorder=4)
        remark, colour = _remark(result)
        axes.text(1.015, y, remark, transform=margin, va="center", color=colour)
    if any(result.minutes_reference for result in results):
        axes.margins(x=0.04)
    else:
        axes.set_xlim(1, 10)


def _remark(result: Result) -> tuple[str, str]:
    if result.status != "ok":
        return result.status, "#cf222e"
    if result.speedup is not None:
        return f"{result.speedup:.2f}x", _INK
    return "library only", _MUTED


def _label(figure: Any, axes: Any, height: float, machine_line: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(colors=_INK, length=0)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("minutes per ImageNet epoch (log scale, less is better)", color=_INK)
    top = 1 - 0.22 / height
    figure.text(0.02, top, "Minutes per ImageNet epoch", color=_INK, weight="bold", va="center")
    figure.text(0.55, top, "○ library", color=_MUTED, weight="bold", va="center")
    figure.text(0.67, top, "● fastvit", color=_FASTVIT, weight="bold", va="center")
    figure.text(0.985, top, "speed-up", color=_INK, weight="bold", va="center", ha="right")
    figure.text(
        0.02, 1 - 0.48 / height, machine_line.replace(" | ", " · "),
        color=_MUTED, fontsize=7, va="center",
    )  # fmt: skip

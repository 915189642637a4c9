# SPDX-License-Identifier: Apache-2.0
"""Colours of the two variants of a picture, its head, and how it becomes text."""

from __future__ import annotations

import contextlib
import io
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvit.benchmark.files import write_text

#: Inches; a README shows about 830 pixels.
WIDTH = 8.3
#: Points. At 830 pixels for the width, 7 points are 9.7 pixels: nothing is smaller.
SMALL, PLAIN, LARGE = 7.0, 8.0, 10.0
#: Inches of a line of the head.
_LINE = 0.16

DRY = "dry run, not a measurement"


class NothingToDraw(ValueError):
    """There is no data for a picture; the message says what is missing, as a sentence."""


@dataclass(frozen=True)
class Theme:
    """One variant. It brings its own background, and so reads the same on any page."""

    suffix: str
    paper: str
    ink: str
    muted: str
    grid: str
    ours: str
    peer: str
    #: What others have published: papers, and tables.
    cited: str
    published: str
    alarm: str


LIGHT = Theme(
    suffix="", paper="#ffffff", ink="#1f2328", muted="#59636e", grid="#d8dee4", ours="#0969da",
    peer="#818b98", cited="#9a6700", published="#bf8700", alarm="#cf222e",
)  # fmt: skip
DARK = Theme(
    suffix="-dark", paper="#0d1117", ink="#e6edf3", muted="#9198a1", grid="#30363d",
    ours="#4493f8", peer="#818b98", cited="#d29922", published="#9e6a03", alarm="#f85149",
)  # fmt: skip

#: Draws one variant.
Draw = Callable[[Theme], Any]


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Settings of matplotlib under which pictures are drawn and written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    settings = {"font.size": PLAIN, "font.family": "DejaVu Sans", "svg.hashsalt": "fastvit"}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **settings}):
        yield


def canvas(theme: Theme, height: float) -> Any:
    """An empty figure of so many inches, with a renderer that measures text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=100, facecolor=theme.paper)
    FigureCanvasAgg(figure)
    return figure


def wrapped(lines: Sequence[str]) -> list[str]:
    """Lines as they fit under a title."""
    return [part for line in lines for part in textwrap.wrap(line, 160)]


def head(figure: Any, theme: Theme, title: str, lines: Sequence[str], *, dry: bool) -> float:
    """Title and lines below it; the inches that they take from the top.

    Args:
        lines: what was measured on and how.
        dry: whether the data is that of a dry run, which the picture says itself.
    """
    height = figure.get_figheight()

    def text(x: float, inches: float, words: str, **how: Any) -> None:
        figure.text(x, 1 - inches / height, words, va="center", **how)

    text(0.015, 0.16, title, color=theme.ink, fontsize=LARGE, weight="bold")
    if dry:
        text(0.985, 0.16, DRY, color=theme.alarm, fontsize=LARGE, weight="bold", ha="right")
    shown = wrapped(lines)
    for number, line in enumerate(shown):
        text(0.015, 0.36 + _LINE * number, line, color=theme.muted, fontsize=SMALL)
    return 0.36 + _LINE * len(shown)


def plain_axes(axes: Any, theme: Theme, *, grid: str = "both") -> None:
    """No frame, no tick marks, and a grid behind the data."""
    axes.set_facecolor(theme.paper)
    axes.tick_params(which="both", colors=theme.ink, length=0, labelsize=SMALL)
    axes.grid(axis=grid, color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def plain_numbers(axis: Any, *, most: int = 8) -> None:
    """Ticks of a logarithmic axis as numbers, at most so many. The limits stand before."""
    low, high = sorted(axis.get_view_interval())
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [d * 10.0**power for power in powers for d in digits]
        # A tick at the edge would have its number outside.
        ticks = [tick for tick in ticks if low * 1.01 <= tick <= high / 1.01]
        if len(ticks) <= most:
            break
    axis.set_ticks(ticks[:: -(-len(ticks) // most) or 1], minor=False)
    shown = [f"{t:,.10g}" if t >= 1e-4 else f"{t:g}" for t in axis.get_ticklocs()]
    axis.set_ticklabels(shown)
    axis.set_ticks([], minor=True)


def to_svg(draw: Draw, theme: Theme = LIGHT) -> str:
    """One variant as text.

    Raises:
        ImportError: matplotlib is not installed.
        NothingToDraw: there is no data for it.
    """
    with style():
        figure = draw(theme)
        content = io.StringIO()
        figure.savefig(content, format="svg", facecolor=theme.paper, metadata={"Date": None})
    return content.getvalue()


def variants(name: str, draw: Draw) -> dict[str, str]:
    """Both variants as text, by name of file."""
    return {f"{name}{theme.suffix}.svg": to_svg(draw, theme) for theme in (LIGHT, DARK)}


def write(folder: Path, name: str, draw: Draw) -> list[Path]:
    """Both variants as files; their paths."""
    return [write_text(folder / file, text) for file, text in variants(name, draw).items()]


def shown(path: str, alt: str) -> str:
    """HTML that shows the variant for the reader's colours.

    Args:
        path: of the light variant, without its ending, from where the text stands.
    """
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{path}{DARK.suffix}.svg">'
        f'<img src="{path}.svg" alt="{alt}"></picture>'
    )

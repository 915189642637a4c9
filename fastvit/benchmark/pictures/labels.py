# SPDX-License-Identifier: Apache-2.0
"""Places for labels, so that none covers another, a point, or leaves its axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastvit.benchmark.pictures.theme import SMALL, Theme

#: Pixels: how far a point reaches, how far labels keep from each other, where a line is drawn, and
#: how far apart the boxes lie that stand for a line.
_POINT, _APART, _LEADER, _STEP = 6.0, 3.0, 18.0, 4.0

Pixel = tuple[float, float]
#: Left, bottom, right, top in pixels.
Box = tuple[float, float, float, float]


class Label(NamedTuple):
    """Text for the point (x, y) in data coordinates."""

    x: float
    y: float
    text: str
    colour: str


def place(
    axes: Any, theme: Theme, labels: Sequence[Label], points: Sequence[tuple[float, float]],
    lines: Sequence[tuple[tuple[float, float], tuple[float, float]]] = (),
) -> None:  # fmt: skip
    """Write each label as near to its point as there is room, with a line to it where it is far.

    Args:
        points: of the picture, in data coordinates; labels do not cover them.
        lines: from point to point; labels cover them only if there is no other room.
    """
    renderer = axes.figure.canvas.get_renderer()
    # The limits of the axes must stand before pixels mean anything.
    axes.figure.draw_without_rendering()
    to_pixels, to_data = axes.transData.transform, axes.transData.inverted().transform
    room = _Room(axes.get_window_extent(renderer).extents, [to_pixels(p) for p in points])
    for start, end in lines:
        room.lines += _steps(to_pixels(start), to_pixels(end))
    # Those at the right edge have the least room.
    for label in sorted(labels, key=lambda label: -label.x):
        point = tuple(to_pixels((label.x, label.y)))
        text = axes.text(
            label.x, label.y, label.text, color=label.colour, fontsize=SMALL, zorder=6,
            ha="center", va="center",
        )  # fmt: skip
        extent = text.get_window_extent(renderer)
        box = room.best(point, extent.width + 2 * _APART, extent.height + 2 * _APART)
        text.set_position(to_data(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)))
        room.labels.append(box)
        end = _nearest(box, point)
        if math.dist(end, point) > _LEADER:
            (a, b), (c, d) = to_data(end), (label.x, label.y)
            axes.plot([a, c], [b, d], color=theme.muted, linewidth=0.6, zorder=2)
            room.lines += _steps(end, point)


class _Room:
    """What is in the axes already."""

    def __init__(self, frame: Box, points: Sequence[Pixel]) -> None:
        self.frame: Box = tuple(frame)  # type: ignore[assignment]
        self.marks: list[Box] = [
            (x - _POINT, y - _POINT, x + _POINT, y + _POINT) for x, y in points
        ]
        self.labels: list[Box] = []
        self.lines: list[Box] = []

    def best(self, point: Pixel, width: float, height: float) -> Box:
        """The place of least cost for a label, among rings around its point."""
        least, best = math.inf, self.frame
        for ring in range(26):
            gap = 8.0 + 9.0 * ring
            # Nothing farther away costs less.
            if gap > least:
                break
            for turn in range(24):
                angle = 2 * math.pi * turn / 24
                x = point[0] + math.cos(angle) * (gap + width / 2)
                y = point[1] + math.sin(angle) * (gap + height / 2)
                box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
                # To the right and above reads best.
                cost = gap + (math.cos(angle) < 0) / 2 + (math.sin(angle) < 0) / 4
                cost += self._covered(box)
                if cost < least:
                    cost += self._crossed(box, point)
                if cost < least:
                    least, best = cost, box
        return best

    def _covered(self, box: Box) -> float:
        outside = _width(box) * _height(box) - _common([box], [self.frame])
        return (
            100 * (outside + _common([box], self.marks) + _common([box], self.labels))
            + 4 * _common([box], self.lines)
        )  # fmt: skip

    def _crossed(self, box: Box, point: Pixel) -> float:
        """What the line to a label would cross."""
        end = _nearest(box, point)
        if math.dist(end, point) <= _LEADER:
            return 0.0
        own = [(point[0] - 1, point[1] - 1, point[0] + 1, point[1] + 1)]
        others = [mark for mark in self.marks if not _common([mark], own)]
        # At its own point it meets that point's lines.
        leader = _steps(end, point)[:-2]
        return 10 * _common(leader, [*self.labels, *others, *self.lines])


def _width(box: Box) -> float:
    return box[2] - box[0]


def _height(box: Box) -> float:
    return box[3] - box[1]


def _nearest(box: Box, point: Pixel) -> Pixel:
    """Where a line from a point arrives at a box."""
    x, y = point
    return min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])


def _steps(start: Pixel, end: Pixel) -> list[Box]:
    """A line as small boxes."""
    count = max(int(math.dist(start, end) / _STEP), 1)
    found = []
    for i in range(count + 1):
        x, y = (a + (b - a) * i / count for a, b in zip(start, end, strict=True))
        found.append((x - 1, y - 1, x + 1, y + 1))
    return found


def _common(some: Sequence[Box], others: Sequence[Box]) -> float:
    """Square pixels that boxes of one kind have in common with those of another, summed."""
    # There where matplotlib is.
    import numpy

    if not some or not others:
        return 0.0
    a, b = numpy.array(some)[:, None], numpy.array(others)[None]
    size = numpy.minimum(a[..., 2:], b[..., 2:]) - numpy.maximum(a[..., :2], b[..., :2])
    return float(numpy.prod(numpy.maximum(size, 0.0), axis=-1).sum())

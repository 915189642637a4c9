# SPDX-License-Identifier: Apache-2.0
"""Places for labels, so that none covers another, a point, or leaves its axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastvit.benchmark.pictures.theme import SMALL, Theme

#: Pixels: how far a point reaches, how far labels keep from each other, where a line is drawn.
_POINT, _APART, _LEADER = 6.0, 3.0, 18.0


class Label(NamedTuple):
    """Text for the point (x, y) in data coordinates."""

    x: float
    y: float
    text: str
    colour: str


class _Box(NamedTuple):
    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: _Box) -> float:
        """Square pixels in common."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)

    def outside(self, other: _Box) -> float:
        """Square pixels that do not lie in the other."""
        area = (self.right - self.left) * (self.top - self.bottom)
        return area - self.overlap(other)

    def wider(self, by: float) -> _Box:
        return _Box(self.left - by, self.bottom - by, self.right + by, self.top + by)

    def nearest(self, point: tuple[float, float]) -> tuple[float, float]:
        """Where a line from a point arrives."""
        x, y = point
        return min(max(x, self.left), self.right), min(max(y, self.bottom), self.top)


class _Room(NamedTuple):
    """What is there already."""

    frame: _Box
    marks: Sequence[_Box]
    labels: Sequence[_Box]
    lines: Sequence[_Box]

    def best(self, point: tuple[float, float], size: tuple[float, float]) -> _Box:
        """The place of least cost for a label, among rings around its point."""
        width, height = (length + 2 * _APART for length in size)
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
                box = _Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
                # To the right and above reads best.
                cost = gap + (math.cos(angle) < 0) / 2 + (math.sin(angle) < 0) / 4
                cost += self._cost(box, point)
                if cost < least:
                    least, best = cost, box
        return best

    def _cost(self, box: _Box, point: tuple[float, float]) -> float:
        cost = 100 * box.outside(self.frame)
        cost += 100 * sum(box.overlap(other) for other in (*self.marks, *self.labels))
        cost += 4 * sum(box.overlap(line) for line in self.lines)
        end = box.nearest(point)
        if cost < 1e3 and math.dist(end, point) > _LEADER:
            # Of a line to its own point the end lies on it.
            leader = _boxes(end, point)[:-2]
            others = [m for m in self.marks if m.overlap(_Box(*point, *point).wider(1)) == 0]
            crossed = (*self.labels, *others, *self.lines)
            cost += 10 * sum(step.overlap(other) for step in leader for other in crossed)
        return cost


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
    frame = _Box(*axes.get_window_extent(renderer).extents)
    pixels = [tuple(axes.transData.transform(point)) for point in points]
    marks = [_Box(x - _POINT, y - _POINT, x + _POINT, y + _POINT) for x, y in pixels]
    taken: list[_Box] = []
    avoided = [box for line in lines for box in _along(axes, *line)]
    inverse = axes.transData.inverted()
    # Those at the right edge have the least room.
    for label in sorted(labels, key=lambda label: -label.x):
        x, y = axes.transData.transform((label.x, label.y))
        text = axes.text(
            label.x, label.y, label.text, color=label.colour, fontsize=SMALL, zorder=6,
            ha="center", va="center",
        )  # fmt: skip
        extent = text.get_window_extent(renderer)
        room = _Room(frame, marks, taken, avoided)
        box = room.best((x, y), (extent.width, extent.height))
        centre = ((box.left + box.right) / 2, (box.bottom + box.top) / 2)
        text.set_position(inverse.transform(centre))
        taken.append(box)
        end = box.nearest((x, y))
        if math.dist(end, (x, y)) > _LEADER:
            (a, b), (c, d) = inverse.transform(end), (label.x, label.y)
            axes.plot([a, c], [b, d], color=theme.muted, linewidth=0.6, zorder=2)
            avoided += _boxes(end, (x, y))


def _along(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> list[_Box]:
    return _boxes(*(tuple(axes.transData.transform(point)) for point in (start, end)))


def _boxes(start: tuple[float, ...], end: tuple[float, ...]) -> list[_Box]:
    """A line as small boxes."""
    steps = max(int(math.dist(start, end) / 4), 1)
    found = []
    for i in range(steps + 1):
        x, y = (a + (b - a) * i / steps for a, b in zip(start, end, strict=True))
        found.append(_Box(x - 1, y - 1, x + 1, y + 1))
    return found

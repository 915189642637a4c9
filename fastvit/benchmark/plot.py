# SPDX-License-Identifier: Apache-2.0
"""The epoch table as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from fastvit.benchmark.pictures import epoch
from fastvit.benchmark.pictures.theme import LIGHT, Draw, Theme, to_svg
from fastvit.benchmark.result import Result


def epoch_svg(results: Sequence[Result], machine_line: str, *, theme: Theme = LIGHT) -> str:
    """The picture as text.

    Raises:
        ImportError: matplotlib is not installed.
    """
    return to_svg(epoch_picture(results, machine_line), theme)


def epoch_picture(results: Sequence[Result], machine_line: str, *, dry: bool = False) -> Draw:
    """What draws one variant of minutes per epoch, by model.

    Rows without figures are named and say why.
    """
    rows = [_line(result) for result in results]
    lines = [machine_line.replace(" | ", " · ")]

    def draw(theme: Theme) -> object:
        return epoch.draw(rows, lines, theme, dry=dry)

    return draw


def _line(result: Result) -> epoch.Line:
    paper = result.row.paper
    printed = f"{paper.time_min} min" if paper.time_min else f"{paper.images_per_s} images/s"
    return epoch.Line(
        result.row.label,
        result.minutes_reference,
        result.minutes_fastvit,
        paper.time_min,
        printed,
        _remark(result),
        failed=result.status != "ok",
    )


def _remark(result: Result) -> str:
    if result.status != "ok":
        return result.status
    return f"{result.speedup:.2f}x" if result.speedup is not None else "library only"

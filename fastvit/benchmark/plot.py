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


def epoch_picture(results: Sequence[Result], machine_line: str) -> Draw:
    """What draws one variant of minutes per epoch, by model.

    Rows without figures are named and say why.
    """
    rows = [epoch.from_row(result.to_dict()) for result in results]
    lines = [machine_line.replace(" | ", " · ")]
    return lambda theme: epoch.draw(rows, lines, theme)

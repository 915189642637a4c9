# SPDX-License-Identifier: Apache-2.0
"""What a file states must be what its samples give."""

from __future__ import annotations

import math


class Unreadable(ValueError):
    """A file that cannot be compared, with the reason."""


def hold(name: str, what: str, stated: float | None, found: float) -> None:
    """Compare a stated figure with the one that the samples give.

    Raises:
        Unreadable: they differ by more than rounding.
    """
    if stated is None or not math.isclose(stated, found, rel_tol=1e-6):
        raise Unreadable(
            f"{name}: states {what} {stated if stated is None else format(stated, '.6g')}, but "
            f"its samples give {found:.6g}: changed by hand, or made by another version"
        )

# SPDX-License-Identifier: Apache-2.0
"""Calls that are timed, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Call = Callable[[], Any]
#: One sample: seconds per call.
Sample = Callable[[], float]

#: Calls of a sample that finds its data in the cache.
REPEATS = 8


def keeping(calls: Sequence[Call]) -> Call:
    """All calls, whose results stay until the end: memory that is written again at once would
    stay in the cache.
    """
    return lambda: [call() for call in calls]


def repeating(call: Call) -> Call:
    """One call :data:`REPEATS` times, whose results may take each other's place in the cache."""

    def run() -> Any:
        out = None
        for _ in range(REPEATS):
            # Given back before the next is made.
            out = None
            out = call()
        return out

    return run

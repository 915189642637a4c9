# SPDX-License-Identifier: Apache-2.0
"""What :func:`fastvit.accelerate` did to a model, and why not more."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """One layer of a model.

    Attributes:
        name: dotted, within the model; empty for the model itself.
        type: of the library's class.
        layer: "gpsa", "mhsa", "patch_embed" or "conv_stem".
        backend: that runs it for the device and dtype of its parameters; empty if skipped.
        reason: why it was skipped; of a swapped one, what is special about it, or empty.
    """

    name: str
    type: str
    layer: str
    backend: str
    reason: str


class NotAccelerated(RuntimeError):
    """Nothing was swapped, or with ``strict`` not all. The model is as it was.

    Attributes:
        report: what could and could not have been swapped.
    """

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message, report)
        self.report = report

    def __str__(self) -> str:
        return str(self.args[0])


class Report:
    """The layers of a model that run on fastvit's ops, and those that look alike and do not.

    True if there are any. As a context manager it undoes the swaps at the end of the block.

    Attributes:
        swapped, skipped: tuples of :class:`Entry`, in the order of ``named_modules()``.
        max_error: with ``verify``, the largest difference between the outputs before and after,
            over the largest magnitude of the outputs before; otherwise None.
    """

    def __init__(
        self,
        swapped: tuple[Entry, ...],
        skipped: tuple[Entry, ...],
        undo: Callable[[], None] | None = None,
    ) -> None:
        self.swapped = swapped
        self.skipped = skipped
        self.max_error: float | None = None
        self._undo = undo

    def undo(self) -> None:
        """Put back what this call of :func:`fastvit.accelerate` changed; once, then no more."""
        if self._undo is not None:
            self._undo()
        self._undo = None

    def __getstate__(self) -> dict[str, Any]:
        # Of a model in this process.
        return {**self.__dict__, "_undo": None}

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __bool__(self) -> bool:
        return bool(self.swapped)

    def counts(self) -> str:
        """In words: "10 gpsa, 2 mhsa swapped; none skipped"."""
        return f"{_count(self.swapped)} swapped; {_count(self.skipped)} skipped"

    def __str__(self) -> str:
        lines = [self.counts()]
        if self.max_error is not None:
            lines[0] += f"; largest relative difference {self.max_error:.1e}"
        for entries in (self.swapped, self.skipped):
            lines += _table(entries)
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<fastvit.Report: {self.counts()}>"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "swapped": [entry._asdict() for entry in self.swapped],
            "skipped": [entry._asdict() for entry in self.skipped],
            "max_error": self.max_error,
        }


def _count(entries: tuple[Entry, ...]) -> str:
    counts = collections.Counter(entry.layer for entry in entries)
    return ", ".join(f"{count} {layer}" for layer, count in counts.items()) or "none"


def _table(entries: tuple[Entry, ...]) -> list[str]:
    rows: list[tuple[str, ...]] = []
    for entry in entries:
        name, kind, layer, backend, reason = entry
        rows.append((name or "(the model)", kind, layer, backend or "skipped", reason))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)
        ).rstrip()
        for row in rows
    ]

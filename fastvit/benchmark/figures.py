# SPDX-License-Identifier: Apache-2.0
"""Figures with an identity, so that those of two runs can be held against each other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastvit.benchmark.stated import Unreadable


class Key(NamedTuple):
    """What a figure is of. Parts that do not apply are empty."""

    #: The kind of file, or the stage of a run on a GPU.
    source: str
    what: str
    shape: str = ""
    dtype: str = ""
    batch: str = ""
    mode: str = ""
    contender: str = ""
    quantity: str = "time"

    @property
    def contest(self) -> Key:
        """What all that was timed in turns with this figure has in common."""
        return self._replace(contender="")

    def __str__(self) -> str:
        batch = f"batch {self.batch}" if self.batch else ""
        words = (self.what, self.shape, self.dtype, batch, self.mode)
        name = " ".join(word for word in words if word)
        quantity = "" if self.quantity == "time" else self.quantity
        return ", ".join(part for part in (name, quantity, self.contender) if part)


@dataclass(frozen=True)
class Figure:
    """One figure of a run: seconds by their ``samples``, or an exact ``value``.

    Attributes:
        ours: whether this is code of fastvit, which a comparison judges; else a library's, which
            tells how the machine drifted.
        error: why there are no samples.
        better: of values, whether "less" or "more" is better; "" for neither.
        tolerance: share by which values may differ and count as the same.
    """

    key: Key
    ours: bool
    samples: tuple[float, ...] = ()
    value: float | str | None = None
    error: str | None = None
    better: str = "less"
    tolerance: float = 0.0


@dataclass
class Results:
    """All figures of one file or folder, and what it says of the run that made them."""

    path: str
    #: Whether it is a folder, in which tables of several compilers may lie.
    folder: bool = False
    #: gpu, cpu and threads; empty for tables that no machine measured.
    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    #: What made its tables, with versions.
    makers: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    date: str | None = None
    #: What speaks against comparing it, in sentences.
    doubts: list[str] = field(default_factory=list)
    #: What its reader has to know, in sentences.
    notes: list[str] = field(default_factory=list)
    figures: dict[Key, Figure] = field(default_factory=dict)

    def add(self, figure: Figure) -> None:
        """Keep a figure; of one that was measured twice, the first that has samples.

        Raises:
            Unreadable: a sample is no time.
        """
        for sample in figure.samples:
            if not isinstance(sample, (int, float)) or not 0 < sample < math.inf:
                raise Unreadable(f"{figure.key}: expected seconds, got {sample!r}")
        known = self.figures.get(figure.key)
        if known is None or (known.error and not figure.error):
            self.figures[figure.key] = figure

    def describe(
        self, machine: dict[str, Any], versions: dict[str, Any], commit: str | None, *, whole: bool
    ) -> None:
        """Keep what a record says it was measured on; one that contradicts the others is a doubt.

        Args:
            whole: whether all records are of one run, so that their commits agree, too; files
                that were made one by one may lie beside each other.
        """
        # The processor does the host's part on a GPU machine, so it counts there too.
        found = {name: str(machine[name]) for name in _MACHINE if machine.get(name)}
        for what, old, new in (
            ("machine", self.machine, found),
            ("versions", self.versions, dict(versions)),
            ("commit", self.commit, commit),
        ):
            if old and new and old != new:
                said = self.notes if what == "commit" and not whole else self.doubts
                doubt = f"{self.path}: its parts differ in their {what}, {old} and {new}; one is "
                said.append(doubt + "left from an earlier run")
        self.machine = self.machine or found
        self.versions = self.versions or dict(versions)
        self.commit = self.commit or commit

    @property
    def header(self) -> str:
        """One line: file, processor, versions, commit, date."""
        threads = self.machine.get("threads")
        parts = [
            self.path,
            self.machine.get("gpu") or "",
            self.machine.get("cpu", "no machine: counted or compiled, not timed")
            + (f", {threads} thread{'' if threads == '1' else 's'}" if threads else ""),
            ", ".join(
                f"{name} {version}" for name, version in {**self.versions, **self.makers}.items()
            ),
            f"commit {self.commit}" if self.commit else "no commit",
            self.date or "no date",
        ]
        return " | ".join(part for part in parts if part)


_MACHINE = ("gpu", "cpu", "threads")


class Spread(NamedTuple):
    """Median, 20th and 80th percentile."""

    median: float
    q20: float
    q80: float


def spread(samples: Sequence[float]) -> Spread:
    """Of one or more samples."""
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    cuts = statistics.quantiles(samples, n=5, method="inclusive")
    return Spread(statistics.median(samples), cuts[0], cuts[3])

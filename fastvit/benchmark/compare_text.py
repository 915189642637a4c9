# SPDX-License-Identifier: Apache-2.0
"""A comparison for reading, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastvit.benchmark.compare import (
    APPEARED,
    EQUAL,
    FAILED,
    FASTER,
    GREW,
    OTHER,
    SHRANK,
    SLOWER,
    VANISHED,
    WITHIN,
    Change,
    Comparison,
    Drift,
)
from fastvit.benchmark.figures import Results
from fastvit.benchmark.text import NOTHING, Cell, Column, bullets, render_text

#: Titles of the groups, in their order; those of the last two are listed on demand.
_TITLES = {
    FAILED: "failed",
    SLOWER: "slower",
    GREW: "grew (worse)",
    FASTER: "faster",
    SHRANK: "shrank (better)",
    OTHER: "another, neither better nor worse",
    VANISHED: "vanished",
    APPEARED: "appeared",
    WITHIN: "within the spread",
    EQUAL: "equal",
}
_QUIET = (WITHIN, EQUAL)

_COLUMNS = [Column("what", left=True), Column("A"), Column("B"), Column("B ÷ A"), Column("drift")]


def text(
    a: Results, b: Results, comparison: Comparison, notes: Sequence[str], *, everything: bool
) -> str:
    """Headers, drift, the tables of ours and of peers, and the counts in the last line.

    Args:
        notes: sentences for the reader.
        everything: whether to list what did not change, too.
    """
    parts = [f"A: {a.header}\nB: {b.header}"]
    if notes:
        parts.append(bullets(notes))
    parts.append(_drift(comparison))
    for ours in (True, False):
        table = _table([c for c in comparison.changes if c.ours == ours], everything)
        if table:
            title = "" if ours else "Contenders of libraries, not judged:\n\n"
            parts.append(title + table)
    parts.append(summary(comparison))
    return "\n\n".join(part for part in parts if part)


def summary(comparison: Comparison) -> str:
    """One line: how many figures of ours have which verdict."""
    counts = comparison.counts()
    parts = []
    if comparison.drift is not None:
        parts.append(f"{counts[SLOWER]} slower, {counts[FASTER]} faster, {counts[WITHIN]} {WITHIN}")
    exact = [f"{counts[GREW]} grew", f"{counts[SHRANK]} shrank", f"{counts[EQUAL]} {EQUAL}"]
    if comparison.drift is None or any(counts[verdict] for verdict in (GREW, SHRANK, EQUAL)):
        parts.append(", ".join(exact))
    parts += [f"{counts[v]} {v}" for v in (FAILED, VANISHED, APPEARED) if counts[v]]
    if counts[OTHER]:
        parts.append(f"{counts[OTHER]} neither better nor worse")
    return "; ".join(parts)


def _drift(comparison: Comparison) -> str:
    drift = comparison.drift
    if drift is None:
        return ""
    noise = f"±{100 * (drift.noise - 1):.0f} %"
    if drift.noises:
        groups = (f"±{100 * (n - 1):.0f} % in {' '.join(g)}" for g, n in drift.noises.items())
        noise += f" ({', '.join(group.strip() for group in groups)})"
    if drift.peers < 2:
        known = "one contender" if drift.peers else "no contender"
        return f"Drift: both runs timed {known} of a library; noise is taken as {noise}."
    return (
        f"Drift: {100 * (drift.ratio - 1):+.1f} % in the medians of {drift.peers} contenders of "
        f"libraries; noise from run to run {noise}. B ÷ A is after division by the drift of the "
        "last column."
    )


def _table(changes: Sequence[Change], everything: bool) -> str:
    groups: list[tuple[str, list[list[Cell]]]] = []
    for verdict, title in _TITLES.items():
        found = [c for c in changes if c.verdict == verdict]
        if found and (everything or verdict not in _QUIET):
            rows = sorted(found, key=_weight)
            groups.append((title, [_row(change) for change in rows]))
    return render_text(_COLUMNS, groups) if groups else ""


def _weight(change: Change) -> float:
    """The largest changes first."""
    return -abs(math.log(change.ratio)) if change.ratio else 0.0


def _row(change: Change) -> list[Cell]:
    timed = change.key.quantity == "time"
    cells = [_value(value, timed=timed) for value in (change.before, change.after)]
    name = f"  {change.key}"
    if change.reason:
        name += f": {change.reason[:60]}"
    ratio = NOTHING if change.ratio is None else f"{change.ratio:.2f}x"
    drift = NOTHING if change.drift is None else f"{change.drift:.2f}x"
    return [name, *cells, ratio, drift]


def _value(value: float | str | None, *, timed: bool) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, str):
        return value
    if not timed:
        return f"{value:,}"
    return f"{value * 1e3:,.3f} ms" if value >= 1e-3 else f"{value * 1e6:,.2f} µs"


def as_dict(a: Results, b: Results, comparison: Comparison, notes: Sequence[str]) -> dict[str, Any]:
    """All of it as plain data."""
    runs = [
        {
            "path": run.path,
            "machine": run.machine,
            "versions": {**run.versions, **run.makers},
            "commit": run.commit,
            "date": run.date,
        }
        for run in (a, b)
    ]
    return {
        "a": runs[0],
        "b": runs[1],
        "notes": list(notes),
        "drift": None if comparison.drift is None else _plain_drift(comparison.drift),
        "counts": dict(comparison.counts()),
        "worse": comparison.worse,
        "changes": [{**change.key._asdict(), **_plain(change)} for change in comparison.changes],
    }


def _plain_drift(drift: Drift) -> dict[str, Any]:
    noises = {" ".join(group).strip(): noise for group, noise in drift.noises.items()}
    return {**drift._asdict(), "noises": noises}


def _plain(change: Change) -> dict[str, Any]:
    names = ("ours", "verdict", "before", "after", "ratio", "drift", "reason")
    return {name: getattr(change, name) for name in names}

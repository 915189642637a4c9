# SPDX-License-Identifier: Apache-2.0
"""What the tables of the summary are made of: cases, and cells of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Records = dict[str, dict[str, Any]]
NOTHING = "–"


def cases_of(records: Records, stage: str, what: str | None = None) -> list[dict[str, Any]]:
    found = records.get(stage, {}).get("cases", [])
    return [case for case in found if what in (None, case.get("what"))]


def best_of(
    case: dict[str, Any], names: Iterable[str]
) -> tuple[dict[str, Any], str, dict[str, Any] | None]:
    """Ours, and name and times of the fastest of the others."""
    found = case["contenders"]
    name = fastest_of(found, names)
    return found.get("fastvit", {}), name, found.get(name)


def fastest_of(found: dict[str, dict[str, Any]], names: Iterable[str]) -> str:
    timed = [n for n in names if "median" in found.get(n, {})]
    return min(timed, key=lambda n: found[n]["median"], default=NOTHING)


def us(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}"


def median(times: dict[str, Any] | None) -> str:
    return us(times["median"]) if times and "median" in times else NOTHING


def spread(times: dict[str, Any] | None) -> str:
    if not times:
        return NOTHING
    if "median" not in times:
        return times["error"][:60]
    return f"{us(times['median'])} ({us(times['q20'])}–{us(times['q80'])})"


def share(times: dict[str, Any] | None) -> str:
    return f"{100 * times['share']:.0f} %" if times and "share" in times else NOTHING


def warm(times: dict[str, Any] | None) -> str:
    """The median over one set of inputs, which the cache holds."""
    return median(times.get("warm")) if times else NOTHING


def host(case: dict[str, Any]) -> str:
    return us(case["host"]) if "host" in case else NOTHING


def ratio(theirs: dict[str, Any] | None, ours: dict[str, Any] | None) -> str:
    if not theirs or not ours or "median" not in theirs or "median" not in ours:
        return NOTHING
    return f"{theirs['median'] / ours['median']:.2f}"


def megabytes(memory: dict[str, dict[str, Any]], which: str, names: Iterable[str]) -> str:
    """Of each one named, in a row; nothing where none was measured."""
    found = [memory.get(name, {}).get(which) for name in names]
    if all(size is None for size in found):
        return NOTHING
    return " / ".join(NOTHING if size is None else f"{size / 1e6:,.0f}" for size in found)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, or nothing where there are no rows."""
    if not rows:
        return ""
    lines = [heads, [":---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |" for line in lines)

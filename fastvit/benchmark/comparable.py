# SPDX-License-Identifier: Apache-2.0
"""Whether two runs can be compared, and what their reader has to know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastvit.benchmark.figures import Key, Results


def refusals(a: Results, b: Results) -> list[str]:
    """Why a comparison would say nothing about the code, in sentences; ``--force`` overrides."""
    said = [*a.doubts, *b.doubts]
    for name in ("gpu", "cpu", "threads"):
        old, new = a.machine.get(name), b.machine.get(name)
        if a.machine and b.machine and old != new:
            said.append(
                f"different machines: {name} {old or 'none'} in A, {new or 'none'} in B; times "
                "of one say nothing about those of the other"
            )
    copied = _copied(a, b)
    if copied:
        said.append(
            f"{len(copied)} figures have the same samples in A and B, {copied[0]} the first: "
            "one is a copy of the other, not a run of its own"
        )
    return said


def warnings(a: Results, b: Results) -> list[str]:
    """What a reader has to know, in sentences."""
    said = [*a.notes, *b.notes]
    library = "so its contenders changed, too, and the drift has that in it"
    maker = "so the changes may be its, not those of the code"
    for old, new, effect in (
        (a.versions, b.versions, library),
        (a.makers, b.makers, maker),
    ):
        for name in sorted(old.keys() & new.keys() - {"fastvit"}):
            if old[name] != new[name]:
                said.append(f"{name} is {old[name]} in A and {new[name]} in B, {effect}")
    return said


def incomparable(a: Results, b: Results) -> str | None:
    """Why there is nothing to compare, or None."""
    if a.figures.keys() & b.figures.keys():
        return None
    parts = []
    for part in ("source", "dtype", "batch"):
        old, new = (_parts(results, part) for results in (a, b))
        if old.isdisjoint(new):
            parts.append(f"A has {part} {_list(old)}, B has {_list(new)}")
    return f"nothing comparable: {'; '.join(parts) or 'no figure is in both'}"


def _copied(a: Results, b: Results) -> list[Key]:
    # A clock of nanoseconds does not give three equal pairs by chance.
    return [
        key
        for key, figure in a.figures.items()
        if len(figure.samples) >= 3
        and key in b.figures
        and b.figures[key].samples == figure.samples
    ]


def _parts(results: Results, part: str) -> set[str]:
    return {getattr(key, part) for key in results.figures}


def _list(names: Iterable[str]) -> str:
    found: Sequence[str] = sorted(name or "none" for name in names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")

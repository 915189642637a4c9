# SPDX-License-Identifier: Apache-2.0
"""Whole models in the records of ``make gpu``: ratios of a pair, and times by batch and size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from figures.pairs import Records

PAIRS = {"ConViT ÷ DeiT": ("convit", "deit"), "ViT_C ÷ ViT_P": ("vit_c", "vit_p")}
CONVIT, VIT_C = PAIRS

Case = Mapping[str, Any]


def cases(
    records: Records, pair: str, mode: str = "inference", *, dtype: str = "bfloat16"
) -> list[Case]:
    """The contests of a pair, as older runs have them too, which held only ConViTs."""
    found = records.get("models", {}).get("cases", [])
    return [
        case
        for case in found
        if case.get("pair", CONVIT) == pair
        and case.get("mode") == mode
        and case.get("dtype", "bfloat16") == dtype
    ]


def side_of(case: Case) -> int:
    """Pixels of a side of the images."""
    return case.get("image_size", 224)


def fastest(case: Case, chosen: Callable[[str], bool]) -> tuple[str, float] | None:
    """Name and images/s of the fastest contender whose name is chosen."""
    rates = {
        name: times["images_per_s"]
        for name, times in case["contenders"].items()
        if times.get("images_per_s") and chosen(name)
    }
    name = max(rates, key=rates.__getitem__, default=None)
    return None if name is None else (name, rates[name])


def ratio(case: Case, *, ours: bool) -> float | None:
    """Images/s of the first family over the second.

    Args:
        ours: fastvit's first over the fastest of all of the second; else the libraries' own two.
    """
    first, second = PAIRS[case.get("pair", CONVIT)]

    def above(name: str) -> bool:
        return first in name.split() and name.startswith("fastvit") == ours

    def below(name: str) -> bool:
        return second in name.split() and (ours or not name.startswith("fastvit"))

    top, bottom = fastest(case, above), fastest(case, below)
    return top[1] / bottom[1] if top and bottom else None


def ratios(records: Records, pair: str, *, ours: bool, mode: str = "inference") -> dict[str, float]:
    """By size: of the largest batch that was timed, at 224 pixels and eager where there is that."""
    found: dict[str, tuple[tuple[bool, bool, int], float]] = {}
    for case in cases(records, pair, mode):
        value = ratio(case, ours=ours)
        rank = (case.get("way", "eager") == "eager", side_of(case) == 224, case["batch"])
        if value is not None and (case["size"] not in found or rank > found[case["size"]][0]):
            found[case["size"]] = (rank, value)
    return {size: value for size, (_, value) in found.items()}


def times(
    records: Records, vary: str, chosen: Callable[[str], bool], size: str
) -> list[tuple[float, float]]:
    """Seconds of an image in inference of ConViT's pair, of the fastest contender that is chosen.

    Args:
        vary: "batch", at 224 pixels; or "image_size", each of its largest batch.
    """
    best: dict[int, tuple[int, float]] = {}
    for case in cases(records, CONVIT):
        if case["size"] != size or (vary == "batch" and side_of(case) != 224):
            continue
        found = fastest(case, chosen)
        if found is None:
            continue
        x = case["batch"] if vary == "batch" else side_of(case)
        rank = 0 if vary == "batch" else case["batch"]
        seconds = 1.0 / found[1]
        if x not in best or rank > best[x][0] or (rank == best[x][0] and seconds < best[x][1]):
            best[x] = (rank, seconds)
    return sorted((x, seconds) for x, (_, seconds) in best.items())

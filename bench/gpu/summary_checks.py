# SPDX-License-Identifier: Apache-2.0
"""Tables of what was checked: agreement, outcomes, ceilings, and the clocks of the contests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gpu.cells import Records, cases_of, markdown
from gpu.clocks import STEADY


def ceilings(records: Records) -> str:
    scale = {
        "B/s": (1e-12, "TB/s"),
        "FLOP/s": (1e-12, "TFLOP/s"),
        "1/s": (1e-12, "T/s"),
        "s": (1e6, "µs"),
    }
    rows = []
    for case in cases_of(records, "ceilings"):
        if "value" in case:
            factor, unit = scale[case["unit"]]
            rows.append([case["name"], f"{case['value'] * factor:.3g} {unit}"])
        else:
            rows.append([case["name"], case["error"]])
    return markdown(["what", "rate"], rows)


def clocks(records: Records) -> str:
    """Which contests a changing clock may have spoilt; nothing where no clock could be read."""
    read = [
        (f"{stage} {contest(case)}", case["clocks"])
        for stage, record in records.items()
        for case in record.get("cases", [])
        if "moved" in case.get("clocks", {})
    ]
    if not read:
        return ""
    ends = [reading[end] for _, reading in read for end in ("first", "last")]
    said = [_span(ends, "sm_mhz", "MHz"), _span(ends, "celsius", "°C"), _span(ends, "watts", "W")]
    spans = ", ".join(filter(None, said))
    text = f"{len(read)} contests: {spans}, read after their first and last rounds."
    moved = [
        [name, f"{found['first']['sm_mhz']:.0f}", f"{found['last']['sm_mhz']:.0f}"]
        for name, found in read
        if not found["steady"]
    ]
    if not moved:
        return f"{text} No clock moved by more than {100 * STEADY:.0f} % within a contest."
    table = markdown(["contest with another clock at its end", "first MHz", "last MHz"], moved)
    return f"{text}\n\n{table}"


def contest(case: dict[str, Any]) -> str:
    """A case by everything that names it."""
    shape = case.get("shape", {})
    sizes = (f"{k}={'x'.join(map(str, v)) if isinstance(v, list) else v}" for k, v in shape.items())
    keys = ("pair", "size", "batch", "what", "dtype", "pixels", "mode", "image_size", "way", "call")
    names = (case.get(key) for key in keys)
    return " ".join([*sizes, *(str(name) for name in names if name)])


def _span(readings: Iterable[dict[str, float]], key: str, unit: str) -> str:
    values = [reading[key] for reading in readings if key in reading]
    return f"{min(values):.0f} to {max(values):.0f} {unit}" if values else ""


def agreement(stage: str, what: str | None = None) -> Callable[[Records], str]:
    return lambda records: _comparisons(cases_of(records, stage, what))


def _comparisons(cases: Iterable[dict[str, Any]]) -> str:
    rows = []
    for case in cases:
        worst = max(
            case.get("tensors", []), key=lambda t: t["error"] / (t["limit"] or 1.0), default=None
        )
        rows.append(
            [
                case["group"], case["layout"], case["dtype"], "yes" if case["ok"] else "NO",
                case.get("error") or _worst(worst), *([_ran(case)] if "what" in case else []),
            ]
        )  # fmt: skip
    heads = ["problem", "layout", "dtype", "agrees", "nearest to its limit, or what went wrong"]
    return markdown(heads + (["kernels"] if rows and len(rows[0]) > len(heads) else []), rows)


def _ran(case: dict[str, Any]) -> str:
    """Our kernels that the profiler saw, without their parameters."""
    names = case.get("ran", [])
    return names if isinstance(names, str) else ", ".join(n.split("<")[0] for n in names)


def _worst(tensor: dict[str, Any] | None) -> str:
    return f"{tensor['name']}: {tensor['error']:.1e} of {tensor['limit']:.1e}" if tensor else ""


def outcomes(stage: str) -> Callable[[Records], str]:
    def make(records: Records) -> str:
        rows = [[case["name"], case["outcome"]] for case in cases_of(records, stage)]
        return markdown(["check", "outcome"], rows)

    return make

# SPDX-License-Identifier: Apache-2.0
"""Results from JSON. What a file says of its samples must follow from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fastvit.benchmark.contests import Entry
from fastvit.benchmark.modules import Outcome
from fastvit.benchmark.result import Result, Samples
from fastvit.benchmark.rows import Complexity, select_rows

_DERIVED = (
    "minutes_reference", "minutes_fastvit", "speedup", "images_per_s_reference",
    "images_per_s_fastvit", "inference_speedup",
)  # fmt: skip


class Doctored(ValueError):
    """A figure in a file is not that of its samples."""


def outcomes(data: Mapping[str, Any]) -> list[Outcome]:
    """Of ``modules.json``, which keeps samples only.

    Raises:
        Doctored: a contest says that it agrees where its error is beyond its limit.
    """
    found = []
    for contest in data["contests"]:
        if contest["agrees"] != (contest["error"] <= contest["limit"]):
            raise Doctored(
                f"{contest['name']} {contest['dtype']}: agrees is {contest['agrees']}, with error "
                f"{contest['error']:.2e} and limit {contest['limit']:.2e}"
            )
        entry = Entry(contest["name"], getattr(torch, contest["dtype"]), contest["batch"], _never)
        found.append(
            Outcome(
                entry, contest["error"], contest["limit"], contest["agrees"],
                contest["seconds"], contest["peak_bytes"],
            )
        )  # fmt: skip
    return found


def _never(*_: Any) -> Any:
    raise AssertionError("a contest that was read is not built")


def results(data: Mapping[str, Any]) -> list[Result]:
    """Of ``epoch.json``.

    Raises:
        Doctored: a figure does not follow from the samples beside it.
    """
    return [_result(row) for row in data["rows"]]


def _result(saved: Mapping[str, Any]) -> Result:
    (row,) = select_rows([saved["name"]])
    counted = None
    if saved["flops"] is not None:
        counted = Complexity(saved["flops"], saved["params"], saved["acts"])
    samples = {
        side: Samples(*(saved[f"{kind}_{side}"] for kind in ("samples", "optimizer", "inference")))
        for side in ("reference", "fastvit")
    }
    result = Result(
        row, saved["batch"], saved["dtype"], saved["status"], saved["reason"], counted=counted,
        **samples,
    )  # fmt: skip
    for name in _DERIVED:
        expected, found = getattr(result, name), saved[name]
        if not _same(expected, found):
            raise Doctored(f"{saved['name']}: {name} is {found}, its samples give {expected}")
    return result


def check_records(records: Mapping[str, Any]) -> None:
    """Medians and quantiles of a run of ``make gpu``, and what follows from them.

    Raises:
        Doctored: one is not that of its samples, or stages of two commits or GPUs stand together,
            of which a document would name one.
    """
    origins = {_origin(record) for record in records.values() if record.get("machine")}
    if len(origins) > 1:
        raise Doctored(f"stages of several runs: {'; '.join(sorted(map(str, origins)))}")
    for stage, record in records.items():
        for case in record.get("cases", []):
            for name, times in case.get("contenders", {}).items():
                _check_derived(f"{stage}, {name}", case, times)
        for times in _times(record):
            samples = times["samples"]
            expected = {"median": statistics.median(samples)}
            if len(samples) > 1:
                cuts = statistics.quantiles(samples, n=5, method="inclusive")
                expected |= {"q20": cuts[0], "q80": cuts[3]}
            for name, value in expected.items():
                if not _same(value, times[name]):
                    raise Doctored(f"{stage}: {name} is {times[name]}, its samples give {value}")


def _origin(record: Mapping[str, Any]) -> tuple[Any, ...]:
    machine = record["machine"]
    return machine.get("gpu"), machine.get("commit"), machine.get("dirty")


def _check_derived(name: str, case: Mapping[str, Any], times: Mapping[str, Any]) -> None:
    """Speed and share of the floor of one contender, by its median."""
    expected = {}
    if "images_per_s" in times:
        expected["images_per_s"] = case["batch"] / times["median"]
    if "floor" in times:
        expected["share"] = times["floor"] / times["median"]
    for key, value in expected.items():
        if not _same(value, times.get(key)):
            raise Doctored(f"{name}: {key} is {times.get(key)}, its median gives {value}")


def _times(found: Any) -> Iterator[Mapping[str, Any]]:
    """All that has both samples and their median, wherever it lies."""
    if isinstance(found, Mapping):
        if found.get("samples") and "median" in found:
            yield found
        for inner in found.values():
            yield from _times(inner)
    elif isinstance(found, list):
        for inner in found:
            if isinstance(inner, (dict, list)):
                yield from _times(inner)


def _same(expected: float | None, found: float | None) -> bool:
    if expected is None or found is None:
        return expected is found
    return math.isclose(expected, found, rel_tol=1e-9)

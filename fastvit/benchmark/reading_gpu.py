# SPDX-License-Identifier: Apache-2.0
"""The files that ``make gpu`` leaves: stages with cases, cases with contenders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastvit.benchmark.figures import Figure, Key, Results, spread
from fastvit.benchmark.stated import hold

#: Between our own implementations: nothing in them is a library's.
_OWN_CONTESTS = ("choice",)


def is_gpu(content: dict[str, Any]) -> bool:
    """Whether this is a file of stages."""
    stages = [stage for stage in content.values() if isinstance(stage, dict)]
    return bool(stages) and all("status" in stage for stage in stages)


def read_gpu(content: dict[str, Any], results: Results) -> None:
    """Add the times, and the memory of a training step, of all stages."""
    for stage, record in content.items():
        if "machine" in record:
            machine = record["machine"]
            commit = machine["commit"]
            if commit and machine.get("dirty"):
                commit += "+changes"
            results.describe(machine, machine["versions"], commit, whole=True)
            results.date = results.date or record.get("date")
        doubt = f"{results.path}: a dry run, whose times mean nothing"
        if record.get("dry") and doubt not in results.doubts:
            results.doubts.append(doubt)
        if record["status"] not in ("ok", "not reached"):
            first = (record.get("problems") or ["no reason given"])[0].splitlines()[0][:200]
            results.notes.append(f"{results.path}: stage {stage} {record['status']}: {first}")
        for case in record.get("cases", []):
            _case(stage, case, results)


def _case(stage: str, case: dict[str, Any], results: Results) -> None:
    key = _key(stage, case)
    own = case.get("what") in _OWN_CONTESTS
    for contender, times in case.get("contenders", {}).items():
        ours = own or contender.startswith("fastvit")
        _times(key._replace(contender=contender), ours, times, results)
    for contender, times in case.get("memory", {}).items():
        ours = contender.startswith("fastvit")
        for part in ("kept", "peak"):
            if part in times:
                named = key._replace(contender=contender, quantity=f"{part} bytes")
                results.add(Figure(named, ours, value=times[part], tolerance=0.01))
    # The ceilings: rates of libraries, each a case by itself.
    if "contenders" not in case and "median" in case:
        _times(key._replace(contender="library"), False, case, results)


def _times(key: Key, ours: bool, times: Mapping[str, Any], results: Results) -> None:
    if "error" in times:
        results.add(Figure(key, ours, error=times["error"]))
        return
    samples = tuple(times["samples"])
    found = spread(samples)
    for name, value in found._asdict().items():
        hold(str(key), name, times[name], value)
    if "floor" in times:
        hold(str(key), "share", times["share"], times["floor"] / found.median)
    results.add(Figure(key, ours, samples=samples))


def _key(stage: str, case: dict[str, Any]) -> Key:
    shape = case.get("shape") or {}
    rest = {name: value for name, value in shape.items() if name not in ("label", "B")}
    words = [_text(name, value) for name, value in rest.items() if value is not None]
    if "image_size" in case:
        words.append(f"{case['image_size']} px")
    what = [shape.get("label"), case.get("what"), case.get("pair"), case.get("size")]
    what += [case.get("name"), case.get("call"), case.get("pixels"), case.get("way")]
    return Key(
        stage,
        " ".join(str(part) for part in (stage, *what) if part),
        shape=" ".join(words),
        dtype=case.get("dtype", ""),
        batch=str(shape.get("B", case.get("batch", ""))),
        mode=case.get("mode", ""),
    )


def _text(name: str, value: Any) -> str:
    sizes = "x".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{name}={sizes}"

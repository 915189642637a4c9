# SPDX-License-Identifier: Apache-2.0
"""Files of results as figures: what the benchmark, ``make gpu`` and the tables leave.

What a file states beside its samples must follow from them: a file in which it does not was
changed by hand, or by another version of this package, and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvit.benchmark.figures import Figure, Key, Results, spread
from fastvit.benchmark.reading_gpu import is_gpu, read_gpu
from fastvit.benchmark.reading_tables import is_counts, is_table, read_counts, read_table
from fastvit.benchmark.result import minutes_per_epoch
from fastvit.benchmark.stated import Unreadable, hold

#: Memory of a step has scratch in it whose size is the libraries' choice.
MEMORY_TOLERANCE = 0.01


def read(path: Path) -> Results:
    """The figures of a file, or of all files of results in a folder (not in those below it).

    Raises:
        Unreadable: it is not there, holds no results, or holds figures that its samples do not
            give.
    """
    results = Results(str(path), folder=path.is_dir())
    if results.folder:
        for file in sorted(path.glob("*.json")):
            content = _content(file)
            reader = _reader(content)
            if reader is not None:
                _apply(reader, content, results, file)
        if not results.figures:
            raise Unreadable(f"{path}: there are no results in this folder")
        return results
    content = _content(path)
    reader = _reader(content)
    if reader is None:
        raise Unreadable(
            f"{path}: expected modules.json, epoch.json, the JSON of a run on a GPU, a table of "
            "resources or counts.json, or a folder of them; this is something else"
        )
    _apply(reader, content, results, path)
    return results


def _content(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise Unreadable(f"{path}: is no JSON: {error}") from error


Reader = Callable[[Any, Results], None]


def _apply(reader: Reader, content: Any, results: Results, path: Path) -> None:
    try:
        reader(content, results)
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise Unreadable(f"{path}: not as this version writes it ({what})") from error
    except Unreadable as error:
        raise Unreadable(f"{path}: {error}") from error


def _reader(content: Any) -> Reader | None:
    if not isinstance(content, dict):
        return None
    if "contests" in content:
        return _modules
    if "images_per_epoch" in content:
        return _epoch
    if is_table(content):
        return read_table
    if is_counts(content):
        return read_counts
    return read_gpu if is_gpu(content) else None


def _describe(content: dict[str, Any], results: Results) -> None:
    results.describe(content["machine"], content["versions"], content["commit"], whole=False)
    results.date = results.date or content.get("date")


def _modules(content: dict[str, Any], results: Results) -> None:
    """``modules.json``: contests of layers and models."""
    _describe(content, results)
    for contest in content["contests"]:
        key = Key("modules", contest["name"], dtype=contest["dtype"], batch=str(contest["batch"]))
        for contender, samples in contest["seconds"].items():
            results.add(
                Figure(
                    key._replace(contender=contender),
                    contender.startswith("fastvit"),
                    samples=tuple(samples),
                )
            )
        if not contest["agrees"]:
            error = f"disagrees: error {contest['error']:.1e}, limit {contest['limit']:.1e}"
            results.add(Figure(key._replace(contender="fastvit"), True, error=error))
        for contender, peak in contest["peak_bytes"].items():
            results.add(
                Figure(
                    key._replace(contender=contender, quantity="peak bytes"),
                    contender.startswith("fastvit"),
                    value=peak,
                    tolerance=MEMORY_TOLERANCE,
                )
            )


def _epoch(content: dict[str, Any], results: Results) -> None:
    """``epoch.json``: training and inference steps of whole models."""
    _describe(content, results)
    for row in content["rows"]:
        key = Key(
            "epoch",
            row["name"],
            shape=f"{row['image_size']} px",
            dtype=row["dtype"],
            batch=str(row["batch"]),
        )
        for whose, contender in (("reference", "library"), ("fastvit", "fastvit")):
            for part, mode in (
                ("samples", "forward+backward"),
                ("optimizer", "optimizer"),
                ("inference", "inference"),
            ):
                samples = tuple(row[f"{part}_{whose}"])
                if samples:
                    named = key._replace(mode=mode, contender=contender)
                    results.add(Figure(named, contender == "fastvit", samples=samples))
            _hold_row(row, whose)
        if row["status"] != "ok":
            error = f"{row['status']}: {row['reason']}"
            named = key._replace(mode="forward+backward", contender="fastvit")
            results.add(Figure(named, True, error=error))


def _hold_row(row: dict[str, Any], whose: str) -> None:
    """Minutes and images per second must be what the samples of a model give."""
    name = f"{row['name']}, {whose}"
    training, optimizer = row[f"samples_{whose}"], row[f"optimizer_{whose}"]
    if training and optimizer:
        minutes = minutes_per_epoch(
            spread(training).median,
            spread(optimizer).median,
            batch=row["batch"],
            batch_per_gpu=row["batch_per_gpu"],
        )
        hold(name, "minutes per epoch", row[f"minutes_{whose}"], minutes)
    inference = row[f"inference_{whose}"]
    if inference:
        rate = row["batch"] / spread(inference).median
        hold(name, "images per second", row[f"images_per_s_{whose}"], rate)

# SPDX-License-Identifier: Apache-2.0
"""What a call costs that needs no clock: operators and bytes on the composed path, launches and
bytes on the Triton kernels; kept in ``bench/results/counts.json``.

    python bench/counts.py --check   compare with the table, exit 1 on a difference
    python bench/counts.py --write   count, and write the table for this version of PyTorch

The composed path (backend ``torch``) is counted on a processor for each op, forward and with its
backward (``count_cases.py``), with all that depends on the machine pinned (``count_operators.py``).
The table has a part for each minor version of PyTorch that was counted, and the part that a version
is held against is its own or the last before it. One that is newer than all of them may divide a
call into other operators: differences are then told, but not judged.

Launches are those of the calls in ``resource_cases.py``, taken from the functions that launch;
their bytes are the model's (``kernels/ahead/model.py``): every input read once, every output
written once. Neither a GPU nor a compiler is needed for them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from count_cases import cases
from count_operators import counted

# The kernels of this clone; last, since the fastvit beside them need not be built.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import resource_cases

from kernels.ahead import attention, model

TABLE = Path(__file__).resolve().parent / "results" / "counts.json"
VERSION = ".".join(torch.__version__.split(".")[:2])
#: The architectures whose configurations differ most; all are in the tables of resources.
ARCHITECTURES = ("sm_80", "sm_90")

Row = dict[str, Any]
_COMPOSED = ("operators", "views", "allocated", "written")
_LAUNCHES = ("launches", "bytes")


def composed() -> list[Row]:
    """The composed path's rows, with this version of PyTorch."""
    rows = []
    for case in cases():
        for direction, counter in counted(case.forward, case.inputs, case.learned).items():
            numbers = {name: getattr(counter, name) for name in _COMPOSED}
            names = dict(sorted(counter.by_operator.items()))
            rows.append(
                {"case": case.name, "direction": direction, **numbers, "by_operator": names}
            )
    return rows


def launches() -> list[Row]:
    """The kernels' rows: a call each."""
    rows = []
    for arch in ARCHITECTURES:
        for case in resource_cases.CASES:
            made = attention.launches(arch, case)
            moved = {
                kernel: model.work(kernel, launch.arguments).bytes
                for kernel, launch in made.items()
            }
            rows.append(
                {
                    "arch": arch,
                    "case": case.name,
                    "direction": case.direction,
                    "launches": len(made),
                    "bytes": sum(moved.values()),
                    "by_kernel": moved,
                }
            )
    return rows


def write(path: Path) -> None:
    """Count, and keep what other versions of PyTorch counted."""
    old = json.loads(path.read_text("utf-8")) if path.exists() else {"composed": {}}
    parts = {**old["composed"], VERSION: composed()}
    ordered = sorted(parts, key=_number)
    lines = [f'  "{version}": [\n{_lines(parts[version])}\n  ]' for version in ordered]
    text = '{\n "composed": {\n' + ",\n".join(lines) + "\n },\n"
    text += f' "launches": [\n{_lines(launches())}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def _lines(rows: list[Row]) -> str:
    return ",\n".join("   " + json.dumps(row) for row in rows)


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def nearest(versions: list[str]) -> str:
    """The version to compare with: this one, else the last before it, else the first."""
    ordered = sorted(versions, key=_number)
    before = [version for version in ordered if _number(version) <= _number(VERSION)]
    return before[-1] if before else ordered[0]


def differences(table: list[Row], found: list[Row], numbers: tuple[str, ...]) -> list[str]:
    """What differs from a part of the table, in words."""
    said = []
    old, new = ({_name(row): row for row in rows} for rows in (table, found))
    said += [f"{name}: not in the table" for name in new if name not in old]
    said += [f"{name}: in the table, but not counted" for name in old if name not in new]
    for name in new.keys() & old.keys():
        for number in numbers:
            said += _told(name, number, old[name][number], new[name][number])
        for part in ("by_operator", "by_kernel"):
            before, after = (row.get(part, {}) for row in (old[name], new[name]))
            for each in sorted({*before, *after}):
                if before.get(each) != after.get(each):
                    was, came = before.get(each, "none"), after.get(each, "none")
                    said.append(f"{name}: {each}: expected {was}, but came {came}")
    return sorted(said)


def _told(name: str, number: str, before: int, after: int) -> list[str]:
    if before == after:
        return []
    how = "grew" if after > before else "shrank"
    return [f"{name}: {number} {how} from {before:,} to {after:,}"]


def _name(row: Row) -> str:
    return " ".join(str(row[part]) for part in ("arch", "case", "direction") if part in row)


def check(path: Path) -> int:
    """Compare, tell what differs, and return the exit status."""
    table = json.loads(path.read_text("utf-8"))
    version = nearest(list(table["composed"]))
    judged = _number(VERSION) <= max(map(_number, table["composed"]))
    problems = []
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: launches are not compared")
    else:
        problems = differences(table["launches"], launches(), _LAUNCHES)
    found = differences(table["composed"][version], composed(), _COMPOSED)
    for words in [*problems, *found]:
        print(words, file=sys.stderr)
    if judged:
        problems += found
    else:
        print(
            f"PyTorch {VERSION} is newer than all that were counted, {len(found)} differences from "
            f"{version} are not judged; `python bench/counts.py --write` adds it to the table"
        )
    if problems:
        print(
            "if that is meant, update the table by `python bench/counts.py --write`",
            file=sys.stderr,
        )
    state = f"{len(problems)} differences" if problems else "as in the table"
    print(f"PyTorch {VERSION}: operators, launches and bytes of a call {state}")
    return 1 if problems else 0


def main() -> int:
    """Exit status: 0 if all is as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="count and write the table")
    what.add_argument("--check", action="store_true", help="compare with the table")
    parser.add_argument("--table", type=Path, default=TABLE, help="file of the table")
    options = parser.parse_args()
    if options.write:
        write(options.table)
        return 0
    return check(options.table)


if __name__ == "__main__":
    sys.exit(main())

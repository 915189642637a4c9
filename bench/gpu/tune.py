# SPDX-License-Identifier: Apache-2.0
"""Stage: the search of ``fastvit tune`` within the stage's time.

The run's ``tuned.json`` has what was found; copied into ``kernels/`` it is the table that the
kernels read, and ``python -m gpu.tune FOLDER [FOLDER ...]`` merges those of several cards for that.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpu.device import Device
from gpu.record import Record

FILE = "tuned.json"
_COUNTS = ("measured", "spilled", "slow", "late")


def run(device: Device, record: Record) -> None:
    from fastvit.tuning import problems, report, session

    dry = device.device.type != "cuda"
    target = session.target(device.device, "bfloat16")
    posed = _toys(target.arch) if dry else problems.default(problems.OPS[:3], "half", target.arch)
    outcomes = []
    found = session.run(
        posed, target, max(record.left(), 1.0), record.fail,
        processes=1 if dry else session.workers(), variants=1 if dry else None,
        late=lambda problem: record.miss(problem.name),
    )  # fmt: skip
    for outcome in found:
        outcomes.append(outcome)
        session.keep(record.folder / FILE, target, outcomes)
        print(report.line(outcome), flush=True)
        record.add(
            what="tuned",
            problem=outcome.problem.name,
            built_in=outcome.before._asdict(),
            chosen=outcome.after._asdict(),
            changes=report.changes(outcome.built_in, outcome.chosen),
            refused=outcome.refused,
            counts={
                name: getattr(outcome, name) for name in ("measured", "spilled", "slow", "late")
            },
        )


def _toys(arch: str) -> list[Any]:
    from fastvit.kernels.tuned import Attention

    from fastvit.tuning import problems

    layers = list(problems.layers((3, 8, 16), (2,), 1, (5, 4), "half", arch))
    return [Attention("gpsa", "forward", "half", 1, 1, 20, 16, (4, 5)), layers[0]]


def merged(folders: Iterable[Path]) -> dict[str, Any]:
    """The tables of runs, of which a later one replaces an earlier for its architecture and
    version of Triton.
    """
    found: dict[str, Any] = {}
    for folder in folders:
        for arch, versions in json.loads((folder / FILE).read_text("utf-8")).items():
            found[arch] = {**found.get(arch, {}), **versions}
    return found


if __name__ == "__main__":
    from fastvit.kernels.tuned import text

    print(text(merged(map(Path, sys.argv[1:]))), end="")

# SPDX-License-Identifier: Apache-2.0
"""Stage: images to tokens: every kernel against float64, then in turns with other ways."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from gpu import ceilings
from gpu.agreement import Task, compare_all
from gpu.device import Device
from gpu.patch_compare import cases, paths
from gpu.patch_contest import Contest
from gpu.record import Record
from gpu.verify import write_verified

# Seconds that have to be left for a compilation to be begun.
_COMPILATION = 10.0
_PIXELS = ("float", "uint8")


def run(device: Device, record: Record) -> None:
    torch._dynamo.config.recompile_limit = 256
    _agreement(device, record)
    rates = ceilings.read(record)
    # Compilation takes long: a part of the time is kept for it.
    reserve = 0.5 * record.left()
    for problem, dtype in device.plan.embeddings:
        for pixels in _PIXELS:
            if record.left() < reserve:
                record.miss(f"{problem.name} {dtype} {pixels}")
                continue
            contest = Contest(device, record, problem, dtype, pixels)
            contest.run(rates, "eager", contest.eager())
            device.release()
    for problem, dtype in device.plan.embeddings:
        for pixels in _PIXELS:
            if record.left() < _COMPILATION:
                record.miss(f"{problem.name} {dtype} {pixels}, compiled")
                continue
            # Else an earlier compilation for another shape could serve.
            torch._dynamo.reset()
            contest = Contest(device, record, problem, dtype, pixels)
            contest.run(rates, "compiled", contest.compiled())
            device.release()


def _agreement(device: Device, record: Record) -> None:
    # Kernels are checked anew: only a process that made a check has its verdict to report.
    cache = {"FASTVIT_CACHE": str(Path(os.environ["FASTVIT_CACHE"]) / "patch_embed")}
    tasks = [
        Task(path, ("gpu.patch_compare", path), len(cases(device, path)), cache)
        for path in paths(device)
    ]
    verdicts = compare_all(device, record, tasks, keep=0.5 * record.left())
    # What disagrees at these sizes is not to be shipped as verified, whatever its own check says.
    if not record.data["problems"]:
        write_verified(record.folder, verdicts, add=True)

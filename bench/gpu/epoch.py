# SPDX-License-Identifier: Apache-2.0
"""Stage: minutes per ImageNet epoch of the rows of the papers' tables on this GPU, as
``pytest bench/ --benchmark`` measures them, in bfloat16.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import torch

from fastvit.benchmark.counter import count
from fastvit.benchmark.library import build_library
from fastvit.benchmark.machine import Machine, this_machine
from fastvit.benchmark.measure import Settings, measure_row
from fastvit.benchmark.report import Run, write_json, write_report
from fastvit.benchmark.result import Result
from fastvit.benchmark.rows import Row, load_rows
from gpu.device import Device
from gpu.model_rows import dry_row
from gpu.record import Record

# The most valuable first; the others follow in the order of the tables, networks that only the
# library has at the end.
_FIRST = (
    "ConViT-S", "ViT_C-4GF", "DeiT-S", "ViT_P-4GF", "ConViT-B", "ViT_C-18GF", "ConViT-B+",
    "ViT_C-36GF", "ConViT-S+", "ViT_C-1GF",
)  # fmt: skip
# Seconds for the steps of a row, of each kind; building and comparing come on top.
_SECONDS = 2.0


def run(device: Device, record: Record) -> None:
    dry = bool(device.note)
    settings = Settings(
        device.device, torch.bfloat16, batch=2 if dry else None, steps=2 if dry else None,
        seconds=_SECONDS,
    )  # fmt: skip
    made = Run(_machine(device), settings.dtype_name, [])
    for row in _dry_rows() if dry else ordered(load_rows()):
        if record.left() < 0:
            record.miss(row.name)
            continue
        result = measure_row(row, settings)
        if _lacks_library(result):
            record.miss(f"{row.name} ({result.reason})")
            continue
        made.results.append(result)
        record.add(**result.to_dict())
        if result.status != "ok":
            print(result.traceback or "", flush=True)
            record.fail(f"{row.name}: {(result.reason or result.status).splitlines()[0]}")
        write_json(made, record.folder)
        device.release()
        # A kernel that broke the device would fail all that follows: this raises then.
        device.synchronize()
    if made.results:
        _write(made, record)


def ordered(rows: Sequence[Row]) -> list[Row]:
    """The rows by value."""
    rank = {name: index for index, name in enumerate(_FIRST)}
    return sorted(rows, key=lambda row: (row.fastvit is None, rank.get(row.name, len(rank))))


def _dry_rows() -> list[Row]:
    row = dry_row("ConViT-S")
    with torch.device("meta"):
        verified = count(build_library(row), row.image_size)
    return [dataclasses.replace(row, verified=verified)]


def _machine(device: Device) -> Machine:
    # The package of the stages is a copy outside the checkout, whose commit the run knows.
    commit = os.environ.get("FASTVIT_GPU_COMMIT") or None
    return dataclasses.replace(this_machine(device.device), commit=commit)


def _lacks_library(result: Result) -> bool:
    """Whether the row's library is not installed, which is no fault."""
    return (result.reason or "").startswith(("ImportError", "ModuleNotFoundError"))


def _write(made: Run, record: Record) -> None:
    try:
        write_report(made, record.folder)
    except ImportError as error:
        record.data["picture"] = f"none: {error}"

# SPDX-License-Identifier: Apache-2.0
"""Stage: every Triton kernel against float64, forward and every gradient.

Groups run in processes of their own, several at once: compilation takes most of the time, and a
crash of one leaves the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

from gpu.device import Device, Processor
from gpu.record import Record
from gpu.verify import write_verified


class Task(NamedTuple):
    """A process that prints a line of JSON for each comparison."""

    label: str
    #: Module and arguments.
    command: tuple[str, ...]
    comparisons: int
    environment: dict[str, str]


class _Running(NamedTuple):
    task: Task
    process: subprocess.Popen[str]
    output: IO[str]


def run(device: Device, record: Record) -> None:
    tasks = [
        Task(group.label, ("gpu.compare", str(index)), len(group.layouts) * len(group.dtypes), {})
        for index, group in enumerate(device.plan.groups)
    ]
    write_verified(record.folder, compare_all(device, record, tasks))


def compare_all(
    device: Device, record: Record, tasks: Sequence[Task], *, keep: float = 0.0
) -> dict[str, str]:
    """Record all comparisons; the verdicts on kernels.

    Args:
        keep: seconds that are to be left afterwards.
    """
    waiting = list(tasks)
    running: list[_Running] = []
    verdicts: dict[str, str] = {}
    while waiting or running:
        left = record.left() - keep
        while waiting and len(running) < device.workers and left > 0:
            running.append(_start(waiting.pop(0), dry=isinstance(device, Processor)))
        for one in [r for r in running if r.process.poll() is not None]:
            running.remove(one)
            verdicts |= _collect(one, record)
        if left < -20:
            for one in running:
                one.process.kill()
                one.process.wait()
                record.miss(f"{one.task.label}: the rest")
                verdicts |= _collect(one, record)
            running = []
        if left <= 0 and not running:
            break
        time.sleep(0.05)
    for task in waiting:
        record.miss(task.label)
    return verdicts


def _start(task: Task, *, dry: bool) -> _Running:
    output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
    command = [sys.executable, "-m", *task.command, *(["--dry"] if dry else [])]
    # One thread each: several are compiling.
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **task.environment},
    )  # fmt: skip
    return _Running(task, process, output)


def _collect(one: _Running, record: Record) -> dict[str, str]:
    """Record what a process printed; its verdicts on kernels."""
    one.output.seek(0)
    lines = one.output.read().splitlines()
    one.output.close()
    verdicts: dict[str, str] = {}
    seen = 0
    for line in filter(lambda line: line.startswith("{"), lines):
        case: dict[str, Any] = json.loads(line)
        if "verified" in case:
            verdicts |= case["verified"]
        elif "unverified" in case:
            record.data["unverified"] = case["unverified"]
        else:
            seen += 1
            record.add(**case)
            if not case["ok"]:
                record.fail(_problem(case))
    if seen < one.task.comparisons and one.process.returncode != -9:
        last = lines[-1] if lines else "no output"
        record.fail(f"{one.task.label}: {seen} of {one.task.comparisons} comparisons, then: {last}")
    return verdicts


def _problem(case: dict[str, Any]) -> str:
    name = " ".join((case["group"], case["layout"], case["dtype"]))
    if "error" in case:
        return f"{name}: {case['error']}"
    wrong = [t for t in case["tensors"] if not (t["ok"] and t["deterministic"])]
    said = [
        f"{t['name']} differs between runs" if t["ok"]
        else f"{t['name']} error {t['error']:.2e}, limit {t['limit']:.2e}"
        for t in wrong
    ]  # fmt: skip
    return f"{name}: {'; '.join(said)}"

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
from typing import IO, Any, NamedTuple

from gpu.device import Device, Processor
from gpu.record import Record
from gpu.shapes import Group
from gpu.verify import write_verified


class _Running(NamedTuple):
    group: Group
    process: subprocess.Popen[str]
    output: IO[str]


def run(device: Device, record: Record) -> None:
    waiting = list(enumerate(device.plan.groups))
    running: list[_Running] = []
    verdicts: dict[str, str] = {}
    while waiting or running:
        while waiting and len(running) < device.workers and record.left() > 0:
            index, group = waiting.pop(0)
            running.append(_start(index, group, dry=isinstance(device, Processor)))
        for one in [r for r in running if r.process.poll() is not None]:
            running.remove(one)
            verdicts |= _collect(one, record)
        if record.left() < -20:
            for one in running:
                one.process.kill()
                one.process.wait()
                record.miss(f"{one.group.label}: the rest")
                verdicts |= _collect(one, record)
            running = []
        if record.left() <= 0 and not running:
            break
        time.sleep(0.05)
    for _, group in waiting:
        record.miss(group.label)
    write_verified(record.folder, verdicts)


def _start(index: int, group: Group, *, dry: bool) -> _Running:
    output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
    command = [sys.executable, "-m", "gpu.compare", str(index), *(["--dry"] if dry else [])]
    # One thread each: several are compiling.
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return _Running(group, process, output)


def _collect(one: _Running, record: Record) -> dict[str, str]:
    """Record what a group printed; its verdicts on kernels."""
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
    expected = len(one.group.layouts) * len(one.group.dtypes)
    if seen < expected and one.process.returncode != -9:
        last = lines[-1] if lines else "no output"
        record.fail(f"{one.group.label}: {seen} of {expected} comparisons, then: {last}")
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

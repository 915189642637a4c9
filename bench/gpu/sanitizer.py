# SPDX-License-Identifier: Apache-2.0
"""Stage: compute-sanitizer looks for bad accesses and for races, both at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import IO

from gpu.device import Device
from gpu.record import Record

_TOOLS = ("memcheck", "racecheck", "initcheck")
_SHOWN = 3000
# Seconds that a tool may take over the stage's time.
_LATE = 20.0


def run(device: Device, record: Record) -> None:
    script = [sys.executable, "-m", "gpu.sanitized", *(["--dry"] if device.note else [])]
    # Each allocation by itself, so that none ends inside a larger one.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sound = _prepare(script, len(device.plan.sanitized), record)
    script += map(str, sound)
    running: dict[str, tuple[subprocess.Popen[str], IO[str]]] = {}
    for tool in _TOOLS:
        prefix = device.sanitizer(tool)
        if isinstance(prefix, str):
            record.add(name=tool, outcome=f"not run: {prefix}")
            continue
        # Not a pipe: what a tool watches outlives the tool, and would hold it open.
        written = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        process = subprocess.Popen(
            [*prefix, *script], env=environment, text=True,
            stdout=written, stderr=subprocess.STDOUT,
        )  # fmt: skip
        running[tool] = process, written
    for tool, (process, written) in running.items():
        late = False
        try:
            process.wait(timeout=max(record.left(), 1.0) + _LATE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            late = True
        with written:
            written.seek(0)
            output = written.read()
        if late:
            record.miss(tool)
            record.add(name=tool, outcome="not reached in time", output=output[-_SHOWN:])
            continue
        calls = sum(line.startswith("ran ") for line in output.splitlines())
        summary = next((x for x in reversed(output.splitlines()) if "SUMMARY" in x), "")
        outcome = summary.strip("= ") or "no summary"
        record.add(name=tool, outcome=outcome, calls=calls, output=output[-_SHOWN:])
        if process.returncode:
            record.fail(f"{tool}: status {process.returncode}, {calls} calls, {outcome}")
        elif calls != len(sound):
            record.fail(f"{tool}: {calls} of {len(sound)} calls ran")


def _prepare(script: list[str], calls: int, record: Record) -> list[int]:
    """Each call by itself without a tool: compilation and the kernels' own checks are then done,
    and kept. The numbers of those that end well.

    Raises:
        RuntimeError: a call hangs, or none ends well.
    """
    running = [subprocess.Popen([*script, str(index)]) for index in range(calls)]
    try:
        failed = [i for i, p in enumerate(running) if p.wait(timeout=max(record.left(), 1.0))]
    except subprocess.TimeoutExpired as error:
        raise RuntimeError("the calls take too long even without a tool") from error
    finally:
        for process in running:
            process.kill()
    if failed:
        record.fail(f"without a tool, calls {failed} fail")
    if len(failed) == calls:
        raise RuntimeError("all calls fail without a tool")
    return [i for i in range(calls) if i not in failed]

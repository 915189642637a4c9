# SPDX-License-Identifier: Apache-2.0
"""Runs of examples/train.py in children of a process that has imported torch, killed on demand.

Started by test_train_example.py. Each line of the input is a JSON object: ``argv`` for the script,
and perhaps ``lines`` and ``delay`` (kill when the log has grown by so many lines, and then so many
seconds later) or ``call`` and ``count`` (kill at the so manieth call of that function). Each line
of the output is the child's exit code, negative for a signal.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import torch

# Imported here so that children need not: the first step of an optimiser imports torch._dynamo.
import torch._dynamo

import fastvit.models  # noqa: F401

TRAIN = Path(__file__).parents[1] / "examples" / "train.py"
sys.path.insert(0, str(TRAIN.parent))

importlib.import_module("training.loop")


def die_at(call: str, count: int) -> None:
    """Let this process die at a call: instead of it, or half-way through a file."""
    owner, name = (torch, "save") if call == "torch.save" else (os, call.removeprefix("os."))
    original, left = getattr(owner, name), count

    def counted(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            if owner is torch:
                whole = io.BytesIO()
                original(args[0], whole)
                args[1].write(whole.getbuffer()[: whole.tell() // 2])
                args[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def child(request: dict) -> None:
    if "call" in request:
        die_at(request["call"], request["count"])
    sys.argv = [str(TRAIN), *request["argv"]]
    runpy.run_path(str(TRAIN), run_name="__main__")


def count_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def wait(pid: int, request: dict) -> int:
    """Kill the child as the request says, and return what it ended with."""
    if "lines" in request:
        log = Path(request["argv"][request["argv"].index("--out") + 1]) / "log.jsonl"
        goal = count_lines(log) + request["lines"]
        while count_lines(log) < goal:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        time.sleep(request["delay"])
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            # The answers go to the real output; what a run prints does not.
            os.dup2(2, 1)
            try:
                child(request)
            except SystemExit as end:
                sys.stderr.write(f"{end}\n")
                os._exit(1)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(2)
            os._exit(0)
        sys.stdout.write(f"{wait(pid, request)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

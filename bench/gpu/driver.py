# SPDX-License-Identifier: Apache-2.0
"""Runs the stages, each in a process of its own, and writes the summary after each."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from gpu import plot, summary
from gpu.package import BENCH, ROOT, Package
from gpu.record import MISSED, read_all, update
from gpu.stages import Stage, chosen

#: Of a run on a GPU, which costs money; of a dry one only so that it ends.
BUDGET, DRY_BUDGET = 480.0, 1800.0
#: Seconds over its share before a stage is ended: one compilation may just have begun. What a stage
#: takes of them the later ones lack, so that all stages together end this long after the budget at
#: the latest.
GRACE = 40.0
# Less is not worth a process.
_LEAST = 10.0
# A killed process whose device does not answer may stay.
_KILLED = 5.0


class Run:
    """One run into one folder."""

    def __init__(
        self, out: Path | None, names: list[str] | None, *, dry: bool, budget: float | None = None
    ) -> None:
        self.dry = dry
        self.budget = budget or (DRY_BUDGET if dry else BUDGET)
        self.stages = chosen(names, dry=dry)
        self.commit = _commit()
        self.out = (out or _default_folder(self.commit, dry)).resolve()
        self._start = time.monotonic()

    def run(self) -> int:
        """All stages; 1 if one failed, whatever happened to the others."""
        self.out.mkdir(parents=True, exist_ok=True)
        print(f"fastvit {self.commit or 'without a commit'}, results in {self.out}", flush=True)
        with tempfile.TemporaryDirectory(prefix="fastvit-gpu-") as folder:
            self.package = Package(Path(folder))
            self.package.prepare()
            for number, stage in enumerate(self.stages):
                rest = sum(s.seconds for s in self.stages[number:])
                self._run(stage, self._left() * stage.seconds / rest)
                self._report("No picture: the run is not over.")
        # Last, and with the tables on disk: drawing takes seconds, and fails where it may.
        self._report()
        print(summary.stage_table(read_all(self.out)))
        records = read_all(self.out)
        ok = all(records.get(s.name, {}).get("status") in ("ok", MISSED) for s in self.stages)
        return 0 if ok else 1

    def _left(self) -> float:
        return self.budget - (time.monotonic() - self._start)

    def _run(self, stage: Stage, seconds: float) -> None:
        if self._left() < _LEAST:
            update(self.out, stage.name, {"status": MISSED, "seconds": 0.0})
            return
        print(f"{stage.name}: {stage.what}", flush=True)
        # What an earlier run left in this folder is not this run's.
        update(self.out, stage.name, {"status": "died", "problems": ["left no results"]})
        command = [sys.executable, "-m", "gpu.worker", stage.name, str(self.out)]
        command += ["--seconds", f"{seconds:.0f}", *(["--dry"] if self.dry else [])]
        start = time.monotonic()
        limit = min(seconds, self._left()) + GRACE
        status, output = _finish(command, self._environment(), limit)
        taken = time.monotonic() - start
        record = read_all(self.out).get(stage.name, {})
        record["seconds"] = round(taken, 1)
        if record.get("status") in ("running", "died"):
            how = "timed out" if status is None else f"died with status {status}"
            record.update(status="died", problems=[f"{how}: {_last_line(output)}"])
        if record["status"] != "ok":
            record["output"] = output[-4000:]
            print(output[-4000:], flush=True)
        update(self.out, stage.name, record)
        print(f"{stage.name}: {record['status']} ({taken:.0f} s)", flush=True)

    def _environment(self) -> dict[str, str]:
        package = self.package.path()
        added = {
            "PYTHONPATH": os.pathsep.join([str(package), str(BENCH)]),
            "PYTHONUNBUFFERED": "1",
            # Verdicts of this run only, which the processes of all its stages share.
            "FASTVIT_CACHE": str(self.package.source.parent / "verdicts"),
            "FASTVIT_GPU_FOLDER": str(self.package.source.parent),
            "FASTVIT_GPU_COMMIT": self.commit or "",
        }
        if self.dry:
            added |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
            # Shapes are tiny: more threads cost more than they give.
            added["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
        return {**os.environ, **added}

    def _report(self, picture: str | None = None) -> None:
        """The summary of what there is, with a picture or the sentence that stands for it."""
        try:
            records = read_all(self.out)
            picture = picture or plot.write(self.out, records, dry=self.dry)
            summary.write(self.out, records, picture, dry=self.dry)
        # A fault of the report must not end the stages, whose results are on disk.
        except Exception:
            traceback.print_exc()


def _finish(command: list[str], env: dict[str, str], limit: float) -> tuple[int | None, str]:
    """Status (None: past the limit) and output; processes that it started end with it."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        # A session of its own, so that children can be ended too, and only they.
        process = subprocess.Popen(
            command, env=env, cwd=tempfile.gettempdir(), stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILLED)
        output.seek(0)
        return status, output.read()


def _last_line(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1].strip() if lines else "no output"


def _commit() -> str | None:
    """Short hash, with +changes if files other than earlier results differ from it."""
    hashed = _git("rev-parse", "--short=12", "HEAD")
    if not hashed:
        return None
    changed = _git("status", "--porcelain", "--", ".", ":!bench/results", ":!reports")
    return hashed + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    # A checkout that was copied here may belong to another user.
    return _ask("git", "-c", "safe.directory=*", "-C", str(ROOT), *arguments)


def _default_folder(commit: str | None, dry: bool) -> Path:
    if dry:
        return ROOT / "reports" / "gpu-dry"
    gpu = _ask("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "unknown-gpu"
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.splitlines()[0].lower()).strip("-")
    day = datetime.date.today().isoformat()
    return ROOT / "bench" / "results" / slug / f"{day}-{(commit or 'no-commit').replace('+', '-')}"


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

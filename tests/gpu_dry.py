# SPDX-License-Identifier: Apache-2.0
"""``make gpu`` where there is no GPU, for the tests that look at what it leaves."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parents[1] / "bench"
#: Only so that a run that hangs ends: all stages take three minutes of two idle cores, and much
#: longer of busy ones.
LIMIT = 1500


def dry(out: Path, *stages: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A dry run into a folder: of all stages, or of those that are named."""
    chosen = [argument for stage in stages for argument in ("--stage", stage)]
    return subprocess.run(
        [sys.executable, str(BENCH / "gpu"), "--dry", "--out", str(out), *chosen],
        cwd=out.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def results(out: Path) -> dict[str, dict[str, Any]]:
    """Of every stage by name. Other files have a "machine", too, which is no stage."""
    return gpu("record").read_all(out)


def gpu(module: str) -> Any:
    """A module of ``bench/gpu``, which is not installed; what else lies in ``bench/`` stays out."""
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module(f"gpu.{module}")
    finally:
        sys.path.remove(str(BENCH))

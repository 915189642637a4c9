# SPDX-License-Identifier: Apache-2.0
"""What a stage found, on disk after every case, so that nothing is lost when it dies."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from gpu.stages import BY_NAME, STAGES

MISSED = "not reached"


class Record:
    """The results of one stage; ``status`` is ok, failed, or running while it is.

    Args:
        folder: of the run's files.
        name: of the stage.
        seconds: after which the stage should begin nothing new.
    """

    def __init__(self, folder: Path, name: str, seconds: float) -> None:
        self.folder, self.name = folder, name
        self._end = time.monotonic() + seconds
        self.data: dict[str, Any] = {"status": "running", "problems": [], "missed": [], "cases": []}

    def left(self) -> float:
        """Seconds that remain, negative when they are spent."""
        return self._end - time.monotonic()

    def add(self, **case: Any) -> None:
        # The times of a contest know the clocks around them.
        clocks = getattr(case.get("contenders"), "clocks", None)
        if clocks:
            case["clocks"] = clocks
        self.data["cases"].append(case)
        self.save()

    def miss(self, case: str) -> None:
        self.data["missed"].append(case)

    def fail(self, problem: str) -> None:
        self.data["problems"].append(problem)
        self.save()

    def close(self) -> bool:
        """Write the verdict; whether it is good."""
        self.data["status"] = "failed" if self.data["problems"] else "ok"
        update(self.folder, self.name, self.data)
        return not self.data["problems"]

    def save(self) -> None:
        # Hundreds of times a stage, while the GPU waits: indented, each takes twice as long.
        update(self.folder, self.name, self.data, indent=None)


def update(folder: Path, name: str, data: dict[str, Any], *, indent: int | None = 1) -> None:
    """Put a stage's results into its file, whose other stages stay; a reader sees whole files."""
    path = folder / BY_NAME[name].file
    whole = {**_read(path), name: data}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(whole, indent=indent) + "\n", "utf-8")
    os.replace(temporary, path)


def read_all(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of every stage that left some, by name."""
    found: dict[str, dict[str, Any]] = {}
    for file in dict.fromkeys(stage.file for stage in STAGES):
        found.update(_read(folder / file))
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}

# SPDX-License-Identifier: Apache-2.0
"""``epoch.json``, ``epoch.md`` and ``epoch.svg`` with its dark variant: a run as files."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvit.benchmark.files import write_text
from fastvit.benchmark.machine import Machine
from fastvit.benchmark.pictures import theme
from fastvit.benchmark.plot import epoch_picture
from fastvit.benchmark.result import FORMULA, IMAGES_PER_EPOCH, Result
from fastvit.benchmark.table import (
    CITATION_NOTE,
    citation_table,
    epoch_table,
    inference_table,
)
from fastvit.benchmark.text import bullets, failures, notes


@dataclass
class Run:
    """The results of one run, in the order of the tables, and what it was made with."""

    machine: Machine
    dtype: str
    results: list[Result]
    interrupted: bool = False
    full: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The content of ``epoch.json``."""
        return {
            "rows": [result.to_dict() for result in self.results],
            "machine": self.machine.to_dict(),
            **self.machine.origin(),
            "date": now(),
            "dtype": self.dtype,
            "images_per_epoch": IMAGES_PER_EPOCH,
            "formula": FORMULA,
            "interrupted": self.interrupted,
        }


def text_report(run: Run) -> str:
    """What a run prints: machine line, tables, the sentences below them, failures."""
    parts = [run.machine.line(run.dtype), epoch_table(run.results)]
    said = notes(run.results, device=run.machine.device, interrupted=run.interrupted)
    parts += [bullets(said), "Inference", inference_table(run.results)]
    if run.full:
        parts += ["Citations", citation_table(run.results), bullets([CITATION_NOTE])]
    failed = failures(run.results)
    if failed:
        parts += ["Not measured", bullets(failed)]
    return "\n\n".join(parts)


def markdown_report(run: Run) -> str:
    """The content of ``epoch.md``."""
    said = notes(run.results, device=run.machine.device, interrupted=run.interrupted)
    parts = [
        "# Minutes per ImageNet epoch",
        run.machine.line(run.dtype).replace("|", "·"),
        theme.shown("epoch", "Minutes per ImageNet epoch, library, fastvit and the papers"),
        epoch_table(run.results, markdown=True),
        "\n".join(f"- {note}" for note in said),
        "## Inference",
        inference_table(run.results, markdown=True),
    ]
    if run.full:
        parts += ["## Citations", citation_table(run.results, markdown=True), CITATION_NOTE]
    failed = failures(run.results)
    if failed:
        parts += ["## Not measured", "\n".join(f"- {line}" for line in failed)]
    return "\n\n".join(parts) + "\n"


def write_report(run: Run, folder: Path) -> list[Path]:
    """Write the four files into ``folder``, each whole or not at all, and return their paths.

    Raises:
        ImportError: matplotlib is not installed; tables and samples are written before that.
        OSError: the folder cannot be made or written.
    """
    written = [
        write_json(run, folder),
        write_text(folder / "epoch.md", markdown_report(run)),
    ]
    picture = epoch_picture(run.results, run.machine.line(run.dtype))
    return written + theme.write(folder, "epoch", picture)


def write_json(run: Run, folder: Path) -> Path:
    """Write ``epoch.json`` alone: cheap enough to do after every row."""
    content = json.dumps(_finite(run.to_dict()), indent=1, ensure_ascii=False, allow_nan=False)
    return write_text(folder / "epoch.json", content + "\n")


def now() -> str:
    """The date and time of a report."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _finite(value: Any) -> Any:
    """JSON has no NaN: a figure that is none becomes null; the row's reason names it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

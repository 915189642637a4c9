# SPDX-License-Identifier: Apache-2.0
"""Result sets on disk: what they were measured on, and whether the sources have changed since."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gpu.fingerprint import fingerprint
from gpu.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]

_NEVER = datetime.min.replace(tzinfo=timezone.utc)

#: Folders of processors, the one whose figures come first at the head. What a processor can do and
#: its name does not say stands here.
PROCESSORS = {"intel-xeon-amx-2-cores": " with AMX", "amd-epyc-2-cores": ""}

#: How the files of the tables are made.
COMMANDS = {
    "modules.json": "pytest bench/test_modules.py --benchmark --report DIR",
    "epoch.json": "pytest bench/test_epoch.py --benchmark --report DIR",
}


@dataclass(frozen=True)
class Source:
    """One file of results, or the files of one run of ``make gpu``.

    Attributes:
        path: of the file or folder.
        data: its content; of a folder, the records by stage.
        root: of the checkout whose sources count as those of now.
    """

    path: Path
    data: dict[str, Any]
    root: Path = ROOT

    def link(self, base: Path) -> str:
        """For a document in the folder ``base``."""
        return os.path.relpath(self.path, base).replace(os.sep, "/")

    @property
    def processor(self) -> str:
        """Name of the GPU, or of the processor with what its folder knows of it."""
        if self.data["machine"].get("gpu"):
            return self.data["machine"]["gpu"]
        cpu, _, cores = self.data["machine"]["cpu"].partition(",")
        cpu = cpu.replace("(R)", "").replace(" Processor", "")
        return f"{cpu}{PROCESSORS.get(self.folder, '')},{cores}"

    @property
    def short(self) -> str:
        """The same without cores, for a picture."""
        return self.processor.partition(",")[0].replace(" with", "").removeprefix("Intel ")

    @property
    def folder(self) -> str:
        """Name of the machine's folder."""
        return self.path.relative_to(self.root / "bench" / "results").parts[0]

    def head(self, dtype: str, base: Path, *, command: str | None = None) -> str:
        """Machine, versions, commit, dtype and command in a line of italics, for a document in the
        folder ``base``; below it, if the sources have changed, a sentence.
        """
        machine = self.data["machine"]
        where = (
            self.processor
            if machine.get("gpu")
            else f"{self.processor}, {machine['threads']} threads"
        )
        versions = ", ".join(f"{name} {v}" for name, v in self.data["versions"].items())
        command = "make gpu" if machine.get("gpu") else command or COMMANDS[self.path.name]
        parts = [
            where,
            versions,
            dtype,
            f"commit {self.data['commit'] or 'none'}",
            f"`{command}`",
            f"samples: [{self.path.name}]({self.link(base)})",
        ]
        return f"*{' · '.join(parts)}*" + self.stale()

    def stale(self, groups: Sequence[str] = ("gpsa", "conv_stem", "patch_embed")) -> str:
        """A sentence if the sources of these ops are others than those measured; else nothing.

        Results that carry no fingerprint say by their commit what they are of.
        """
        changed = sorted(set(groups) & stale_groups(self.data, self.root))
        if not changed:
            return ""
        return f"\n\n**The sources of {', '.join(changed)} changed since.**"


def stale_groups(data: dict[str, Any], root: Path) -> set[str]:
    """The ops whose sources are not those that were measured, as far as the results know."""
    now = fingerprint(root)
    return {
        group for group, value in _fingerprint(data).items() if group in now and now[group] != value
    }


def _fingerprint(data: dict[str, Any]) -> dict[str, str]:
    """Of a file; of records, that of any stage: all of a run are of the same sources."""
    if "fingerprint" in data:
        return data["fingerprint"]
    for record in data.values():
        if isinstance(record, dict) and record.get("fingerprint"):
            return record["fingerprint"]
    return {}


def results(root: Path, name: str) -> list[Source]:
    """The file of that name of every machine that has one: the newest run of each GPU, then the
    processors in their order.
    """
    folder = root / "bench" / "results"
    known = [folder / processor for processor in PROCESSORS]
    others = sorted(path for path in folder.iterdir() if path.is_dir() and path not in known)
    runs = [run.path for run in gpu_runs(root)]
    paths = [path / name for path in (*runs, *known, *others)]
    return [_source(path, root) for path in paths if path.is_file()]


def _source(path: Path, root: Path) -> Source:
    return Source(path, json.loads(path.read_text("utf-8")), root)


def gpu_runs(root: Path) -> list[Source]:
    """The newest run of each GPU; dry runs are none."""
    found: dict[str, Source] = {}
    folders = [file.parent for file in (root / "bench" / "results").glob("*/*/machine.json")]
    runs = [(folder, _records(folder)) for folder in folders]
    measured = [run for run in runs if not any(record.get("dry") for record in run[1].values())]
    # Two of one day have only their time to tell which is newer; their folders end in the commit.
    for folder, records in sorted(measured, key=lambda run: (_date(run[1]), run[0])):
        found[folder.parent.name] = Source(folder, records, root)
    return [found[gpu] for gpu in sorted(found)]


def _date(records: dict[str, Any]) -> datetime:
    """When its last stage began."""
    dates = [r["date"] for r in records.values() if r.get("date")]
    return max((datetime.strptime(d, "%Y-%m-%dT%H:%M:%S%z") for d in dates), default=_NEVER)


def _records(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in dict.fromkeys(stage.file for stage in STAGES):
        path = folder / name
        if path.is_file():
            found.update(json.loads(path.read_text("utf-8")))
    return found

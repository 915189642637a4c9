# SPDX-License-Identifier: Apache-2.0
"""Where results come from, so that a stage builds on another's only if both measured the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gpu.fingerprint import fingerprint
from gpu.package import ROOT
from gpu.record import Record, read_all


def sources() -> dict[str, str]:
    """Fingerprints of what this run measures: the copy that the driver made, else the checkout."""
    folder = os.environ.get("FASTVIT_GPU_FOLDER")
    copy = Path(folder) / "source" if folder else ROOT
    return fingerprint(copy if copy.is_dir() else ROOT)


def trusted(record: Record, name: str) -> dict[str, Any] | None:
    """Another stage's results in the same folder; None where there are none that fit, which the
    record then says.
    """
    other = read_all(record.folder).get(name)
    if other is None or other.get("status") not in ("ok", "failed"):
        problem = "there are none"
    else:
        problem = difference(record.data, other)
    if problem is None:
        return other
    record.data.setdefault("without", {})[name] = problem
    return None


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """What tells two stages' measurements apart, in words; None if nothing does."""
    for what, read in (
        ("kind of run", lambda data: "dry" if data.get("dry") else "measured"),
        ("version of the sources", lambda data: data.get("fingerprint")),
        ("commit", lambda data: _of_machine(data, "commit")),
        ("machine", lambda data: _of_machine(data, "gpu") or _of_machine(data, "cpu")),
        ("set of versions", lambda data: _of_machine(data, "versions")),
    ):
        here, there = read(ours), read(theirs)
        if here != there:
            return f"of another {what}: {there}, here {here}"
    return None


def _of_machine(data: dict[str, Any], key: str) -> Any:
    return data.get("machine", {}).get(key)

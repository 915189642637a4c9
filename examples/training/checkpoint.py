# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or absent, whenever the process is killed.

The newest stands in ``checkpoint.pt``, the one before it in ``checkpoint.previous.pt``. A new one
is written beside them, brought to the disk, and takes its place by renaming. Both are ordinary
files of ``torch.save``, whose zip format has a checksum for every tensor.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, data: bytes | None = None, save: Any = None) -> None:
    """Replace a file as one step: by bytes, or by what ``torch.save`` makes of an object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        if data is None:
            torch.save(save, file)
        else:
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if path.name == NEWEST and path.exists():
        os.replace(path, path.with_name(PREVIOUS))
    os.replace(temporary, path)
    _sync_folder(path.parent)


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; the one before it stays until this one is complete."""
    write(folder / NEWEST, save=state)


def is_whole(path: Path) -> bool:
    """Whether a file is complete and every checksum in it is right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def load(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest whole checkpoint, or None, and the names of damaged files passed over."""
    damaged = []
    for name in (NEWEST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        if is_whole(path):
            return torch.load(path, map_location="cpu", weights_only=True), damaged
        damaged.append(name)
    return None, damaged

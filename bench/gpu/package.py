# SPDX-License-Identifier: Apache-2.0
"""fastvit for the stages, from this checkout, without touching the checkout or the Python."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"

_LEFT_OUT = shutil.ignore_patterns(
    ".*", "__pycache__", "*.so", "*.egg-info", "bench", "build", "dist", "docs", "examples",
    "reports", "shared", "tests",
)  # fmt: skip


class Package:
    """Folders of a run: the sources, the package without its extension, the package as built."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "source"
        self.plain = folder / "plain"
        self.built = folder / "built"

    def prepare(self) -> None:
        """Copy the sources, and map them as an installation would."""
        shutil.copytree(ROOT, self.source, ignore=_LEFT_OUT)
        shutil.copytree(self.source / "fastvit", self.plain / "fastvit")
        shutil.copytree(self.source / "kernels", self.plain / "fastvit" / "kernels")

    def path(self) -> Path:
        """Where stages import fastvit from: as built if the build stage left one."""
        return self.built if (self.built / "fastvit").is_dir() else self.plain

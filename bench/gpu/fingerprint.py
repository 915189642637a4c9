# SPDX-License-Identifier: Apache-2.0
"""A hash of the sources behind each op: what a figure was measured with, whatever was committed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

_SUFFIXES = {".py", ".h", ".cpp", ".cu", ".cuh", ".in", ".json", ".txt"}
_SCOPE = ("kernels", "csrc", "fastvit/ops", "fastvit/layers", "fastvit/reference")
_FILES = ("fastvit/functional.py", "fastvit/_native.py", "CMakeLists.txt", "setup.py")
#: Says which kernels are trusted, not what they do; a run itself writes it.
_VERDICTS = "verified.json"

#: Whose files these are; every other file counts for all ops.
_PATTERNS = {
    "conv_stem": (
        "kernels/stem_*", "fastvit/ops/conv_stem*", "fastvit/ops/stem_choices*",
        "fastvit/ops/batch_statistics.py", "fastvit/*/conv_stem.py", "fastvit/stem_*.json",
    ),
    "patch_embed": (
        "csrc/*", "CMakeLists.txt", "setup.py", "fastvit/_native.py", "fastvit/ops/patch_*",
        "fastvit/ops/uint8_fold.py", "fastvit/*/patch_embed.py",
    ),
    "gpsa": (
        "kernels/backward_*", "kernels/dropout*", "kernels/forward_*", "kernels/kronecker.py",
        "kernels/position_*", "fastvit/ops/gpsa*", "fastvit/ops/mhsa*", "fastvit/ops/content.py",
        "fastvit/*/gpsa.py", "fastvit/*/mhsa.py",
    ),
}  # fmt: skip


def fingerprint(root: Path) -> dict[str, str]:
    """16 hexadecimal digits for each of "gpsa", "conv_stem" and "patch_embed".

    Args:
        root: of a checkout, or of a copy of its sources.
    """
    hashes = {group: hashlib.sha256() for group in _PATTERNS}
    for path in sorted(_sources(root), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        owners = [g for g, patterns in _PATTERNS.items() if any(fnmatch(name, p) for p in patterns)]
        for group in owners or hashes:
            hashes[group].update(f"{name} {digest}\n".encode())
    return {group: found.hexdigest()[:16] for group, found in hashes.items()}


def _sources(root: Path) -> Iterator[Path]:
    yield from (root / name for name in _FILES if (root / name).is_file())
    yield from (p for p in (root / "fastvit").glob("*.json") if p.name != _VERDICTS)
    for folder in _SCOPE:
        for path in (root / folder).rglob("*"):
            hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
            if path.suffix in _SUFFIXES and not hidden and path.is_file():
                yield path

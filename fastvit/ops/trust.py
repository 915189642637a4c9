# SPDX-License-Identifier: Apache-2.0
"""A kernel proves itself on a machine before ``auto`` takes it there.

Most kernels are written where no GPU runs them, and users own GPUs that the authors lack. What is
trusted is a specialisation, named by a key: op, direction, dtype, sizes, launch configuration, a
hash of the sources, compute capability and Triton's version. It is trusted if its key stands in
``verified.json``, which comes with the package, or if a small comparison with PyTorch passed when
it was first needed; the outcome is kept in a file of the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastvit.testing import Agreement

_VERIFIED = Path(__file__).resolve().parent.parent / "verified.json"


class Candidate(NamedTuple):
    """A specialisation and the comparison that it must pass."""

    key: str
    check: Callable[[], Iterable[Agreement]]


class _Verdicts:
    """What is known of each key: an empty string for agreement, else what differed."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.known: dict[str, str] | None = None
        #: Found by this process, for :func:`verified_here`.
        self.found: dict[str, str] = {}
        self.generation = 0

    def load(self) -> dict[str, str]:
        if self.known is None:
            shipped = _read(_VERIFIED)
            self.known = {**_read(_cache_file()), **dict.fromkeys(shipped, "")}
        return self.known

    def record(self, key: str, verdict: str, lasting: bool) -> None:
        self.load()[key] = verdict
        self.found[key] = verdict
        if lasting:
            _add_to_cache(key, verdict)


_verdicts = _Verdicts()


def needs_proof(device: torch.device) -> bool:
    """Whether kernels must prove themselves on a device; the interpreter runs only when asked."""
    return device.type == "cuda"


def trusts(candidate: Candidate, asked: str) -> bool:
    """Whether to run a kernel; if not, the op's other implementation is to serve the call.

    Raises:
        RuntimeError: the kernel's backend was ``asked`` for by name and it failed its check.
    """
    with _verdicts.lock:
        known = _verdicts.load().get(candidate.key)
        if known is None:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                # A check copies to the host, which a capture forbids.
                return asked != "auto"
            known, lasting = _run(candidate)
            _verdicts.record(candidate.key, known, lasting)
            if known and asked == "auto":
                warnings.warn(
                    f"fastvit: a kernel disagrees with PyTorch on this machine and is not "
                    f"used; the torch backend serves instead. {candidate.key}: {known} "
                    f"(kept in {_cache_file()}; deleting the file repeats the check)",
                    RuntimeWarning,
                    stacklevel=2,
                )
    if known and asked != "auto":
        raise RuntimeError(
            f"backend: {asked!r} was asked for, but its kernel failed the check on this machine; "
            f"{candidate.key}: {known} (deleting {_cache_file()} repeats the check)"
        )
    return not known


def _run(candidate: Candidate) -> tuple[str, bool]:
    """The verdict, and whether it holds for later processes, too."""
    try:
        results = list(candidate.check())
    except Exception as error:  # whatever a kernel or its compiler raises is the finding
        # Memory may have been short this time.
        return f"{type(error).__name__}: {error}", False
    if not results:
        return "the check compared nothing", True
    return "; ".join(str(result) for result in results if not result.ok), True


def is_known(candidate: Candidate) -> bool:
    """Whether there is a verdict, which there is not after a capture."""
    with _verdicts.lock:
        return candidate.key in _verdicts.load()


def generation() -> int:
    """Changes with :func:`forget`."""
    return _verdicts.generation


def verified_here() -> dict[str, str]:
    """The checks that this process made: an empty string for each that passed, else the finding."""
    with _verdicts.lock:
        return dict(_verdicts.found)


def verdicts() -> dict[str, str]:
    """All that is known, from the package, from earlier processes and from this one."""
    with _verdicts.lock:
        return dict(_verdicts.load())


def forget() -> None:
    """Drop what this process knows, as after a change of the cache's place."""
    with _verdicts.lock:
        _verdicts.known = None
        _verdicts.found = {}
        _verdicts.generation += 1


def source_hash(*files: Path) -> str:
    """A short hash of sources, wherever they lie."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def cache_directory() -> Path:
    """``FASTVIT_CACHE``, else ``fastvit`` in the user's cache directory."""
    chosen = os.environ.get("FASTVIT_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fastvit"


def _cache_file() -> Path:
    return cache_directory() / "verdicts.json"


def _read(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none, or none that can be read."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _add_to_cache(key: str, verdict: str) -> None:
    """Add a verdict to the file of the user's cache, which other processes may be writing, too:
    readers see the old file or the new. Where nothing can be written, memory must do.
    """
    file = _cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        with os.fdopen(descriptor, "w") as stream:
            json.dump({**_read(file), key: verdict}, stream, indent=1, sort_keys=True)
        os.replace(name, file)
    except OSError:
        return

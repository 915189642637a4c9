# SPDX-License-Identifier: Apache-2.0
"""A kernel proves itself on a machine before ``auto`` takes it there.

Most kernels are written where no GPU runs them, and users own GPUs that the authors lack. What is
trusted is a specialisation, named by a key: op, direction, dtype, sizes, launch configuration, a
hash of the sources, compute capability and Triton's version. It is trusted if its key stands in
``verified.json``, which comes with the package, or if a small comparison with PyTorch passed when
it was first needed; the outcome is kept in a file of the user's cache. While a check runs, a file
beside that one says so, and is locked: where the process does not live to see the end, because the
kernel hung or crashed it, the next one finds the file without its lock and tries once more; the one
after two such ends takes them for the outcome.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from fastvit import _native
from fastvit.testing import Agreement

_VERIFIED = Path(__file__).resolve().parent.parent / "verified.json"


_Plan = TypeVar("_Plan")


class Candidate(NamedTuple):
    """A specialisation and the comparison that it must pass."""

    key: str
    check: Callable[[], Iterable[Agreement]]
    #: What serves where it is not trusted.
    instead: str = "the torch backend"


class _Verdicts:
    """What is known of each key: an empty string for agreement, else what differed."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.known: dict[str, str] | None = None
        #: The part of it that nobody was told: checks that their processes did not survive.
        self.died: dict[str, str] = {}
        #: Found by this process, for :func:`verified_here`.
        self.found: dict[str, str] = {}
        self.generation = 0

    def load(self) -> dict[str, str]:
        if self.known is None:
            kept = {**_read(_cache_file()), **dict.fromkeys(_read(_VERIFIED), "")}
            self.died = _died(kept)
            self.known = {**self.died, **kept}
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
            with _marked(candidate.key):
                known, lasting = _run(candidate)
                _verdicts.record(candidate.key, known, lasting)
            _warn(candidate, asked, "disagrees with PyTorch")
        elif candidate.key in _verdicts.died:
            known = _bury(candidate.key, _verdicts.died.pop(candidate.key))
            _warn(candidate, asked, "did not finish its check")
    if known and asked != "auto":
        raise RuntimeError(
            f"backend: {asked!r} was asked for, but its kernel failed the check on this machine; "
            f"{candidate.key}: {known} (deleting {_cache_file()} repeats the check)"
        )
    return not known


def trusted(
    plans: tuple[_Plan, _Plan], named: Callable[[_Plan], Candidate], asked: str
) -> tuple[_Plan | None, bool]:
    """Of a tuned plan and the one that is built in the first that is trusted, None if neither is;
    and whether that holds for later calls, which it does not during a capture.

    Raises:
        RuntimeError: the backend was ``asked`` for by name and what is built in failed its check.
    """
    tuned, built_in = plans
    lasting = True
    if tuned != built_in:
        candidate = named(tuned)._replace(instead="what is built in")
        # No table makes a call slower than without it, or raise.
        if trusts(candidate, "auto"):
            return tuned, is_known(candidate)
        lasting = is_known(candidate)
    candidate = named(built_in)
    if not trusts(candidate, asked):
        return None, False
    return built_in, lasting and is_known(candidate)


def _warn(candidate: Candidate, asked: str, what: str) -> None:
    finding = _verdicts.load()[candidate.key]
    if finding and asked == "auto":
        warnings.warn(
            f"fastvit: a kernel {what} on this machine and is not used; {candidate.instead} "
            f"serves instead. {candidate.key}: {finding} "
            f"(kept in {_cache_file()}; deleting the file repeats the check)",
            RuntimeWarning,
            stacklevel=3,
        )


def _run(candidate: Candidate) -> tuple[str, bool]:
    """The verdict, and whether it holds for later processes, too."""
    try:
        results = list(candidate.check())
    except Exception as error:  # whatever a kernel or its compiler raises is the finding
        # Memory may have been short this time; what breaks the GPU for the process is no chance.
        return f"{type(error).__name__}: {error}", _gpu_is_lost()
    if not results:
        return "the check compared nothing", True
    return "; ".join(str(result) for result in results if not result.ok), True


def _gpu_is_lost() -> bool:
    """Whether a kernel has made an error after which CUDA refuses everything else."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


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
    """What is known of the kernels at hand, from the package, from earlier processes and from this
    one. The cache may have more: verdicts on other versions of the kernels, which other
    environments may be using.
    """
    with _verdicts.lock:
        known = dict(_verdicts.load())
    # Naming the kernels imports them.
    codes = _codes() if known else []
    return {key: known[key] for key in known if any(f"/{code}/" in key for code in codes)}


def _codes() -> list[str]:
    """What the keys of the kernels at hand have in them, of those that are there at all."""
    # They import this module.
    found = []
    if _native.reason() is None:
        from fastvit.ops import patch_embed_trust

        found.append(patch_embed_trust.code())
    if importlib.util.find_spec("triton") is not None:
        from fastvit.ops import conv_stem_trust, gpsa_trust

        found += [gpsa_trust.code(), conv_stem_trust.code()]
    return found


def forget() -> None:
    """Drop what this process knows, as after a change of the cache's place."""
    with _verdicts.lock:
        _verdicts.known = None
        _verdicts.died = {}
        _verdicts.found = {}
        _verdicts.generation += 1


def source_hash(*files: Path) -> str:
    """A short hash of sources, wherever they lie."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def cache_directory() -> Path:
    """``FASTVIT_CACHE``, else ``fastvit`` in the user's cache directory; without a home, one among
    the temporary files.
    """
    chosen = os.environ.get("FASTVIT_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "fastvit"
    except RuntimeError:
        # In a container a user may have no home.
        return Path(tempfile.gettempdir(), f"fastvit-{os.getuid()}")


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


@contextmanager
def _marked(key: str) -> Iterator[None]:
    """Leave a trace of a check that this process may not survive, for :func:`_died`. Where nothing
    can be written, or locked, there is none.
    """
    marker = _write_marker(key)
    try:
        yield
    finally:
        if marker is not None:
            descriptor, file = marker
            _remove(file)
            os.close(descriptor)


def _write_marker(key: str) -> tuple[int, Path] | None:
    directory = cache_directory()
    name = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=directory, suffix=".tmp")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        earlier = [file for file, marker in _abandoned() if marker.get("key") == key]
        marker = {
            "key": key,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "at": time.strftime("%Y-%m-%d %H:%M:%S"),
            "tries": 1 + len(earlier),
        }
        os.write(descriptor, json.dumps(marker).encode())
        # Its name comes last: others find it whole and locked.
        file = Path(name).with_suffix(_MARKER)
        os.rename(name, file)
        for file_of_earlier in earlier:
            _remove(file_of_earlier)
    except OSError:
        if name is not None:
            os.close(descriptor)
            _remove(Path(name))
        return None
    return descriptor, file


#: Of the file that is there, and locked, while a check runs.
_MARKER = ".check"
#: Processes that a check may not be survived by before it is taken for failed.
_TRIES = 2


def _abandoned() -> Iterator[tuple[Path, dict[str, Any]]]:
    """The markers that nobody holds, with what they say."""
    for file in sorted(cache_directory().glob(f"*{_MARKER}")):
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # One whose check ended between the two calls is no file any more, and a lock may not
            # be seen from another host.
            marker = _read(file) if os.fstat(descriptor).st_nlink else {}
            if marker.get("host") == socket.gethostname():
                yield file, marker
        except OSError:
            # It is held: the check is running.
            continue
        finally:
            os.close(descriptor)


def _died(kept: Container[str]) -> dict[str, str]:
    """The checks that processes did not survive twice, in words: the first time it may have been
    killed for another reason. Of those that were made again, what was left is removed.
    """
    found = {}
    for file, marker in _abandoned():
        key = str(marker.get("key"))
        if key in kept:
            _remove(file)
        elif marker.get("tries", 1) >= _TRIES:
            found[key] = (
                f"process {marker.get('pid')}, which began the check at {marker.get('at')}, ended "
                "before it did, and so did one before: the kernel crashes or hangs, or the "
                "processes were killed"
            )
    return found


def _bury(key: str, finding: str) -> str:
    """Make a check that its processes did not survive a verdict like others, unless another process
    has come to one meanwhile. The verdict.
    """
    kept = _read(_cache_file())
    if key not in kept:
        _add_to_cache(key, finding)
    _verdicts.load()[key] = found = str(kept.get(key, finding))
    _died(_read(_cache_file()))
    return found


def _remove(file: Path) -> None:
    with suppress(OSError):
        file.unlink()

# SPDX-License-Identifier: Apache-2.0
"""The tables of measured launch configurations that this process reads, and what calls took.

Two files: the user's, in the folder of the cache, and the one that comes with the package. Of
equally near entries the user's is taken. A file that cannot be read is left out with a reason,
which ``fastvit.info`` shows. Read once; each problem is looked up once.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fastvit.kernels
from fastvit._version import __version__
from fastvit.kernels import configs, stem_configs
from fastvit.kernels import tuned as tables
from fastvit.kernels.configs import Config
from fastvit.kernels.tuned import Attention, Kernels, Layer, Posed
from fastvit.ops import trust
from fastvit.reference import stage_grids

FILE = "tuned.json"
#: The one that comes with the package.
_SHIPPED = Path(fastvit.kernels.__file__).resolve().parent / FILE

#: How a call came by its configurations.
EXACT, NEAREST, BUILT_IN = "exact", "nearest", "built-in"


class File(NamedTuple):
    """A table of an architecture as this process reads it."""

    path: Path
    measured: dict[str, Any]
    entries: tuple[tables.Entry, ...]
    #: Why it is not read, in words, or empty.
    reason: str


class Choice(NamedTuple):
    """What a problem took."""

    problem: str
    how: str
    #: The problem whose entry it is, and that entry's file; both empty if it is built in.
    entry: str
    file: str
    #: Empty for those that are built in.
    kernels: Kernels


_lock = threading.Lock()
_choices: dict[tuple[str, Posed], Choice] = {}


def own_file() -> Path:
    """The user's table."""
    return trust.cache_directory() / FILE


def triton_version() -> str:
    """Of Triton, the minor version; empty without Triton."""
    try:
        import triton
    except ImportError:
        return ""
    return ".".join(triton.__version__.split(".")[:2])


@functools.cache
def files(arch: str) -> tuple[File, ...]:
    """The tables that there are for an architecture, the user's first."""
    found = []
    for path, own in ((own_file(), True), (_SHIPPED, False)):
        try:
            table = tables.read(path, arch, triton_version())
        except FileNotFoundError:
            continue
        # Whatever is wrong with a file, calls go on without it.
        except Exception as error:
            found.append(File(path, {}, (), f"not a table of configurations: {error}"))
            continue
        measured, entries = table
        version = measured.get("fastvit")
        if own and entries and version != __version__:
            # Kernels change; those that come with the package are compiled before a release.
            reason = f"measured with fastvit {version}; `fastvit tune` measures again"
            found.append(File(path, measured, (), reason))
        elif entries:
            found.append(File(path, measured, entries, ""))
    return tuple(found)


def forget() -> None:
    """Read the tables anew, as after a change of the cache's place."""
    with _lock:
        files.cache_clear()
        stem_forward.cache_clear()
        stem_backward.cache_clear()
        _choices.clear()
    # Plans that were trusted are kept with their configurations.
    trust.forget()


def choices() -> tuple[Choice, ...]:
    """What the calls of this process took, in their order."""
    with _lock:
        return tuple(_choices.values())


def attention(direction: str, posed: configs.Problem) -> dict[str, Config]:
    """The kernels of a call of GPSA or plain attention, in their order."""
    arch, arithmetic, images, heads, tokens, channels, grid, dropout = posed
    op = "mhsa" if grid is None else "gpsa_dropout" if dropout else "gpsa"
    problem = Attention(op, direction, arithmetic, images, heads, tokens, channels, grid)
    found = _chosen(arch, problem).kernels
    return dict(found or problem.built_in(arch))


def layer(arch: str, problem: Layer, built_in: Config) -> Config:
    """The configuration of a kernel of the stem."""
    found = _chosen(arch, problem).kernels
    return found[0][1] if found else built_in


def _chosen(arch: str, problem: Posed) -> Choice:
    choice = _choices.get((arch, problem))
    if choice is None:
        choice = _look_up(arch, problem)
        with _lock:
            _choices[arch, problem] = choice
    return choice


def _look_up(arch: str, problem: Posed) -> Choice:
    read = files(arch)
    entries = [entry for file in read for entry in file.entries]
    found = tables.nearest(problem, entries, arch) if entries else None
    if found is None:
        return Choice(problem.name, BUILT_IN, "", "", ())
    entry, kernels = found
    file = next(str(file.path) for file in read if any(entry is e for e in file.entries))
    how = EXACT if entry.problem == problem else NEAREST
    return Choice(problem.name, how, entry.problem.name, file, kernels)


@functools.cache
def stem_forward(
    posed: stem_configs.Problem,
    images: int,
    size: tuple[int, int],
    strides: tuple[int, ...],
    pixels: bool,
) -> Kernels:
    """The kernels of a stem's forward, in their order."""
    found: list[tuple[str, Config]] = []
    sides, level = [size, *stage_grids(size, strides)], 0
    for kernel, config in stem_configs.forward(posed):
        # A kernel does the convolutions `level` up to `after`.
        after = level + (2 if kernel == "stem_pair" else 1)
        problem = Layer(
            kernel, "forward", posed.arithmetic, images, sides[level],
            posed.widths[level : after + 1], strides[level:after], posed.keeps,
            pixels and kernel in ("stem_first", "stem_pair"),
        )  # fmt: skip
        found.append((kernel, layer(posed.arch, problem, config)))
        level = after
    return tuple(found)


@functools.cache
def stem_backward(
    arch: str,
    arithmetic: str,
    images: int,
    size: tuple[int, int],
    widths: tuple[int, ...],
    strides: tuple[int, ...],
    training: bool,
    pixels: bool,
) -> Kernels:
    """The kernels of a stem's backward that take others than those that are built in, named with
    the convolution that each differentiates, as in ``stem_input_gradient[2]``.
    """
    found = []
    sides = [size, *stage_grids(size, strides)]
    for level in range(len(widths) - 1):
        kernels: tuple[str, ...] = ("stem_input_gradient", "stem_weight_gradient")
        if level == 0:
            # Wide images take other kernels, and their gradient is seldom wanted.
            kernels = ("stem_image_gradient",) if stem_configs.gathers(widths[0]) else ()
        for kernel in kernels:
            problem = Layer(
                kernel, "backward", arithmetic, images, sides[level], widths[level : level + 2],
                strides[level : level + 1], training, pixels and level == 0,
            )  # fmt: skip
            chosen = _chosen(arch, problem).kernels
            found += [(f"{kernel}[{level}]", config) for _, config in chosen]
    return tuple(found)


def report(archs: Sequence[str]) -> dict[str, Any]:
    """For ``fastvit.info``: the files for these architectures, and what this process's calls took,
    as plain data.
    """
    read = [
        {
            "arch": arch,
            "triton": triton_version(),
            "path": str(file.path),
            "gpu": str(file.measured.get("gpu", "")),
            "date": str(file.measured.get("date", "")),
            "entries": len(file.entries),
            "reason": file.reason,
        }
        for arch in archs
        for file in files(arch)
    ]
    taken = [
        {
            **choice._replace(kernels=())._asdict(),
            "kernels": {name: config._asdict() for name, config in choice.kernels},
        }
        for choice in choices()
    ]
    return {"files": read, "choices": taken}


def lines(found: dict[str, Any]) -> list[str]:
    """:func:`report` in words."""
    told = []
    for file in found["files"]:
        if file["reason"]:
            told.append(f"  {file['path']} is not read: {file['reason']}")
            continue
        told.append(
            f"  {file['path']}: {file['entries']} entries for {file['arch']} and Triton "
            f"{file['triton']}, measured on {file['gpu']}, {file['date']}"
        )
    if not any(not file["reason"] for file in found["files"]):
        told.append("  no measured ones for this machine: those that are built in serve")
    for choice in found["choices"]:
        how = choice["how"]
        if how == NEAREST:
            how = f"nearest, {choice['entry']}"
        if how != BUILT_IN and not choice["kernels"]:
            how += ", where those that are built in were not beaten"
        told.append(f"  {choice['problem']}: {how}")
    return told

# SPDX-License-Identifier: Apache-2.0
"""Launch configurations that were measured to be the fastest, and which of them a problem takes.

A table has for each architecture and minor version of Triton what was measured on, and entries: a
problem and its kernels with their configurations, none where those of :mod:`.configs` were not
beaten. ``fastvit tune`` writes it. A problem takes the entry of its own sizes, else that of the
nearest in its class: everything in which two problems must be alike for a configuration to be valid
and to fit in registers. Needs neither torch nor Triton.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import stem_gradient_configs
from .configs import TILE_TOKENS, Config, Problem, _power, backward, forward

#: Doublings of all sizes together up to which another problem's entry serves. What is tuned for
#: thousands of heads would leave a GPU idle at four.
REACH = 2.0
#: Sides of tiles at most: the longest row of scores that is one tile. Compilers do not end with
#: much more, and between the rows of a tile offsets have 32 bits.
_LARGEST = 256
#: Beyond all sizes of problems, within what is exact in floating point.
_MANY = 2**48

Kernels = tuple[tuple[str, Config], ...]

_GATED = ("position_factors", "kronecker")
_GRADIENTS = ("factor_gradient", "parameter_gradient")
#: The kernels that together do a call, by direction and op.
PATHS = {
    ("forward", "gpsa"): (("position_table", "forward_tile"), (*_GATED, "forward_stream")),
    ("forward", "mhsa"): (("forward_tile",), ("forward_stream",)),
    ("forward", "gpsa_dropout"): (("position_factors", "dropout_forward"),),
    ("backward", "gpsa"): (
        ("position_factors", "position_table", "backward_tile", *_GRADIENTS),
        (*_GATED, "backward_query", "backward_key", *_GRADIENTS),
    ),
    ("backward", "mhsa"): (("backward_tile",), ("backward_query", "backward_key")),
    ("backward", "gpsa_dropout"): (("position_factors", "dropout_query", "dropout_key"),),
}
#: Kernels of the stem that are tuned, by direction.
LAYERS = {
    "forward": ("stem_pair", "stem_first", "stem_conv", "stem_tokens"),
    "backward": ("stem_input_gradient", "stem_weight_gradient", "stem_image_gradient"),
}


class Attention(NamedTuple):
    """A call of GPSA or plain attention."""

    #: "gpsa", "mhsa" or "gpsa_dropout".
    op: str
    direction: str
    #: "half", "tf32" or "ieee".
    arithmetic: str
    images: int
    heads: int
    tokens: int
    channels: int
    grid: tuple[int, int] | None

    @property
    def kind(self) -> tuple[Any, ...]:
        """The class."""
        row = -(-self.tokens // 16) * 16 if self.tokens <= TILE_TOKENS else 0
        sides = self.grid and tuple(map(_power, self.grid))
        width = (-(-self.channels // 16) * 16, self.channels % 16 == 0)
        # Masks are in the code.
        return (*self[:3], row, self.tokens % 64 == 0, sides, width)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.images * self.heads, self.tokens

    @property
    def name(self) -> str:
        """For example "gpsa forward half B256 H9 14x14 d48"."""
        tokens = "x".join(map(str, self.grid)) if self.grid else f"N{self.tokens}"
        words = (*self[:3], f"B{self.images}", f"H{self.heads}", tokens, f"d{self.channels}")
        return " ".join(words)

    def posed(self, arch: str) -> Problem:
        """As :mod:`.configs` takes it."""
        dropout = self.op == "gpsa_dropout"
        return Problem(arch, *self[2:], dropout)

    def built_in(self, arch: str) -> Kernels:
        choose = forward if self.direction == "forward" else backward
        return tuple(choose(self.posed(arch)).items())

    def fitted(self, arch: str, kernels: Kernels) -> Kernels | None:
        """An entry's kernels for this problem; None if they cannot do it."""
        names = tuple(name for name, _ in kernels)
        if names not in PATHS[self.direction, self.op]:
            return None
        if not all(self._fits(*kernel) for kernel in kernels):
            return None
        # How the images are split follows from the problem at hand.
        split = {}
        if "factor_gradient" in names:
            split["factor_gradient"] = backward(self.posed(arch))["factor_gradient"].groups
        return tuple((name, config._replace(groups=split.get(name, 0))) for name, config in kernels)

    def _fits(self, name: str, config: Config) -> bool:
        if name in ("position_table", "position_factors", "parameter_gradient"):
            return True
        if name in ("kronecker", "factor_gradient"):
            return len(config.channels) == 1
        if sum(config.channels) < self.channels or not config.rows:
            return False
        if name.endswith("_tile"):
            keys = sum(config.keys) if isinstance(config.keys, tuple) else config.keys
            several = isinstance(config.keys, tuple) == (name == "forward_tile")
            fits = self.tokens <= TILE_TOKENS and keys >= self.tokens
            return several and fits and self.arithmetic == "half"
        return isinstance(config.keys, int) and config.keys > 0


class Layer(NamedTuple):
    """One kernel of a stem, as ``kernels/ahead/stem.py`` describes it."""

    #: The kernel.
    op: str
    direction: str
    arithmetic: str
    images: int
    #: Sides of what is read, of a gradient of what its convolution read.
    size: tuple[int, int]
    #: From what is read to what is written, of a gradient those of the convolution.
    channels: tuple[int, ...]
    #: Empty for the last convolution, 1x1.
    strides: tuple[int, ...]
    #: Whether it is part of a training step.
    training: bool
    #: Whether it reads uint8 images.
    pixels: bool

    @property
    def kind(self) -> tuple[Any, ...]:
        """The class."""
        return (*self[:3], *self[5:])

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.images * math.prod(self.size),)

    @property
    def name(self) -> str:
        """For example "stem_conv forward half B256 56x56 c96-192 s2 train"."""
        words = [*self[:3], f"B{self.images}", "x".join(map(str, self.size))]
        words.append("c" + "-".join(map(str, self.channels)))
        words += ["s" + "-".join(map(str, self.strides))] if self.strides else []
        words += ["uint8"] if self.pixels else []
        return " ".join(words + (["train"] if self.training else []))

    def fitted(self, arch: str, kernels: Kernels) -> Kernels | None:
        """An entry's kernel for this problem; None if it cannot do it."""
        if len(kernels) != 1 or kernels[0][0] != self.op or not kernels[0][1].rows:
            return None
        config = kernels[0][1]
        keys, whole = config.keys, self.channels[-1]
        if not isinstance(keys, tuple) or not keys:
            return None
        if self.op == "stem_pair":
            valid = sum(keys) >= whole and sum(config.channels) >= self.channels[1]
        elif self.op in ("stem_first", "stem_image_gradient"):
            # The last takes one piece of the channels, the others several.
            valid = self.op == "stem_first" or len(keys) == 1
        elif self.op == "stem_weight_gradient":
            valid = len(keys) == len(config.channels) == 1 and config.taps in (1, 3)
        else:
            valid = bool(config.channels)
            valid &= self.op != "stem_input_gradient" or len(config.channels) == 1
        if not valid:
            return None
        if self.direction == "backward":
            before, after = self.channels
            split = stem_gradient_configs.split(self.op, arch, config, after, before)
            config = config._replace(groups=split)
        return ((self.op, config),)


Posed = Attention | Layer


class Entry(NamedTuple):
    """What was measured to be the fastest for a problem."""

    problem: Posed
    #: In their order; none where those that are built in were not beaten.
    kernels: Kernels


class Table(NamedTuple):
    """Of one file, for one architecture and minor version of Triton."""

    #: "gpu", "date", "fastvit" and more; empty if there is nothing.
    measured: dict[str, Any]
    entries: tuple[Entry, ...]


def read(file: Path, arch: str, version: str) -> Table:
    """What a file has for an architecture and a minor version of Triton.

    Raises:
        OSError: there is no such file.
        ValueError: it is no such table; the message has what is wrong.
    """
    table = _object(json.loads(file.read_text("utf-8")), "the file")
    found = _object(_object(table.get(arch, {}), arch).get(version, {}), f"{arch}.{version}")
    if not found:
        return Table({}, ())
    where = f"{arch}.{version}"
    measured = _object(found.get("measured"), f"{where}.measured")
    missing = {"gpu", "date", "fastvit"} - measured.keys()
    if missing:
        raise ValueError(f"{where}.measured: {', '.join(sorted(missing))} missing")
    entries = found.get("entries")
    if not isinstance(entries, list):
        raise ValueError(f"{where}.entries: expected a list, got {entries!r:.60}")
    return Table(measured, tuple(_entry(x, f"{where}.entries[{i}]") for i, x in enumerate(entries)))


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected an object, got {value!r:.60}")
    return value


def _entry(value: Any, name: str) -> Entry:
    fields = {k: _tuples(v) for k, v in _object(value, name).items() if k not in ("kernels", "us")}
    kind = Layer if str(fields.get("op")).startswith("stem_") else Attention
    try:
        problem = kind(**fields)
        kernels = tuple((k, _config(v)) for k, v in _object(value["kernels"], name).items())
        # Whatever is amiss in its fields shows here.
        known = (problem.direction, problem.op) in PATHS
        if not known and problem.op not in LAYERS.get(problem.direction, ()):
            raise ValueError(f"no kernels for {problem.op!r} {problem.direction!r}")
        if not all(type(size) is int and 0 < size < _MANY for size in problem.sizes):
            raise ValueError(f"expected positive whole sizes, got {problem.sizes!r:.60}")
        if not problem.kind or not problem.name:
            raise ValueError("no problem")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    return Entry(problem, kernels)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _config(value: dict[str, Any]) -> Config:
    config = Config(**{name: _tuples(x) for name, x in value.items()})
    tiles: list[Any] = [x for x in (config.rows, config.keys) if type(x) is not tuple and x != 0]
    pieces = [x for x in (config.keys, config.channels) if type(x) is tuple]
    tiles += [side for sides in pieces for side in sides]
    if not all(_whole(x, 1, _LARGEST) and x.bit_count() == 1 for x in tiles):
        raise ValueError(
            f"expected powers of two up to {_LARGEST} as sides of tiles, got {tuple(config)}"
        )
    if not _whole(config.warps, 1, 16) or not _whole(config.stages, 1, 8):
        raise ValueError(f"expected 1 to 16 warps and 1 to 8 stages, got {tuple(config)}")
    if config.warps.bit_count() != 1 or type(config.channels) is not tuple:
        raise ValueError(f"expected a power of two of warps, a list of channels, got {config}")
    registers = config.registers is None or _whole(config.registers, 16, 255)
    others = _whole(config.groups, 0, _MANY) and _whole(config.taps, 0, 9)
    if not registers or not others or type(config.resident) is not bool:
        raise ValueError(f"expected registers, groups, taps, resident or not, got {tuple(config)}")
    return config


def _whole(x: Any, least: int, most: int) -> bool:
    # True and 4.0 are equal to whole numbers, and Triton does not take them for such.
    return type(x) is int and least <= x <= most


def read_all(file: Path) -> dict[str, Any]:
    """A file's table with all that it has, to be merged; empty if there is no file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such table; the message has what is wrong.
    """
    if not file.exists():
        return {}
    table = _object(json.loads(file.read_text("utf-8")), "the file")
    for arch, versions in table.items():
        for version in _object(versions, arch):
            if not read(file, arch, version).measured:
                raise ValueError(f"{arch}.{version}: expected measurements, got nothing")
    return table


def distance(a: Posed, b: Posed) -> float:
    """Doublings between the sizes of two problems of a class."""
    return sum(abs(math.log2(x / y)) for x, y in zip(a.sizes, b.sizes, strict=True))


def nearest(problem: Posed, entries: Iterable[Entry], arch: str) -> tuple[Entry, Kernels] | None:
    """The entry to take, and its kernels for the problem: that of the problem itself, else the
    nearest within :data:`REACH`, the first of equally near ones; None if none can do it.
    """
    if not all(size > 0 for size in problem.sizes):
        return None
    alike = [entry for entry in entries if entry.problem.kind == problem.kind]

    def order(entry: Entry) -> tuple[bool, float]:
        # Others may have as many heads and tokens in all, or positions.
        return entry.problem != problem, distance(entry.problem, problem)

    for entry in sorted(alike, key=order):
        if distance(entry.problem, problem) > REACH:
            return None
        kernels = problem.fitted(arch, entry.kernels) if entry.kernels else ()
        if kernels is not None:
            return entry, kernels
    return None


def plain(problem: Posed, kernels: Kernels, us: dict[str, Any]) -> dict[str, Any]:
    """An entry as a file has it; of a configuration what is not at its default."""
    defaults = Config._field_defaults
    entry = {
        **problem._asdict(),
        "kernels": {
            name: {k: v for k, v in config._asdict().items() if v != defaults[k] and k != "groups"}
            | ({"groups": 1} if config.groups else {})
            for name, config in kernels
        },
        "us": us,
    }
    return json.loads(json.dumps(entry))


def merged(
    table: dict[str, Any], arch: str, version: str, measured: dict[str, Any], entries: list[Any]
) -> dict[str, Any]:
    """A file's table with these entries, which replace those of the same problems. Entries of
    another card, version of fastvit or commit go: ``measured`` is said of all.
    """
    versions = dict(table.get(arch, {}))
    old = versions.get(version, {})
    of = ("gpu", "fastvit", "commit")
    same = all(old.get("measured", {}).get(k) == measured.get(k) for k in of)
    kept = {_key(entry): entry for entry in (old.get("entries", []) if same else [])}
    kept |= {_key(entry): entry for entry in entries}
    versions[version] = {"measured": measured, "entries": list(kept.values())}
    return {**table, arch: versions}


def _key(entry: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in entry.items() if k not in ("kernels", "us")})


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keeps others who ask for it from the file's folder, where the file system knows locks.

    Raises:
        OSError: there cannot be such a folder.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write(file: Path, table: dict[str, Any]) -> None:
    """Readers see the old file or the new.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text(table))
        os.chmod(name, 0o644)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def text(table: dict[str, Any]) -> str:
    """A file with an entry a line."""
    archs = []
    for arch, versions in table.items():
        parts = []
        for version, found in versions.items():
            entries = ",\n".join(f"   {json.dumps(entry)}" for entry in found["entries"])
            measured = json.dumps(found["measured"])
            parts.append(
                f'  {json.dumps(version)}: {{"measured": {measured}, "entries": [\n{entries}\n  ]}}'
            )
        archs.append(f" {json.dumps(arch)}: {{\n" + ",\n".join(parts) + "\n }")
    return "{\n" + ",\n".join(archs) + "\n}\n" if archs else "{}\n"

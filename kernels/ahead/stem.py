# SPDX-License-Identifier: Apache-2.0
"""Launches of the convolutional stem, one kernel each."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from .launch import Fake, Launch, module, recorded

#: Where every kernel lies in ``kernels``.
KERNELS = {
    "stem_first": "stem_first",
    "stem_conv": "stem_conv",
    "stem_pair": "stem_pair",
    "stem_tokens": "stem_tokens",
    "stem_statistics": "stem_statistics",
    "stem_affine": "stem_statistics",
}


class Case(NamedTuple):
    """A launch of one kernel."""

    kernel: str
    #: "float16", "bfloat16", or float32 as "tf32" or "ieee".
    precision: str
    images: int
    #: Sides of what the kernel reads.
    size: tuple[int, int]
    #: From what it reads to what it writes.
    channels: tuple[int, ...]
    strides: tuple[int, ...] = ()
    #: Whether it is part of a training step.
    training: bool = False
    #: Whether the images are uint8.
    pixels: bool = False
    direction: str = "forward"
    #: In the place of the configuration that ``stem_configs`` chooses.
    config: Any = None

    @property
    def kernels(self) -> tuple[str, ...]:
        return (self.kernel,)

    @property
    def dtype(self) -> str:
        return "float32" if self.precision in ("tf32", "ieee") else self.precision

    @property
    def arithmetic(self) -> str:
        return "half" if self.dtype != "float32" else self.precision

    @property
    def multiplication(self) -> str:
        """How float32 is multiplied."""
        return "tf32" if self.precision == "tf32" else "ieee"

    @property
    def name(self) -> str:
        """For example "bfloat16 B256 224x224 c3-48-96 s2-2 uint8 train"."""
        words = [self.precision, f"B{self.images}", "{}x{}".format(*self.size)]
        words.append("c" + "-".join(map(str, self.channels)))
        words += ["s" + "-".join(map(str, self.strides))] if self.strides else []
        words += ["uint8"] if self.pixels else []
        return " ".join(words + (["train"] if self.training else []))


@cache
def launches(arch: str, case: Case) -> dict[str, Launch]:
    """The launch of a case on an architecture, by the name of its kernel."""
    with recorded(KERNELS) as found:
        config = _LAUNCHES[case.kernel](arch, case)
    # Statistics of many tiles come by the same kernel twice.
    kernel, grid, arguments = found[-1]
    assert kernel == case.kernel, f"{kernel} was launched for a case of {case.kernel}"
    return {kernel: Launch(kernel, grid, arguments, config)}


def _map(case: Case, level: int) -> Fake:
    """What the kernel reads (level 0), or what the convolution number ``level`` gives."""
    height, width = case.size
    for stride in case.strides[:level]:
        height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
    C = case.channels[level]
    strides = (height * width * C, 1, width * C, C)
    return Fake((case.images, C, height, width), case.dtype, strides)


def _images(case: Case) -> Fake:
    B, C, H, W = _map(case, 0).shape
    return Fake((B, C, H, W), "uint8" if case.pixels else case.dtype)


def _pixels(case: Case) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std."""
    return ((0.5,) * case.channels[0], (0.25,) * case.channels[0]) if case.pixels else None


def _weight(case: Case, level: int, side: int = 3) -> Fake:
    return Fake((case.channels[level], case.channels[level - 1], side, side), case.dtype)


def _norm(case: Case, level: int) -> tuple[Fake, ...]:
    """Weight, bias, mean and variance of a batch norm."""
    return (Fake((case.channels[level],), case.dtype),) * 4


def _positions(case: Case, level: int) -> int:
    B, _, H, W = _map(case, level).shape
    return B * H * W


def _partials(case: Case, level: int, config: Any) -> Fake:
    tiles = -(-_positions(case, level) // config.rows)
    return Fake((2, tiles, case.channels[level]), "float32")


def _first(arch: str, case: Case) -> Any:
    config = case.config or module("stem_configs").first(arch, case.arithmetic, case.channels[1])
    norm, partials = _norm(case, 1), None
    if case.training:
        norm, partials = None, _partials(case, 1, config)
    module("stem_first").stem_first(
        _images(case), _weight(case, 1), norm, 1e-5, _map(case, 1), partials, _pixels(case),
        case.strides[0], case.multiplication, config,
    )  # fmt: skip
    return config


def _conv(arch: str, case: Case) -> Any:
    config = case.config or module("stem_configs").conv(
        arch, case.arithmetic, _positions(case, 1), *case.channels, activates=case.training
    )
    norm, affine, partials = _norm(case, 1), None, None
    if case.training:
        affine = Fake((2, case.channels[0]), "float32")
        norm, partials = None, _partials(case, 1, config)
    module("stem_conv").stem_conv(
        _map(case, 0), _weight(case, 1), affine, norm, 1e-5, _map(case, 1), partials,
        case.strides[0], case.multiplication, config,
    )  # fmt: skip
    return config


def _pair(arch: str, case: Case) -> Any:
    config = case.config or module("stem_configs").pair(arch, case.arithmetic, *case.channels)
    module("stem_pair").stem_pair(
        _images(case), (_weight(case, 1), _weight(case, 2)), (_norm(case, 1), _norm(case, 2)),
        1e-5, _map(case, 2), _pixels(case), case.strides, case.multiplication, config,
    )  # fmt: skip
    return config


def _tokens(arch: str, case: Case) -> Any:
    config = case.config or module("stem_configs").tokens(
        arch, case.arithmetic, _positions(case, 0), *case.channels, activates=case.training
    )
    affine = Fake((2, case.channels[0]), "float32") if case.training else None
    (height, width), out = case.size, case.channels[1]
    tokens = Fake((case.images, height * width + 1, out), case.dtype)
    position, first = (Fake((1, count, out), case.dtype) for count in (height * width + 1, 1))
    module("stem_tokens").stem_tokens(
        _map(case, 0), _weight(case, 1, 1), Fake((out,), case.dtype), affine, position, first,
        tokens, case.multiplication, config,
    )  # fmt: skip
    return config


def _statistics(arch: str, case: Case) -> Any:
    made, total = module("stem_statistics"), case.images * case.size[0] * case.size[1]
    _, C, _, _ = _map(case, 0).shape
    norm = _norm(case, 0)
    statistics = Fake((C,), "float32")
    if case.kernel == "stem_affine":
        made.stem_affine(*norm[:2], statistics, statistics, 1e-5)
    else:
        parts = Fake((2, -(-total // 64), C), "float32")
        made.stem_statistics(parts, 64, total, *norm[:2], 1e-5, statistics, statistics)
    return module("configs").Config()


#: By kernel: launches it for a case on an architecture and returns its configuration.
_LAUNCHES: dict[str, Callable[[str, Case], Any]] = {
    "stem_first": _first,
    "stem_conv": _conv,
    "stem_pair": _pair,
    "stem_tokens": _tokens,
    "stem_statistics": _statistics,
    "stem_affine": _statistics,
}

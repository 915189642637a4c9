# SPDX-License-Identifier: Apache-2.0
"""What ``bench/resources.py`` compiles of the convolutional stem: cases, one launch each."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from resource_launch import Fake, Launch, module, recorded

#: Where every kernel lies in ``kernels``.
KERNELS = {
    "stem_first": "stem_first",
    "stem_conv": "stem_conv",
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


# At most 32 pairs of a kernel and a case. Batches are 256, but 1 where a small call is the case.
CASES = (
    Case("stem_first", "bfloat16", 256, (224, 224), (3, 48), (2,), training=True),
    Case("stem_conv", "bfloat16", 256, (56, 56), (96, 192), (2,)),
    Case("stem_conv", "bfloat16", 256, (56, 56), (128, 128), (1,), training=True),
)


@cache
def launches(arch: str, case: Case) -> dict[str, Launch]:
    """The launch of a case on an architecture, by the name of its kernel."""
    with recorded(KERNELS) as found:
        config = _LAUNCHES[case.kernel](arch, case)
    ((kernel, grid, arguments),) = found
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


def _partials(case: Case, level: int, config: Any) -> Fake:
    B, C, H, W = _map(case, level).shape
    return Fake((2, -(-B * H * W // config.rows), C), "float32")


def _first(arch: str, case: Case) -> Any:
    config = module("stem_configs").first(arch, case.arithmetic, case.channels[1])
    norm, partials = _norm(case, 1), None
    if case.training:
        norm, partials = None, _partials(case, 1, config)
    module("stem_first").stem_first(
        _images(case), _weight(case, 1), norm, 1e-5, _map(case, 1), partials, _pixels(case),
        case.strides[0], case.multiplication, config,
    )  # fmt: skip
    return config


def _conv(arch: str, case: Case) -> Any:
    config = module("stem_configs").conv(
        arch, case.arithmetic, *case.channels, activates=case.training
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


#: By kernel: launches it for a case on an architecture and returns its configuration.
_LAUNCHES: dict[str, Callable[[str, Case], Any]] = {"stem_first": _first, "stem_conv": _conv}

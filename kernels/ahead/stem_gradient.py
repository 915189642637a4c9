# SPDX-License-Identifier: Apache-2.0
"""Launches of the backward of the convolutional stem, one kernel each. Sizes and channels are those
of the convolution that is differentiated; one without strides is the last, 1x1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from . import stem
from .launch import Fake, Launch, module, recorded
from .stem import _images, _map, _weight

#: Where every kernel lies in ``kernels``.
KERNELS = {
    "stem_input_gradient": "stem_input_gradient",
    "stem_weight_gradient": "stem_weight_gradient",
    "stem_image_gradient": "stem_image_gradient",
    "stem_raw_gradient": "stem_raw_gradient",
    "stem_weight_sum": "stem_sums",
    "stem_norm_gradient": "stem_sums",
}


class Case(stem.Case):
    """A launch of one kernel of the backward."""

    __slots__ = ()


@cache
def launches(arch: str, case: Case) -> dict[str, Launch]:
    """The launch of a case on an architecture, by the name of its kernel."""
    with recorded(KERNELS) as found:
        config = _LAUNCHES[case.kernel](arch, case)
    # The parts come from the kernel before.
    kernel, grid, arguments = found[-1]
    assert kernel == case.kernel, f"{kernel} was launched for a case of {case.kernel}"
    return {kernel: Launch(kernel, grid, arguments, config)}


def _norm(case: Case, level: int) -> tuple[Fake, ...]:
    """Weight, bias, mean and variance of a batch norm."""
    C = case.channels[level]
    return (Fake((C,), case.dtype),) * 2 + (Fake((C,), "float32"),) * 2


def _gradient(case: Case) -> Fake:
    """That of a convolution's output, or of the tokens behind a class token."""
    if case.strides:
        return _map(case, 1)
    (height, width), D = case.size, case.channels[1]
    N = height * width
    return Fake((case.images, N, D), case.dtype, ((N + 1) * D, D, 1))


def _input(arch: str, case: Case) -> Any:
    configs, (C, out) = module("stem_gradient_configs"), case.channels
    config = case.config or configs.input_gradient(arch, case.arithmetic, out, C, case.training)
    weight = _weight(case, 1) if case.strides else Fake((out, C), case.dtype)
    stride, below, norm, dx = 1, None, None, _images(case)
    if case.strides:
        stride = case.strides[0]
    if not module("stem_configs").gathers(C):
        below, norm, dx = _map(case, 0), _norm(case, 0), _map(case, 0)
    module("stem_input_gradient").stem_input_gradient(
        _gradient(case), weight, stride, below, norm, 1e-5, dx, not case.training,
        case.multiplication, config,
    )  # fmt: skip
    return config


def _weights(arch: str, case: Case) -> tuple[Any, Fake]:
    """The configuration and the parts of the gradient."""
    configs, (C, out) = module("stem_gradient_configs"), case.channels
    stride, taps = (case.strides[0], 9) if case.strides else (1, 1)
    config = case.config or configs.weight_gradient(arch, case.arithmetic, out, C, taps)
    return config, module("stem_weight_gradient").stem_weight_gradient(
        _gradient(case), stride, taps, _map(case, 0), _norm(case, 0), 1e-5, "float32",
        case.multiplication, config,
    )  # fmt: skip


def _image(arch: str, case: Case) -> tuple[Any, Fake]:
    """The same of the first convolution."""
    configs, (C, out) = module("stem_gradient_configs"), case.channels
    config = case.config or configs.image_gradient(arch, case.arithmetic, out)
    raw, coefficients = None, None
    if case.training:
        raw, coefficients = _map(case, 1), Fake((4, out), "float32")
    return config, module("stem_image_gradient").stem_image_gradient(
        _map(case, 1), raw, coefficients, _images(case), (127.0,) * C if case.pixels else None,
        case.strides[0], "float32", case.multiplication, config,
    )  # fmt: skip


def _raw(arch: str, case: Case) -> Any:
    out = case.channels[1]
    config = case.config or module("stem_gradient_configs").raw_gradient(out)
    module("stem_raw_gradient").stem_raw_gradient(
        _map(case, 1), _map(case, 1), Fake((4, out), "float32"), config
    )
    return config


def _sum(arch: str, case: Case) -> Any:
    _, parts = _image(arch, case) if case.pixels else _weights(arch, case)
    numbers = (1.0,) * case.channels[0] if case.pixels else None
    module("stem_sums").stem_weight_sum(parts, _weight(case, 1), numbers, numbers)
    return module("configs").Config()


def _norms(arch: str, case: Case) -> Any:
    C = case.channels[0]
    partials, gradient = Fake((2, 264, C), "float32"), Fake((C,), case.dtype)
    module("stem_sums").stem_norm_gradient(
        partials,
        _norm(case, 0),
        1e-5,
        case.images * case.size[0] * case.size[1],
        gradient,
        gradient,
    )
    return module("configs").Config()


#: By kernel: launches it for a case on an architecture and returns its configuration.
_LAUNCHES: dict[str, Callable[[str, Case], Any]] = {
    "stem_input_gradient": _input,
    "stem_weight_gradient": lambda arch, case: _weights(arch, case)[0],
    "stem_image_gradient": lambda arch, case: _image(arch, case)[0],
    "stem_raw_gradient": _raw,
    "stem_weight_sum": _sum,
    "stem_norm_gradient": _norms,
}

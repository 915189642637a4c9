# SPDX-License-Identifier: Apache-2.0
"""How the launches that are compiled ahead of time are come by.

A launch is taken from the function that launches: its kernel is replaced by a recorder and its
tensors by fakes, so nothing of what it passes is written down here a second time.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

#: ``fastvit.kernels``, or ``kernels`` in a clone without fastvit.
_PACKAGE = __name__.rsplit(".", 2)[0]


class Fake:
    """A tensor without memory, as much of one as the launching functions ask for."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: str,
        strides: tuple[int, ...] | None = None,
        zero: bool = False,
    ):
        if strides is None:
            strides, step = (), 1
            for side in reversed(shape):
                strides, step = (step, *strides), step * side
        self.shape, self.dtype, self._strides = shape, dtype, strides
        #: Whether the kernels count on zeros in it.
        self.zero = zero

    def stride(self) -> tuple[int, ...]:
        return self._strides

    def __getitem__(self, index: int) -> Fake:
        return Fake(self.shape[1:], self.dtype, self._strides[1:])

    def data_ptr(self) -> int:
        """Aligned, as PyTorch's are."""
        return 0

    def new_empty(self, *shape: int, dtype: str | None = None) -> Fake:
        return Fake(shape, dtype or self.dtype)

    def new_zeros(self, *shape: int) -> Fake:
        return Fake(shape, self.dtype, zero=True)


class Launch(NamedTuple):
    """What a kernel was launched with."""

    kernel: str
    grid: tuple[int, ...]
    #: Arguments of the kernel and options of the compiler.
    arguments: dict[str, Any]
    config: Any


class _Recorder:
    def __init__(self, kernel: str, found: list[tuple[str, tuple[int, ...], dict[str, Any]]]):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.found.append((self.kernel, grid, arguments))


def module(name: str) -> Any:
    """A module of the kernels."""
    return importlib.import_module(f"{_PACKAGE}.{name}")


@contextmanager
def recorded(
    kernels: Mapping[str, str],
) -> Iterator[list[tuple[str, tuple[int, ...], dict[str, Any]]]]:
    """What is launched of ``kernels``, each with its file, inside the ``with`` block."""
    found: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []
    originals = {kernel: kernel_object(kernel, file) for kernel, file in kernels.items()}
    try:
        for kernel, file in kernels.items():
            setattr(module(file), f"{kernel}_kernel", _Recorder(kernel, found))
        yield found
    finally:
        for kernel, original in originals.items():
            setattr(module(kernels[kernel]), f"{kernel}_kernel", original)


def kernel_object(kernel: str, file: str) -> Any:
    """What Triton's decorator made."""
    return getattr(module(file), f"{kernel}_kernel")

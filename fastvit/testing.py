# SPDX-License-Identifier: Apache-2.0
"""The numbers rule, shared by tests and benchmarks.

A result is right when its error against a float64 computation is at most twice the error that
plain PyTorch makes in the same dtype, plus a floor of a few units in the last place. The limit is
derived from the problem at hand rather than felt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

FACTOR = 2.0
FLOOR_ULPS = 2.0

#: Relative floor for sums that cancel, such as the gradients of ``pos_proj`` and ``gating_param``.
CANCELLING = 1e-4


class Agreement(NamedTuple):
    """How one tensor compares with float64. Errors are relative to the size of the expected."""

    name: str
    error: float
    reference_error: float
    limit: float

    @property
    def ok(self) -> bool:
        # Written so that a NaN error is a disagreement.
        return self.error <= self.limit

    def __str__(self) -> str:
        verdict = "agrees" if self.ok else "DISAGREES"
        return (
            f"{self.name} {verdict}: error {self.error:.2e}, limit {self.limit:.2e} "
            f"(same-dtype reference {self.reference_error:.2e})"
        )


def agreement(
    actual: Tensor,
    reference: Tensor,
    expected: Tensor,
    *,
    name: str = "output",
    floor: float = 0.0,
    scale: float | None = None,
    rms: bool = False,
) -> Agreement:
    """Apply the numbers rule to one tensor.

    Args:
        actual: the result under test.
        reference: plain PyTorch's result in the same dtype; its dtype sets the size of an ulp.
        expected: the float64 result. All three have one shape, which is checked.
        name: what the tensor is, for the message.
        floor: relative floor that replaces the default of two ulp when larger.
        scale: what errors are relative to, instead of ``max|expected|`` (for results that are
            zero in exact arithmetic).
        rms: compare root mean squares instead of maxima. For gradients through a ReLU: where
            rounding puts an activation on the other side of zero, one element is off by its
            whole size in either implementation, and which one is chance.

    Raises:
        ValueError: the shapes or the dtypes of ``actual`` and ``reference`` differ, or
            ``expected`` is not float64.
    """
    if not actual.shape == reference.shape == expected.shape:
        shapes = f"{tuple(actual.shape)}, {tuple(reference.shape)}, {tuple(expected.shape)}"
        raise ValueError(f"{name}: expected one shape, got actual/reference/expected {shapes}")
    if actual.dtype != reference.dtype or expected.dtype != torch.float64:
        raise ValueError(
            f"{name}: expected actual and reference of one dtype and a float64 expectation, "
            f"got {actual.dtype}, {reference.dtype}, {expected.dtype}"
        )
    if expected.numel() == 0:
        return Agreement(name, 0.0, 0.0, 0.0)
    size = _rms if rms else _max
    if scale is None:
        scale = size(expected) or 1.0
    error = size(actual.double() - expected) / scale
    reference_error = size(reference.double() - expected) / scale
    floor = max(floor, FLOOR_ULPS * torch.finfo(reference.dtype).eps)
    return Agreement(name, error, reference_error, FACTOR * reference_error + floor)


def _max(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def assert_agreement(actual: Tensor, reference: Tensor, expected: Tensor, **options: Any) -> None:
    """:func:`agreement`, raising ``AssertionError`` with the figures when the rule is broken."""
    result = agreement(actual, reference, expected, **options)
    if not result.ok:
        raise AssertionError(str(result))


_ALLOCATORS = ("empty", "empty_like", "empty_strided")
_METHODS = ("new_empty", "new_empty_strided")


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill what ``torch.empty`` and its kin return with NaN (integers: the largest value).

    An element that an implementation forgets to write then shows in every comparison.
    """

    def poison(allocate: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            out = allocate(*args, **kwargs)
            if out.is_floating_point():
                return out.fill_(float("nan"))
            if out.dtype != torch.bool:
                return out.fill_(torch.iinfo(out.dtype).max)
            return out

        return wrapped

    with mock.patch.multiple(torch, **{n: poison(getattr(torch, n)) for n in _ALLOCATORS}):
        methods = {n: poison(getattr(Tensor, n)) for n in _METHODS}
        with mock.patch.multiple(Tensor, **methods):
            yield

# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments that modules, functions and models share.

Each raises before anything is computed, with what was expected and what came.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# Its type information knows half of what is used here.
_C: Any = torch._C

F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """For functions that only look at shapes: in them ``torch.jit.trace`` and the ONNX export that
    is made of it stand still.

    Both have tensors for sizes, and warn at each comparison of two that it is not in the trace.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        state = _C._get_tracing_state()
        if state is None:
            return function(*args, **kwargs)
        _C._set_tracing_state(None)
        try:
            return function(*args, **kwargs)
        finally:
            _C._set_tracing_state(state)

    return wrapper  # type: ignore[return-value]


def pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """(height, width) of a size given as one positive int or two.

    Raises:
        ValueError: it is something else.
    """
    sides = (value, value) if isinstance(value, int) else value
    is_pair = isinstance(sides, (tuple, list, torch.Size)) and len(sides) == 2
    # Under export with dynamic shapes the sides are symbolic, and no instances of int.
    if not is_pair or not all(isinstance(s, (int, torch.SymInt)) and s > 0 for s in sides):
        raise ValueError(f"{name}: expected a positive int or a pair of them, got {value!r}")
    return sides[0], sides[1]


def check_grid(grid_size: object) -> tuple[int, int]:
    """``grid_size`` if it is (rows, columns), both positive.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(grid_size, int):
        raise ValueError(f"grid_size: expected a pair of positive ints, got {grid_size!r}")
    return pair(grid_size, "grid_size")  # type: ignore[arg-type]


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError unless ``num_heads`` is positive and divides ``dim``."""
    if num_heads <= 0 or dim % num_heads:
        raise ValueError(
            f"dim, num_heads: expected dim to be a multiple of num_heads > 0, "
            f"got dim={dim}, num_heads={num_heads}"
        )


def check_probability(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {value}")


@untraced
def check_tokens(x: Tensor, dim: int) -> None:
    """Raise ValueError unless ``x`` is (B, N, dim), and TypeError unless it is floating."""
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ValueError(f"x: expected shape (B, N, {dim}), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")


@untraced
def default_scale(q: Tensor) -> float:
    """1 / sqrt(d), of the scores of queries (..., d)."""
    return q.shape[-1] ** -0.5


@untraced
def check_images(name: str, images: Tensor, channels: int) -> None:
    """Raise ValueError unless ``images`` is (B, channels, H, W), and TypeError unless it is
    floating or uint8.
    """
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(
            f"{name}: expected (B, {channels}, H, W) with {channels} channels, "
            f"got shape {tuple(images.shape)}"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype or uint8, got {images.dtype}")


def check_normalization(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> None:
    """Raise ValueError unless ``mean`` and ``std`` are both None or ``channels`` floats each,
    ``std`` without a 0.
    """
    if mean is None and std is None:
        return
    for name, values in (("mean", mean), ("std", std)):
        if values is None or len(values) != channels:
            raise ValueError(f"{name}: expected {channels} floats, one per channel, got {values}")
    if std is not None and any(float(value) == 0 for value in std):
        raise ValueError(f"std: expected no 0, got {std}")


def floating_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a layer computes in: of its weight, which may be wrapped or sharded, else of
    its first floating tensor.
    """
    weight = getattr(module, "weight", None)
    tensors = () if weight is None else (weight,)
    for tensor in chain(tensors, module.parameters(), module.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()

# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments that the modules and the functions share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size given as one number or two."""
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


def check_grid(grid_size: object) -> tuple[int, int]:
    """``grid_size`` if it is (rows, columns), both positive.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(grid_size, (tuple, list)) and len(grid_size) == 2:
        rows, columns = grid_size
        # Under export with dynamic shapes the sides are symbolic, and no instances of int.
        if all(isinstance(side, (int, torch.SymInt)) and side > 0 for side in grid_size):
            return rows, columns
    raise ValueError(f"grid_size: expected a pair of positive ints, got {grid_size!r}")


def check_heads(dim: int, num_heads: int) -> None:
    """Raises ValueError unless ``num_heads`` is positive and divides ``dim``."""
    if num_heads <= 0 or dim % num_heads:
        raise ValueError(
            f"dim, num_heads: expected dim to be a multiple of num_heads > 0, "
            f"got dim={dim}, num_heads={num_heads}"
        )


def check_probability(name: str, value: float) -> None:
    """Raises ValueError unless ``value`` is in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {value}")


def check_tokens(x: Tensor, dim: int) -> None:
    """Raises ValueError unless ``x`` is (B, N, dim), and TypeError unless it is floating."""
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ValueError(f"x: expected shape (B, N, {dim}), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")

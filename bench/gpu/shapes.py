# SPDX-License-Identifier: Apache-2.0
"""The problems that are checked and timed: attention, patch embeddings, stems."""

from __future__ import annotations

from typing import NamedTuple

#: Heads and channels of a head of the ConViTs.
SIZES = {"S": (9, 48), "B": (16, 48), "S+": (9, 64), "B+": (16, 64), "Ti": (4, 48)}


class Shape(NamedTuple):
    """One attention problem; plain attention where there is no grid."""

    label: str
    B: int
    H: int
    d: int
    N: int
    grid: tuple[int, int] | None

    @property
    def name(self) -> str:
        return f"{self.label} N={self.N} B={self.B}"

    @property
    def problem(self) -> tuple[int, int, int, int]:
        return self.B, self.N, self.H, self.d


class Group(NamedTuple):
    """Comparisons that share a process, so that a crash costs no others."""

    label: str
    op: str
    B: int
    H: int
    d: int
    #: Grid of gpsa; one row of tokens for plain attention.
    grid: tuple[int, int]
    layouts: tuple[str, ...] = ("tokens",)
    dtypes: tuple[str, ...] = ("bfloat16", "float32", "float16", "tf32")


class Embedding(NamedTuple):
    """A patch embedding of square patches, with class token and positions."""

    B: int
    D: int
    patch: int
    size: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        return self.size[0] // self.patch, self.size[1] // self.patch

    @property
    def name(self) -> str:
        return f"p={self.patch} {self.size[0]}x{self.size[1]} D={self.D} B={self.B}"

    @property
    def problem(self) -> tuple[int, int, int, int]:
        """Images, patches of one, pixels of a patch, channels of a token."""
        return self.B, self.grid[0] * self.grid[1], 3 * self.patch**2, self.D


class Stem(NamedTuple):
    """A convolutional stem with its images."""

    label: str
    B: int
    size: tuple[int, int]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    D: int

    @property
    def name(self) -> str:
        return f"{self.label} {self.size[0]}x{self.size[1]} B={self.B}"

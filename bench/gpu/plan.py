# SPDX-License-Identifier: Apache-2.0
"""What a run looks at; :mod:`gpu.full_plan` and :mod:`gpu.dry_plan` are the two that there are."""

from __future__ import annotations

from dataclasses import dataclass

from gpu.shapes import Embedding, Group, Shape, Stem


@dataclass(frozen=True)
class Plan:
    """All that a run looks at, each list with the most valuable first."""

    groups: tuple[Group, ...]
    shapes: tuple[Shape, ...]
    #: What is timed, in which dtype: bfloat16 first, the others at the main shapes.
    timed: tuple[tuple[Shape, str], ...]
    #: Those for which other libraries are compiled, too, which takes long.
    compiled: tuple[Shape, ...]
    autotuned: tuple[Shape, ...]
    #: Elements of the buffers of the copy.
    copied: int
    #: (rows, in, out): large squares, and our layers; with a number before, a batch of products.
    products: tuple[tuple[int, ...], ...]
    #: Elements that exponentials are taken of, a multiple of 1024.
    exponents: int
    rounds: int
    #: Calls of which the host's time is the median.
    hosted: int
    #: Offset in elements of the view of a large buffer.
    far: int
    #: Patch embeddings to compare with float64, in each layout of the images.
    embedded: tuple[tuple[Embedding, tuple[str, ...]], ...]
    embedding_dtypes: tuple[str, ...]
    #: And to time, with the dtype.
    embeddings: tuple[tuple[Embedding, str], ...]
    #: Stems to compare with float64, in each layout of the images; those whose kernels are chosen;
    #: to time, with the dtype; to time compiled peers.
    stems_checked: tuple[tuple[Stem, tuple[str, ...]], ...]
    stems: tuple[Stem, ...]
    stems_timed: tuple[tuple[Stem, str], ...]
    stems_compiled: tuple[Stem, ...]
    #: (op, dtype, B, H, grid, d) of the sanitizer's calls; for patches, B, side, grid and D; for
    #: stems, B, the first of two widths, sides of the images and D.
    sanitized: tuple[tuple[str, str, int, int, tuple[int, int], int], ...]

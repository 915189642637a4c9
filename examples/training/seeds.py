# SPDX-License-Identifier: Apache-2.0
"""Seeds from the place of a draw, instead of states of generators."""

from __future__ import annotations

import hashlib

import torch


def derive(*parts: int | str) -> int:
    """A seed of 63 bits from a run's seed and the place of a draw: epoch, sample, step."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A generator seeded by :func:`derive`."""
    return torch.Generator().manual_seed(derive(*parts))

# SPDX-License-Identifier: Apache-2.0
"""In tiles of what size the kernels of the stem run, by architecture, as :mod:`.configs` says.

``rows`` are positions, ``keys`` pieces of the output channels and ``channels`` pieces of the input
channels, as many as a program takes at once.
"""

from __future__ import annotations

from .configs import Config, pieces


def first(arch: str, arithmetic: str, out: int) -> Config:
    """The first convolution, to ``out`` channels."""
    return Config(rows=64, keys=pieces(out, 128), warps=4)


def conv(arch: str, arithmetic: str, channels: int, out: int, activates: bool) -> Config:
    """A later convolution of ``channels`` to ``out``; ``activates`` what it reads, in training."""
    return Config(rows=64, keys=pieces(out, 128), channels=pieces(channels, 64), warps=4, stages=3)

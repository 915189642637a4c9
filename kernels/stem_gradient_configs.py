# SPDX-License-Identifier: Apache-2.0
"""In tiles of what size the gradients of the stem run, by architecture, as :mod:`.configs` says.

``rows`` are positions. Of a product, ``keys`` are the channels that it gives and ``channels`` those
that it sums over, or in the gradient of a weight the output and the input channels.
"""

from __future__ import annotations

from .configs import Config
from .stem_blocks import power


def input_gradient(arch: str, arithmetic: str, out: int, channels: int) -> Config:
    """From ``out`` channels back to ``channels``."""
    depth = min(32, power(out))
    return Config(rows=64, keys=(min(64, power(channels)),), channels=(depth,), groups=264)


def weight_gradient(arch: str, arithmetic: str, out: int, channels: int, taps: int) -> Config:
    """Of weights from ``channels`` to ``out`` channels."""
    outs, ins = min(32, power(out)), min(64, power(channels))
    return Config(rows=32, keys=(outs,), channels=(ins,), taps=min(3, taps), groups=64)


def image_gradient(arch: str, arithmetic: str, out: int) -> Config:
    """Of the first convolution's weights, to ``out`` channels."""
    return Config(rows=64, keys=(min(64, power(out)),), groups=528)


def raw_gradient(arch: str, arithmetic: str, channels: int) -> Config:
    """Of a convolution's sums, from the gradient before the ReLU."""
    return Config(rows=64, keys=(min(64, power(channels)),))

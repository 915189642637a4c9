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
    return Config(rows=64, keys=(min(64, power(channels)),), channels=(min(32, power(out)),), groups=264)


def weight_gradient(arch: str, arithmetic: str, out: int, channels: int, taps: int) -> Config:
    """Of weights from ``channels`` to ``out`` channels."""
    return Config(rows=32, keys=(min(32, power(out)),), channels=(min(64, power(channels)),), taps=3, groups=64)


def image_gradient(arch: str, arithmetic: str, out: int) -> Config:
    """Of the first convolution's weights, to ``out`` channels."""
    return Config(rows=64, keys=(min(64, power(out)),), groups=528)

# SPDX-License-Identifier: Apache-2.0
"""In tiles of what size the gradients of the stem run, by architecture, as :mod:`.configs` says.

In a :class:`Config`, ``rows`` are positions. Of a gradient of inputs ``keys`` are pieces of the
channels that it gives and ``channels`` those that a step sums over; of a gradient of weights they
are the output and the input channels. ``groups`` are the programs that share the positions.
"""

from __future__ import annotations

from .configs import _FROM_SHARED_MEMORY, _MULTIPROCESSORS, Config, _power
from .stem_configs import aligned


def input_gradient(arch: str, arithmetic: str, out: int, channels: int, training: bool) -> Config:
    """From ``out`` channels back to ``channels``."""
    shared = arch in _FROM_SHARED_MEMORY
    # The few channels of images fill no more than one small tile.
    vectors = aligned(out) and (channels <= 4 or aligned(channels))
    if arithmetic == "half" and not vectors:
        keys, depth, warps, stages = (32,), 32, 8, 2
    elif arithmetic == "half":
        # The scale of fixed statistics takes registers, too.
        wide = shared and training and channels > 64
        keys = (64, 32) if wide and channels % 96 == 0 else (64, 64) if wide else (64,)
        # Steps of 64 beside 128 channels would spill.
        deep = shared and out % 64 == 0 and keys != (64, 64)
        depth, warps, stages = 64 if deep else 32, 4 if shared else 8, 3
    elif arithmetic == "tf32":
        keys, depth, warps, stages = (32,), 32, 8, 3
    else:
        # With single channels in flight for two steps it would spill.
        keys, depth, warps, stages = (32,), 16, 8, 2 if vectors else 1
    if channels <= 32:
        keys = (_power(channels),)
    config = Config(
        rows=64,
        keys=keys,
        channels=(min(depth, _power(out)),),
        warps=warps,
        stages=stages,
    )
    return config._replace(groups=split("stem_input_gradient", arch, config, out, channels))


def weight_gradient(arch: str, arithmetic: str, out: int, channels: int, taps: int) -> Config:
    """Of weights of ``taps`` taps from ``channels`` to ``out`` channels."""
    shared = arch in _FROM_SHARED_MEMORY
    if arithmetic == "half":
        # What is read is normalised for every block of output channels again.
        outs, ins, warps = (128, 64, 8) if out > 64 else (64, 64, 4)
    elif arithmetic == "tf32":
        outs, ins, warps = 32, 64 if shared else 32, 4
    else:
        outs, ins, warps = 32, 32, 8
    outs = min(outs, _power(out))
    if not shared:
        # There a product has 64 rows at least.
        ins = min(ins, _power(channels))
    # A row of taps in one program.
    taps = min(3, taps)
    config = Config(
        rows=32,
        keys=(outs,),
        channels=(ins,),
        warps=warps,
        stages=2,
        taps=taps,
    )
    return config._replace(groups=split("stem_weight_gradient", arch, config, out, channels))


def image_gradient(arch: str, arithmetic: str, out: int) -> Config:
    """Of the first convolution's weights, to ``out`` channels."""
    outs = 64 if arch in _FROM_SHARED_MEMORY else min(64, _power(out))
    # Just above 128 registers the compiler spills rather than give up a block, and Triton 3.6
    # cannot have the two products of uint8 images in stages on sm_100.
    stages = 2 if arch in ("sm_80", "sm_90") else 1
    config = Config(
        rows=32,
        keys=(outs,),
        warps=4 if arithmetic == "half" and arch != "sm_100" else 8,
        stages=stages,
    )
    return config._replace(groups=split("stem_image_gradient", arch, config, out, 0))


def raw_gradient(channels: int) -> Config:
    """Of a convolution's sums, from the gradient before the ReLU."""
    return Config(rows=64, keys=(min(64, _power(channels)),))


def split(kernel: str, arch: str, config: Config, out: int, channels: int) -> int:
    """The ``groups`` of a kernel in the tiles of ``config``: two programs for each multiprocessor,
    of which those for different channels share the same positions.
    """
    outs = -(-out // sum(config.keys))
    if kernel == "stem_image_gradient":
        return 2 * max(1, 2 * _MULTIPROCESSORS[arch] // outs)
    blocks = -(-channels // sum(config.keys))
    if kernel == "stem_weight_gradient":
        blocks = -(-channels // config.channels[0]) * outs * (3 if config.taps == 3 else 1)
    return max(1, 2 * _MULTIPROCESSORS[arch] // blocks)

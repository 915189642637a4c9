# SPDX-License-Identifier: Apache-2.0
"""Which kernels serve a stem, and in tiles of what size, by architecture, as :mod:`.configs` says.

In a :class:`Config`, ``rows`` are positions, ``keys`` pieces of the output channels and
``channels`` pieces of the input channels, as many as a program takes at once.
"""

from __future__ import annotations

from typing import NamedTuple

from .configs import _FROM_SHARED_MEMORY, _MULTIPROCESSORS, Config, _power


class Problem(NamedTuple):
    """What the choice of kernels depends on."""

    arch: str
    #: "half" for float16 and bfloat16; float32 is "tf32" or "ieee".
    arithmetic: str
    #: Of all images, after each 3x3 convolution.
    positions: tuple[int, ...]
    #: Channels of the images and of the stages, and D.
    widths: tuple[int, ...]
    #: Whether the sums of every convolution are kept, as in training.
    keeps: bool


def forward(p: Problem) -> tuple[tuple[str, Config], ...]:
    """The kernels of the forward, in the order in which they run, but those of statistics."""
    images, *channels, width = p.widths
    found: list[tuple[str, Config]] = []
    paired = None
    if len(channels) > 1 and not p.keeps:
        paired = pair(p.arch, p.arithmetic, images, *channels[:2])
    if paired is not None:
        found.append(("stem_pair", paired))
    elif gathers(images):
        found.append(("stem_first", first(p.arch, p.arithmetic, channels[0])))
    else:
        config = conv(p.arch, p.arithmetic, p.positions[0], images, channels[0], activates=False)
        found.append(("stem_conv", config))
    for i in range(1 if paired is None else 2, len(channels)):
        before, after = channels[i - 1 : i + 1]
        config = conv(p.arch, p.arithmetic, p.positions[i], before, after, p.keeps)
        found.append(("stem_conv", config))
    last = tokens(p.arch, p.arithmetic, p.positions[-1], channels[-1], width, p.keeps)
    return *found, ("stem_tokens", last)


def gathers(images: int) -> bool:
    """Whether the first convolution reads images of ``images`` channels as they come, all nine taps
    in one tile. Wider tiles would spill: such images are maps like those between the convolutions.
    """
    return images * 9 <= 64


def aligned(*channels: int) -> bool:
    """Whether channels are read 16 bytes at a time. Others come in shorter pieces, down to single
    ones with a mask each, which takes more registers, so they get smaller tiles.
    """
    return all(count % 8 == 0 for count in channels)


def first(arch: str, arithmetic: str, out: int) -> Config:
    """The first convolution, to ``out`` channels."""
    warps = 4 if arithmetic == "half" else 8
    return Config(rows=64, keys=_blocks(out, (64, 32)), warps=warps)


def pair(arch: str, arithmetic: str, images: int, channels: int, out: int) -> Config | None:
    """The first two convolutions, to ``channels`` and to ``out``; None to run each by itself."""
    if arithmetic != "half" or channels > 64 or out > 128:
        return None
    # Both would spill at some widths.
    if images > 4 or not aligned(channels, out):
        return None
    # Nine taps of four channels are more than a tile of 32.
    wide = images * 9 > 32
    if channels <= 32 and out <= 64 and not wide:
        # A piece of 16 channels would spread the wide tile of an image's taps over few threads.
        return Config(rows=64, keys=_pieces(out), channels=(32,), stages=2)
    if channels <= 48 and out <= 96 and not wide:
        keys, pieces = _pieces(out), _pieces(channels)
        return Config(rows=128, keys=keys, channels=pieces, warps=8, stages=2)
    if wide or arch not in _FROM_SHARED_MEMORY:
        # Fewer channels than 64 would spread the wide tile of taps over few threads, and spill.
        pieces = (64 if wide else max(32, _power(channels)),)
        return Config(rows=64, keys=(_power(out),), channels=pieces, warps=8, stages=2)
    # Halves of the first's channels are in registers one after the other.
    return Config(rows=128, keys=(64, 64), channels=(32, 32), warps=8, stages=2)


def conv(
    arch: str, arithmetic: str, positions: int, channels: int, out: int, activates: bool
) -> Config:
    """A later convolution of ``channels`` to ``out``; ``activates`` what it reads, in training."""
    # In the product of the tokens 256 channels spill.
    sizes = (256, 192, 128, 96, 64, 32) if arch == "sm_90" else (192, 128, 96, 64, 32)
    return _product(arch, arithmetic, positions, channels, out, activates, sizes)


def tokens(
    arch: str, arithmetic: str, positions: int, channels: int, out: int, activates: bool
) -> Config:
    """The last convolution, a product of ``channels`` and ``out``."""
    sizes = (192, 128, 96, 64, 32)
    return _product(arch, arithmetic, positions, channels, out, activates, sizes)


def _product(
    arch: str,
    arithmetic: str,
    positions: int,
    channels: int,
    out: int,
    activates: bool,
    sizes: tuple[int, ...],
) -> Config:
    if arithmetic == "ieee":
        return Config(rows=64, keys=_blocks(out, (64, 32)), channels=(16,), warps=8, stages=2)
    if arithmetic == "tf32" and aligned(channels, out):
        return Config(rows=64, keys=_blocks(out, (64, 32)), channels=(32,), stages=3)
    if not aligned(channels, out):
        return Config(rows=64, keys=_blocks(out, (64, 32)), channels=(32,), warps=8, stages=2)
    shared = arch in _FROM_SHARED_MEMORY
    keys = _blocks(out, sizes if shared else (128, 96, 64, 32))
    config = Config(rows=64, keys=keys, channels=_steps(arch, channels, activates), stages=3)
    if positions * out < 128 * sum(keys) * _MULTIPROCESSORS[arch] or sum(keys) <= 64:
        # Few positions: smaller tiles keep more multiprocessors busy.
        small = config._replace(keys=_blocks(out, (64, 32)))
        # What is activated goes through registers on its way, and more of it would spill.
        spills = activates and arch != "sm_90" and sum(config.channels) > 48
        return small._replace(channels=(32,)) if spills else small
    if activates and not shared and len(keys) > 1 and channels > 48:
        # More would spill.
        return config._replace(channels=(32,))
    return config._replace(rows=128, warps=8)


def _pieces(size: int) -> tuple[int, ...]:
    """Powers of two for up to 256 channels."""
    choices = ((16,), (32,), (32, 16), (64,), (64, 32), (128,), (128, 64), (256,))
    return next(pieces for pieces in choices if size <= sum(pieces))


def _blocks(out: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The pieces of the block of channels that leaves the least to fill, the largest of those."""
    best = min(sizes, key=lambda size: (-(-out // size) * size, -size))
    return _pieces(best)


def _steps(arch: str, channels: int, activates: bool) -> tuple[int, ...]:
    """Pieces of the input channels that one step takes."""
    shared = arch in _FROM_SHARED_MEMORY
    if channels <= 64:
        # Where registers hold the operands, pieces of two sizes take too many.
        if shared or channels <= 32:
            return _pieces(channels)
        return (16,) if activates and channels <= 48 else (64,)
    if channels % 64 == 0 or channels % 32 != 0:
        return (64,)
    return (64, 32) if shared and channels % 96 == 0 and not activates else (32,)

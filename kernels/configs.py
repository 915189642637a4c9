# SPDX-License-Identifier: Apache-2.0
"""Which kernels serve a call, and in tiles of what size, by architecture.

A plain function of the call, so that two processes choose alike and nothing is timed at run time.
``bench/resources.py`` compiles every choice ahead of time; none may spill.
"""

from __future__ import annotations

from typing import NamedTuple

#: Architectures that have their own choices, by compute capability.
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")

#: Those whose matrix instructions read both operands from shared memory, 64 rows at a time.
_FROM_SHARED_MEMORY = ("sm_90", "sm_100")

#: Tokens whose scores fit in the registers of one block.
TILE_TOKENS = 256

_MULTIPROCESSORS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170}


class Config(NamedTuple):
    """How a kernel is launched."""

    #: Queries in a tile.
    rows: int = 0
    #: Keys in a tile, or in each of the tiles of a whole row.
    keys: int | tuple[int, ...] = 0
    #: Channels in each of the tiles of a head.
    channels: tuple[int, ...] = ()
    warps: int = 4
    stages: int = 1
    #: Whether one program does a whole head, whose keys and values stay.
    resident: bool = False
    #: The most registers of a thread, where the compiler's own choice spills; None leaves it.
    registers: int | None = None
    #: Into how many groups the images or positions are split, for a sum over them.
    groups: int = 0
    #: How many of the nine taps of a 3x3 convolution a program sums.
    taps: int = 0


def architecture(capability: tuple[int, int]) -> str | None:
    """The choices that a compute capability takes, None below 8.0."""
    if capability < (8, 0):
        return None
    if capability in ((8, 0), (8, 7)):
        return "sm_80"
    if capability < (9, 0):
        return "sm_89"
    # Later ones without choices of their own have the instructions of all before.
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(capability[0], "sm_120")


def pieces(size: int, largest: int = 256) -> tuple[int, ...]:
    """Powers of two that add up to ``size`` rounded up to 16, the largest first."""
    rest, found = -(-size // 16) * 16, []
    while rest:
        found.append(min(1 << (rest.bit_length() - 1), largest))
        rest -= found[-1]
    return tuple(found)


def _power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


class Problem(NamedTuple):
    """What the choice of kernels depends on."""

    arch: str
    #: "half" for float16 and bfloat16; float32 is "tf32" or "ieee".
    arithmetic: str
    images: int
    heads: int
    tokens: int
    channels: int
    #: Rows and columns of the grid; None for plain attention.
    grid: tuple[int, int] | None
    #: Whether weights of the mixed map are dropped; of GPSA only.
    dropout: bool = False


def forward(p: Problem) -> dict[str, Config]:
    """The kernels of the forward, by name, in the order in which they run."""
    if p.dropout:
        return {"position_factors": Config(), "dropout_forward": _dropout_forward(p)}
    tile = _forward_tile(p)
    if tile is not None:
        table = {} if p.grid is None else {"position_table": Config()}
        return {**table, "forward_tile": tile}
    position = {} if p.grid is None else {"position_factors": Config(), "kronecker": _kronecker(p)}
    keys = 32 if p.arch == "sm_100" and not 32 < p.channels <= 64 else 64
    return {**position, "forward_stream": _stream(p, rows=64, keys=keys)}


def backward(p: Problem) -> dict[str, Config]:
    """The same of the backward."""
    if p.dropout:
        query = {"position_factors": Config(), "dropout_query": _dropout_query(p)}
        return {**query, "dropout_key": _dropout_key(p)}
    tile = _backward_tile(p)
    content = {"backward_query": _query(p), "backward_key": _key(p)}
    if p.grid is None:
        return content if tile is None else {"backward_tile": tile}
    factors = {"position_factors": Config()}
    position = {"factor_gradient": _factor_gradient(p), "parameter_gradient": Config(warps=8)}
    if tile is not None:
        return {**factors, "position_table": Config(), "backward_tile": tile, **position}
    return {**factors, "kronecker": _kronecker(p), **content, **position}


def _forward_tile(p: Problem) -> Config | None:
    if p.tokens > TILE_TOKENS or p.arithmetic != "half":
        return None
    if p.arch not in _FROM_SHARED_MEMORY:
        # Registers hold the operands too. With narrow pieces of the channels every warp repeats the
        # same product, and spills.
        channels = _power(p.channels) if p.channels <= 16 else max(64, _power(p.channels))
        keys = pieces(p.tokens, 64) if p.arch == "sm_120" and p.tokens <= 208 else pieces(p.tokens)
        return Config(rows=32, keys=keys, channels=(channels,))
    # Few heads would leave multiprocessors idle: a program for each block of rows then.
    resident = p.images * p.heads >= 2 * _MULTIPROCESSORS[p.arch]
    if p.channels > 64 or (p.tokens > 208 and not resident):
        return None
    # A whole tile of scores comes out of tensor memory at once, beside the others.
    largest = 64 if p.arch == "sm_100" else 256
    keys = pieces(p.tokens, largest) if p.tokens <= 208 else (256,)
    prefetches = resident and p.arch == "sm_90" and p.tokens <= 208
    return Config(
        rows=64,
        keys=keys,
        channels=pieces(p.channels),
        warps=8 if p.arch == "sm_100" and p.tokens > 208 else 4,
        stages=2 if prefetches else 1,
        resident=resident,
    )


def _backward_tile(p: Problem) -> Config | None:
    if p.arch not in _FROM_SHARED_MEMORY or p.arithmetic != "half":
        return None
    if p.tokens > TILE_TOKENS or p.channels > 64:
        return None
    keys = max(64, _power(p.tokens))
    return Config(
        rows=16 if keys == 128 else 32,
        keys=keys,
        channels=pieces(p.channels),
        warps=8 if keys > 128 else 4,
        stages=2,
    )


def _query(p: Problem) -> Config:
    if p.arithmetic == "ieee":
        # Just above a number of registers with which one more block fits, the compiler spills. Told
        # that there are more, Triton 3.6 does not for wide heads, but 3.9 does for others.
        many = p.channels <= 48 or (p.arch == "sm_80" and p.channels > 64)
        told = 255 if p.channels > 64 and p.arch != "sm_80" else None
        keys = 32 if 48 < p.channels <= 64 else 16
        config = _stream(p, rows=0, keys=0)._replace(rows=32, keys=keys, registers=told)
        return config._replace(warps=8 if many else 4)
    if p.arithmetic == "tf32" and p.arch == "sm_80" and p.channels > 64:
        return _stream(p, rows=0, keys=0)._replace(rows=16)
    if p.arch not in _FROM_SHARED_MEMORY and 16 < p.channels <= 64:
        return _stream(p, rows=32, keys=64)
    # 64 keys of a wide head would spill.
    narrow = p.arch not in _FROM_SHARED_MEMORY or (p.arch == "sm_100" and p.channels > 64)
    return _stream(p, rows=64, keys=32 if narrow else 64)


def _key(p: Problem) -> Config:
    # Two gradients are summed up here, so the tiles that would not spill are smaller.
    if p.arithmetic == "ieee":
        return _stream(p, rows=0, keys=0)._replace(warps=8 if p.channels <= 32 else 4)
    if p.arithmetic == "tf32":
        return _stream(p, rows=0, keys=0)._replace(rows=16, keys=16)
    widest = 32 if p.arch == "sm_120" else 64
    keys = 64 if p.arch in _FROM_SHARED_MEMORY or p.channels <= widest else 32
    return _stream(p, rows=32, keys=keys)


def _stream(p: Problem, rows: int, keys: int) -> Config:
    """A kernel that passes over blocks of tokens; ``rows`` and ``keys`` are those of half
    precision.
    """
    if p.arithmetic == "half":
        channels = pieces(p.channels)
        # Three pieces spill, and so do two in tensor memory if they are wide.
        largest = 2 if p.arch == "sm_90" else 1
        fits = len(channels) <= largest or (p.arch == "sm_100" and p.channels <= 64)
        if not fits:
            channels = (_power(p.channels),)
        return Config(rows=rows, keys=keys, channels=channels, stages=2)
    if p.arithmetic == "tf32":
        narrow = p.channels > 64 or (p.arch == "sm_120" and p.channels <= 32)
        keys = 16 if narrow else 32
        return Config(rows=32, keys=keys, channels=(_power(p.channels),))
    # Without matrix instructions a thread holds whole rows of both operands: narrow tiles.
    warps = 4 if p.arch == "sm_80" and p.channels > 64 else 8
    return Config(rows=16, keys=16, channels=(16,) * -(-p.channels // 16), warps=warps)


def _dropout_forward(p: Problem) -> Config:
    return _dropout(p, rows=64 if p.arch in _FROM_SHARED_MEMORY else 32, keys=32)


def _dropout_query(p: Problem) -> Config:
    config = _dropout_forward(p)
    if p.channels <= 64:
        return config
    # Wide heads spill in the tiles of the forward.
    if p.arithmetic == "ieee":
        # Seven pieces of the channels spill where eight do not.
        return config._replace(rows=32, keys=32, channels=(16,) * 8, warps=8)
    if p.arithmetic == "tf32":
        return config._replace(rows=16)
    return config if p.arch in _FROM_SHARED_MEMORY else config._replace(keys=16)


def _dropout_key(p: Problem) -> Config:
    # A piece of the channels that is 32 wide makes all warps repeat the same product.
    narrow = 16 if 16 < p.channels <= 32 else 32
    return _dropout(p, rows=32, keys=64 if p.arch in _FROM_SHARED_MEMORY else narrow)


def _dropout(p: Problem, rows: int, keys: int) -> Config:
    config = _stream(p, rows, keys)._replace(registers=255)
    # With four warps the map's gradient, the mask and P spill beside these heads.
    wide = p.channels > 48 or (p.arch == "sm_90" and p.channels <= 16)
    return config._replace(warps=8) if wide and p.arithmetic == "half" else config


def _kronecker(p: Problem) -> Config:
    large = max(p.grid or ()) > 32
    if p.arithmetic == "half":
        return Config(channels=(16,), warps=8 if large else 4)
    return Config(channels=(16,) if p.arithmetic == "tf32" else (8,), warps=8)


def _factor_gradient(p: Problem) -> Config:
    # Two blocks for each multiprocessor.
    groups = max(1, min(p.images, 2 * _MULTIPROCESSORS[p.arch] // max(1, p.heads)))
    if p.arithmetic == "half":
        # Tiles of 32 spill in 4 warps, those of 64 in tensor memory in 8.
        side = max(p.grid or ())
        few = side <= 16 or (side > 32 and p.arch == "sm_100")
        channels = 4 if side > 32 and p.arch not in _FROM_SHARED_MEMORY else 8
        return Config(channels=(channels,), warps=4 if few else 8, groups=groups)
    if p.arithmetic == "tf32":
        return Config(channels=(4,), warps=8, groups=groups)
    return Config(channels=(2,), warps=4, groups=groups)

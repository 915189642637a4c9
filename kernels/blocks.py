# SPDX-License-Identifier: Apache-2.0
"""What the kernels share: rows of tokens as tuples of tiles, and their products.

Triton's tiles have powers of two as sides. A head of 48 channels is a tuple of tiles 32 and 16
wide, and 196 keys are tiles of 128, 64 and 16, so that little of them is padding.

The switch ``DOT_F32`` is for Triton's interpreter, whose products of bfloat16 are wrong: with it,
what is loaded is widened to float32 at once, and stays so.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Whether the kernels of this process run in Triton's interpreter (``TRITON_INTERPRET=1``).
INTERPRETED = bool(triton.knobs.runtime.interpret)

# Exponentials are taken to the base 2, the one that the hardware has.
LOG2_E = tl.constexpr(1.4426950408889634)


def stride_unit(*tensors):
    """8 if it divides the strides of all of images, heads and tokens, else 1.

    Strides are passed in this unit: Triton then knows that rows begin at multiples of 16 bytes,
    and reads so many at once. By itself it asks a stride only for a factor of 16, which that of
    the heads lacks where they have 24 or 40 channels.
    """
    return 8 if all(s % 8 == 0 for x in tensors for s in x.stride()[:3]) else 1


def in_units(x, unit):
    """The strides of images, heads and tokens of x (B, H, N, d)."""
    return tuple(s // unit for s in x.stride()[:3])


@triton.jit
def image_and_head(B):
    """Which image and head a program works on. Programs go through the images of one head before
    the next, so that neighbours share the head's position table.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    return i_bh % B, i_bh // B


@triton.jit
def load_rows(
    p_x,
    o_n,
    stride_n,
    UNIT: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_CHUNKS: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """Rows ``o_n`` of x (N, D), zero beyond N and D: one tile for each chunk of the channels."""
    p_n = p_x + o_n[:, None].to(tl.int64) * stride_n * UNIT
    tiles = ()
    start = 0
    for c in tl.static_range(len(D_CHUNKS)):
        # [rows, D_CHUNKS[c]]
        o_d = start + tl.arange(0, D_CHUNKS[c])
        b_x = tl.load(p_n + o_d[None, :], mask=(o_n[:, None] < N) & (o_d[None, :] < D), other=0.0)
        if DOT_F32:
            b_x = b_x.to(tl.float32)
        tiles = tiles + (b_x,)
        start += D_CHUNKS[c]
    return tiles


@triton.jit
def store_rows(
    p_x,
    tiles,
    o_n,
    stride_n,
    UNIT: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_CHUNKS: tl.constexpr,
):
    """The inverse of :func:`load_rows`."""
    p_n = p_x + o_n[:, None].to(tl.int64) * stride_n * UNIT
    start = 0
    for c in tl.static_range(len(D_CHUNKS)):
        # [rows, D_CHUNKS[c]]
        o_d = start + tl.arange(0, D_CHUNKS[c])
        m_nd = (o_n[:, None] < N) & (o_d[None, :] < D)
        tl.store(p_n + o_d[None, :], tiles[c].to(p_x.dtype.element_ty), mask=m_nd)
        start += D_CHUNKS[c]


@triton.jit
def zero_rows(ROWS: tl.constexpr, D_CHUNKS: tl.constexpr):
    """Accumulators of ROWS rows."""
    tiles = ()
    for c in tl.static_range(len(D_CHUNKS)):
        # Triton 3.6 unpacks a tuple of constants into plain numbers.
        tiles = tiles + (tl.zeros([ROWS, tl.constexpr(D_CHUNKS[c])], tl.float32),)
    return tiles


@triton.jit
def scaled(tiles, factor):
    """Every tile times a number or a column."""
    products = ()
    for c in tl.static_range(len(tiles)):
        products = products + (tiles[c] * factor,)
    return products


@triton.jit
def inner_products(a, b, PRECISION: tl.constexpr):
    """a bᵀ over all channels: [rows of a, rows of b] in float32."""
    b_s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for c in tl.static_range(1, len(a)):
        b_s = tl.dot(a[c], tl.trans(b[c]), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def add_product(acc, b_w, x, PRECISION: tl.constexpr):
    """acc + w x for weights w [rows, n], rounded to the dtype of x, and x [n, channels]."""
    tiles = ()
    for c in tl.static_range(len(x)):
        tiles = tiles + (tl.dot(b_w.to(x[c].dtype), x[c], acc[c], input_precision=PRECISION),)
    return tiles


@triton.jit
def block_of_scores(
    b_q,
    p_k,
    o_j,
    stride_kn,
    scale,
    UNIT: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    D_CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """Scores of the queries ``b_q`` and the KEYS keys ``o_j`` for exponentials to the base 2, -inf
    beyond N: [rows, KEYS]; and the keys.
    """
    b_k = load_rows(p_k, o_j, stride_kn, UNIT, N, D, D_CHUNKS, DOT_F32)
    b_s = inner_products(b_q, b_k, PRECISION) * (scale * LOG2_E)
    if N % KEYS != 0:
        b_s = tl.where(o_j[None, :] < N, b_s, float("-inf"))
    return b_s, b_k


@triton.jit
def next_maximum(b_max, b_s):
    """Of rows of which another block of scores has come: their maximum, what to subtract from their
    scores, and the factor of the sums so far.
    """
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    # A block of scores may be -inf throughout and the row still be finite.
    b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
    return b_new, b_base, tl.exp2(b_max - b_base)

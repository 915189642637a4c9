# SPDX-License-Identifier: Apache-2.0
"""What the kernels of the convolutional stem share: positions of a map as rows of a tile, and what
a 3x3 convolution with padding 1 reads there.

Maps lie as (B, H, W, C) in memory. A tap is one of the nine weights of a channel, counted along
rows. Channels are tuples of tiles, as in :mod:`.blocks`.
"""

from __future__ import annotations

import triton
import triton.language as tl


def power(size):
    """The power of two that holds ``size``, at least the 16 that products take."""
    return max(16, triton.next_power_of_2(size))


def image_scale(mean, std):
    """Factor and shift of each channel that normalise uint8: ``(u / 255 - mean) / std``.

    Numbers, not tensors: a launch takes them along.
    """
    factors = tuple(1.0 / (255.0 * s) for s in std)
    return factors, tuple(-m / s for m, s in zip(mean, std, strict=True))


def within_reach(x, rows):
    """Whether 32 bits hold the offsets between any two of ``rows`` images x (B, C, H, W)."""
    sides = (min(rows, x.shape[0]), *x.shape[1:])
    return sum(side * stride for side, stride in zip(sides, x.stride(), strict=True)) < 2**31


@triton.jit
def first_image(i_tile, H, W, ROWS: tl.constexpr):
    """The image of the first position of tile ``i_tile``, see :func:`places`."""
    return i_tile.to(tl.int64) * ROWS // (H * W)


@triton.jit
def places(i_tile, B, H, W, ROWS: tl.constexpr):
    """The positions of tile ``i_tile`` of maps (B, H, W): image, row, column and whether they are
    any. Each is [ROWS]; images are int64, as strides want them.
    """
    start = i_tile.to(tl.int64) * ROWS
    i_b = start // (H * W)
    o_p = (start - i_b * (H * W)).to(tl.int32) + tl.arange(0, ROWS)
    o_b = i_b + o_p // (H * W)
    o_p = o_p % (H * W)
    return o_b, o_p // W, o_p % W, o_b < B


@triton.jit
def tap_reads(o_y, o_x, m_y, tap, H, W, STRIDE: tl.constexpr):
    """Where a convolution reads by ``tap`` for its outputs at (o_y, o_x): row, column and whether
    that lies inside the (H, W) that it reads.
    """
    o_h = o_y * STRIDE + (tap // 3 - 1)
    o_w = o_x * STRIDE + (tap % 3 - 1)
    return o_h, o_w, m_y & (o_h >= 0) & (o_h < H) & (o_w >= 0) & (o_w < W)


@triton.jit
def tap_writes(o_h, o_w, m_h, tap, H, W, STRIDE: tl.constexpr):
    """The inverse of :func:`tap_reads`: the output among (H, W) for which ``tap`` reads (o_h, o_w),
    and whether there is one.
    """
    o_y = o_h - (tap // 3 - 1)
    o_x = o_w - (tap % 3 - 1)
    m_y = m_h & (o_y >= 0) & (o_x >= 0)
    if STRIDE == 2:
        m_y = m_y & (o_y % 2 == 0) & (o_x % 2 == 0)
        o_y = o_y // 2
        o_x = o_x // 2
    return o_y, o_x, m_y & (o_y < H) & (o_x < W)


@triton.jit
def row_offsets(o_b, o_y, o_x, H, W, C: tl.constexpr):
    """Where the channels of positions of a map (B, H, W, C) begin: [ROWS] in int64."""
    return ((o_b * H + o_y) * W + o_x) * C


@triton.jit
def load_channels(
    p_x, o_row, m_row, start, C: tl.constexpr, CHUNKS: tl.constexpr, DOT_F32: tl.constexpr
):
    """Channels from ``start`` on at the offsets ``o_row``, zero where there is nothing: one tile
    for each of ``CHUNKS``.
    """
    tiles = ()
    for c in tl.static_range(len(CHUNKS)):
        # [ROWS, CHUNKS[c]]
        o_c = start + tl.arange(0, CHUNKS[c])
        m_x = m_row[:, None] & (o_c < C)[None, :]
        b_x = tl.load(p_x + (o_row[:, None] + o_c[None, :]), mask=m_x, other=0.0)
        if DOT_F32:
            b_x = b_x.to(tl.float32)
        tiles = tiles + (b_x,)
        start += CHUNKS[c]
    return tiles


@triton.jit
def load_vectors(p_x, start, C: tl.constexpr, CHUNKS: tl.constexpr):
    """Numbers of the channels from ``start`` on in float32, zero beyond C: one [CHUNKS[c]] each."""
    tiles = ()
    for c in tl.static_range(len(CHUNKS)):
        o_c = start + tl.arange(0, CHUNKS[c])
        tiles = tiles + (tl.load(p_x + o_c, mask=o_c < C, other=0.0).to(tl.float32),)
        start += CHUNKS[c]
    return tiles


@triton.jit
def rectified(b_x):
    """relu(x), of which NaN is NaN."""
    return tl.maximum(b_x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activated(tiles, scales, shifts, m_row):
    """relu(x scale + shift) in the dtype of x, and zero where a convolution pads."""
    found = ()
    for c in tl.static_range(len(tiles)):
        b_y = rectified(tiles[c].to(tl.float32) * scales[c][None, :] + shifts[c][None, :])
        found = found + (tl.where(m_row[:, None], b_y, 0.0).to(tiles[c].dtype),)
    return found


@triton.jit
def scale_and_shift(p_gamma, p_beta, b_mean, b_variance, o_c, eps, C: tl.constexpr):
    """A batch norm with these statistics as x scale + shift, for the channels ``o_c``."""
    b_gamma = tl.load(p_gamma + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    b_beta = tl.load(p_beta + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    b_scale = b_gamma / tl.sqrt(b_variance + eps)
    return b_scale, b_beta - b_mean * b_scale


@triton.jit
def affine(p_gamma, p_beta, p_mean, p_variance, o_c, eps, C: tl.constexpr):
    """The same with statistics that lie in memory."""
    b_mean = tl.load(p_mean + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    b_variance = tl.load(p_variance + o_c, mask=o_c < C, other=1.0).to(tl.float32)
    return scale_and_shift(p_gamma, p_beta, b_mean, b_variance, o_c, eps, C)


@triton.jit
def add_products(
    acc, b_x, p_w, start_out, start, OUT: tl.constexpr, STEP: tl.constexpr, C: tl.constexpr,
    OUT_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
    DOT_F32: tl.constexpr,
):  # fmt: skip
    """acc + x Wᵀ for channels of x from ``start`` on and the weights of the output channels from
    ``start_out`` on, of which there are OUT, STEP numbers apart.
    """
    sums = ()
    for n in tl.static_range(len(OUT_CHUNKS)):
        # [OUT_CHUNKS[n], CHUNKS[c]]
        o_out = start_out + tl.arange(0, OUT_CHUNKS[n])
        b_w = load_channels(p_w, o_out * STEP, o_out < OUT, start, C, CHUNKS, DOT_F32)
        b_s = acc[n]
        for c in tl.static_range(len(CHUNKS)):
            b_s = tl.dot(b_x[c], tl.trans(b_w[c]), b_s, input_precision=PRECISION)
        sums = sums + (b_s,)
        start_out += OUT_CHUNKS[n]
    return sums


@triton.jit
def add_taps(
    acc, b_x, p_w, tap, start_out, start, OUT: tl.constexpr, C: tl.constexpr,
    OUT_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
    DOT_F32: tl.constexpr,
):  # fmt: skip
    """acc + x Wᵀ for what ``tap`` reads and its weights, of a convolution's (OUT, 3, 3, C)."""
    return add_products(
        acc, b_x, p_w + tap * C, start_out, start, OUT, 9 * C, C, OUT_CHUNKS, CHUNKS, PRECISION,
        DOT_F32,
    )  # fmt: skip


@triton.jit
def image_columns(strides, K: tl.constexpr):
    """What the columns of a tile of an image's taps are, k = 9 c + tap as in a weight: offsets from
    the top left tap of the first channel, rows and columns from there. Each is [K].
    """
    o_k = tl.arange(0, K)
    o_h = o_k % 9 // 3
    o_w = o_k % 3
    return (o_k // 9) * strides[1] + o_h * strides[2] + o_w * strides[3], o_h, o_w


@triton.jit
def of_channels(numbers, C: tl.constexpr, K: tl.constexpr):
    """A number for each channel as [K] in the order of :func:`image_columns`."""
    o_c = tl.arange(0, K) // 9
    b_x = tl.zeros([K], tl.float32)
    for c in tl.static_range(C):
        b_x = tl.where(o_c == c, numbers[c], b_x)
    return b_x


@triton.jit
def load_image_taps(
    p_x, i_b, o_b, o_y, o_x, m_y, strides, H, W, factors, shifts, columns,
    DTYPE: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr,
    DOT_F32: tl.constexpr,
):  # fmt: skip
    """The 9 C values [ROWS, K] that the first convolution reads of images (B, C, H, W) for its
    outputs at (o_y, o_x): uint8 normalised and rounded to ``DTYPE``, zero outside.

    ``strides`` are those of the images, ``columns`` what :func:`image_columns` gave for them, and
    ``i_b`` is the first image: from there on offsets are short (:func:`within_reach`).
    """
    o_column, o_kh, o_kw = columns
    o_top = o_y * STRIDE - 1
    o_left = o_x * STRIDE - 1
    # [ROWS, K]
    o_h = o_top[:, None] + o_kh[None, :]
    o_w = o_left[:, None] + o_kw[None, :]
    m_x = m_y[:, None] & (o_h >= 0) & (o_h < H) & (o_w >= 0) & (o_w < W)
    m_x = m_x & (tl.arange(0, K) < 9 * C)[None, :]
    o_row = (o_b - i_b).to(tl.int32) * strides[0] + o_top * strides[2] + o_left * strides[3]
    p_b = p_x + i_b * strides[0]
    b_x = tl.load(p_b + (o_row[:, None] + o_column[None, :]), mask=m_x, other=0)
    if p_x.dtype.element_ty == tl.uint8:
        b_factor = of_channels(factors, C, K)
        b_shift = of_channels(shifts, C, K)
        b_x = b_x.to(tl.float32) * b_factor[None, :] + b_shift[None, :]
        b_x = tl.where(m_x, b_x, 0.0)
    return b_x.to(tl.float32 if DOT_F32 else DTYPE)


@triton.jit
def load_image_weights(
    p_w, o_out, OUT: tl.constexpr, C: tl.constexpr, K: tl.constexpr, DOT_F32: tl.constexpr
):
    """Weights (OUT, C, 3, 3) of the output channels ``o_out`` as a tile [output channels, K]."""
    o_k = tl.arange(0, K)
    m_w = (o_out < OUT)[:, None] & (o_k < 9 * C)[None, :]
    b_w = tl.load(p_w + o_out[:, None] * (9 * C) + o_k[None, :], mask=m_w, other=0.0)
    if DOT_F32:
        b_w = b_w.to(tl.float32)
    return b_w


@triton.jit
def finish_layer(
    acc, p_out, p_gamma, p_beta, p_mean, p_variance, eps, p_partials, i_tile, tiles, start_out,
    m_y, OUT: tl.constexpr, OUT_CHUNKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Store a layer's sums of tile ``i_tile`` into (B, H, W, OUT), channels from ``start_out`` on.

    With a batch norm, relu(batch_norm(sum)); without, the sums, and their mean and sum of squared
    deviations over the tile in ``partials`` (2, tiles, OUT) if that is there.
    """
    # [ROWS]
    o_row = (i_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)) * OUT
    for n in tl.static_range(len(OUT_CHUNKS)):
        # [ROWS, OUT_CHUNKS[n]]
        o_out = start_out + tl.arange(0, OUT_CHUNKS[n])
        b_y = acc[n]
        if p_gamma is not None:
            b_scale, b_shift = affine(p_gamma, p_beta, p_mean, p_variance, o_out, eps, OUT)
            b_y = rectified(b_y * b_scale[None, :] + b_shift[None, :])
        m_out = m_y[:, None] & (o_out < OUT)[None, :]
        p_y = p_out + (o_row[:, None] + o_out[None, :])
        tl.store(p_y, b_y.to(p_out.dtype.element_ty), mask=m_out)
        if p_partials is not None:
            # Of the sums before they are rounded. Rows that are no positions read zeros.
            b_mean = tl.sum(b_y, 0) / tl.sum(m_y.to(tl.float32), 0)
            b_d = tl.where(m_y[:, None], b_y - b_mean[None, :], 0.0)
            p_p = p_partials + i_tile.to(tl.int64) * OUT + o_out
            tl.store(p_p, b_mean, mask=o_out < OUT)
            tl.store(p_p + tiles.to(tl.int64) * OUT, tl.sum(b_d * b_d, 0), mask=o_out < OUT)
        start_out += OUT_CHUNKS[n]

# SPDX-License-Identifier: Apache-2.0
"""The gradient of the weights of the first convolution, which read the images as they come.

uint8 images u are read as the integers u - c of :mod:`fastvit.ops.uint8_fold`, which every dtype
holds exactly. The convolution read (u - c + shift) / scale inside the images and zero around them,
so that with g the gradient of its sums

    dW = (Σ (u - c) g + shift Σ g) / scale,

where the second sum is over the positions whose tap lies inside: nine more columns of the product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import INTERPRETED
from .stem_blocks import (
    first_image,
    image_columns,
    load_image_taps,
    places,
    power,
    row_offsets,
)
from .stem_gradient_blocks import load_coefficients, load_raw_gradient


@triton.jit
def _taps_inside(o_y, o_x, m_p, H, W, STRIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Ones where a tap lies inside the image, else zeros: [ROWS, 16], of which nine are taps."""
    o_t = tl.arange(0, 16)
    o_h = (o_y * STRIDE - 1)[:, None] + (o_t // 3)[None, :]
    o_w = (o_x * STRIDE - 1)[:, None] + (o_t % 3)[None, :]
    m_x = m_p[:, None] & (o_h >= 0) & (o_h < H) & (o_w >= 0) & (o_w < W)
    return tl.where(m_x, 1.0, 0.0).to(DTYPE)


@triton.jit(do_not_specialize=["B", "H", "W", "OH", "OW", "TILES"])
def stem_image_gradient_kernel(
    dz,
    raw,
    coefficients,
    x,
    partials,
    x_strides,
    factors,
    centers,
    B,
    H,
    W,
    OH,
    OW,
    TILES,
    STRIDE: tl.constexpr,
    C: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """OUTS output channels, over TILES tiles of ROWS positions, into partials (programs, 9 C, OUT),
    and for uint8 (programs, 9 C + 9, OUT).
    """
    PIXELS: tl.constexpr = x.dtype.element_ty == tl.uint8
    HEIGHT: tl.constexpr = 9 * C + 9 if PIXELS else 9 * C
    i_s = tl.program_id(1)
    start = tl.program_id(0) * OUTS
    columns = image_columns(x_strides, K)
    k = None
    if raw is not None:
        k = load_coefficients(coefficients, start + tl.arange(0, OUTS), OUT)
    acc = tl.zeros([OUTS, K], tl.float32)
    b_inside = tl.zeros([OUTS, 16], tl.float32)
    tiles = ((tl.cast(B, tl.int64) * OH * OW + ROWS - 1) // ROWS).to(tl.int32)
    for i_t in range(i_s * TILES, tl.minimum(i_s * TILES + TILES, tiles)):
        i_tile = tl.cast(i_t, tl.int32)
        o_b, o_y, o_x, m_p = places(i_tile, B, OH, OW, ROWS)
        o_row = row_offsets(o_b, o_y, o_x, OH, OW, OUT)
        # [ROWS, OUTS]
        b_g = load_raw_gradient(dz, raw, k, o_row, m_p, start, OUT, OUTS, DOT_F32)
        # [ROWS, K]
        b_x = load_image_taps(
            x, first_image(i_tile, OH, OW, ROWS), o_b, o_y, o_x, m_p, x_strides, H, W, factors,
            centers, columns, dz.dtype.element_ty, C, STRIDE, K, DOT_F32,
        )  # fmt: skip
        acc = tl.dot(tl.trans(b_g), b_x, acc, input_precision=PRECISION)
        if PIXELS:
            b_ones = _taps_inside(o_y, o_x, m_p, H, W, STRIDE, b_g.dtype)
            b_inside = tl.dot(tl.trans(b_g), b_ones, b_inside, input_precision=PRECISION)

    o_out = start + tl.arange(0, OUTS)
    o_k = tl.arange(0, K)
    p_p = partials + i_s.to(tl.int64) * (HEIGHT * OUT) + o_out[:, None]
    m_w = (o_out < OUT)[:, None] & (o_k < 9 * C)[None, :]
    tl.store(p_p + o_k[None, :] * OUT, acc, mask=m_w)
    if PIXELS:
        o_t = tl.arange(0, 16)
        m_w = (o_out < OUT)[:, None] & (o_t < 9)[None, :]
        tl.store(p_p + (9 * C + o_t)[None, :] * OUT, b_inside, mask=m_w)


def stem_image_gradient(dz, raw, coefficients, x, centers, stride, dtype, precision, config):
    """The gradient of the first convolution's weights in parts: (parts, 9 C, OUT), and with
    ``centers``, one integer for each channel of uint8 images, (parts, 9 C + 9, OUT); ``dtype`` is
    float32.

    dz and raw (B, OUT, OH, OW) have channels innermost in memory; without raw and ``coefficients``
    (4, OUT), dz is the gradient of raw. x (B, C, H, W) has any strides.
    """
    B, C, H, W = x.shape
    _, OUT, OH, OW = dz.shape
    factors, minus = None, None
    if centers is not None:
        factors, minus = (1.0,) * C, tuple(-float(center) for center in centers)
    tiles = triton.cdiv(B * OH * OW, config.rows)
    each = triton.cdiv(tiles, config.groups)
    programs = triton.cdiv(tiles, each)
    height = 9 * C if centers is None else 9 * C + 9
    partials = dz.new_empty(programs, height, OUT, dtype=dtype)
    outs = config.keys[0]
    stem_image_gradient_kernel[(triton.cdiv(OUT, outs), programs)](
        dz=dz,
        raw=raw,
        coefficients=coefficients,
        x=x,
        partials=partials,
        x_strides=x.stride(),
        factors=factors,
        centers=minus,
        B=B,
        H=H,
        W=W,
        OH=OH,
        OW=OW,
        TILES=each,
        STRIDE=stride,
        C=C,
        OUT=OUT,
        ROWS=config.rows,
        OUTS=outs,
        K=power(9 * C),
        PRECISION=precision,
        DOT_F32=INTERPRETED,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )
    return partials

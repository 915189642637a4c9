# SPDX-License-Identifier: Apache-2.0
"""The first 3x3 convolution of the stem, which reads the images as they come."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import INTERPRETED
from .stem_blocks import (
    finish_layer,
    first_image,
    image_columns,
    image_scale,
    load_image_taps,
    load_image_weights,
    places,
    power,
)


@triton.jit(do_not_specialize=["B", "H", "W", "OH", "OW", "tiles"])
def stem_first_kernel(
    x,
    weight,
    gamma,
    beta,
    mean,
    variance,
    eps,
    out,
    partials,
    x_strides,
    factors,
    shifts,
    B,
    H,
    W,
    OH,
    OW,
    tiles,
    C: tl.constexpr,
    OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    OUT_CHUNKS: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """The sums of the convolution of images, stored as :func:`finish_layer` says. One program for
    ROWS positions and OUT_BLOCK channels.
    """
    OUT_BLOCKS: tl.constexpr = (OUT + OUT_BLOCK - 1) // OUT_BLOCK
    i_tile = tl.program_id(0) // OUT_BLOCKS
    start_out = tl.program_id(0) % OUT_BLOCKS * OUT_BLOCK
    o_b, o_y, o_x, m_y = places(i_tile, B, OH, OW, ROWS)
    i_b = first_image(i_tile, OH, OW, ROWS)
    # [ROWS, K]
    columns = image_columns(x_strides, K)
    b_x = load_image_taps(
        x, i_b, o_b, o_y, o_x, m_y, x_strides, H, W, factors, shifts, columns,
        weight.dtype.element_ty, C, STRIDE, K, DOT_F32,
    )  # fmt: skip
    acc = ()
    start = start_out
    for n in tl.static_range(len(OUT_CHUNKS)):
        # [OUT_CHUNKS[n], K]
        o_out = start + tl.arange(0, OUT_CHUNKS[n])
        b_w = load_image_weights(weight, o_out, OUT, C, K, DOT_F32)
        acc = acc + (tl.dot(b_x, tl.trans(b_w), input_precision=PRECISION),)
        start += OUT_CHUNKS[n]
    finish_layer(
        acc, out, gamma, beta, mean, variance, eps, partials, i_tile, tiles, start_out, m_y,
        OUT, OUT_CHUNKS, ROWS,
    )  # fmt: skip


def stem_first(x, weight, norm, eps, out, partials, pixels, stride, precision, config):
    """Images x (B, C, H, W), any strides, into ``out`` (B, OUT, OH, OW) with channels innermost.

    ``pixels`` are the mean and std of uint8 images, None for others; ``weight`` (OUT, C, 3, 3) is
    contiguous. ``norm`` and ``partials`` as in :func:`stem_conv`.
    """
    B, C, H, W = x.shape
    _, OUT, OH, OW = out.shape
    gamma, beta, mean, variance = norm if norm is not None else (None,) * 4
    factors, shifts = image_scale(*pixels) if pixels is not None else (None, None)
    tiles = triton.cdiv(B * OH * OW, config.rows)
    block = sum(config.keys)
    stem_first_kernel[(tiles * triton.cdiv(OUT, block),)](
        x=x,
        weight=weight,
        gamma=gamma,
        beta=beta,
        mean=mean,
        variance=variance,
        eps=eps,
        out=out,
        partials=partials,
        x_strides=x.stride(),
        factors=factors,
        shifts=shifts,
        B=B,
        H=H,
        W=W,
        OH=OH,
        OW=OW,
        tiles=tiles,
        C=C,
        OUT=OUT,
        STRIDE=stride,
        ROWS=config.rows,
        OUT_CHUNKS=config.keys,
        OUT_BLOCK=block,
        K=power(9 * C),
        PRECISION=precision,
        DOT_F32=INTERPRETED,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )

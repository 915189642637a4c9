# SPDX-License-Identifier: Apache-2.0
"""A 3x3 convolution of the stem after its first: an implicit product over the nine taps."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import INTERPRETED, zero_rows
from .stem_blocks import (
    activated,
    add_taps,
    finish_layer,
    load_channels,
    load_vectors,
    places,
    row_offsets,
    tap_reads,
)


@triton.jit(do_not_specialize=["B", "H", "W", "OH", "OW", "tiles"])
def stem_conv_kernel(
    x,
    weight,
    scale,
    shift,
    gamma,
    beta,
    mean,
    variance,
    eps,
    out,
    partials,
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
    C_CHUNKS: tl.constexpr,
    C_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """The sums of a convolution, of x or, with ``scale`` and ``shift``, of relu(x scale + shift);
    stored as :func:`finish_layer` says. One program for ROWS positions and OUT_BLOCK channels.
    """
    OUT_BLOCKS: tl.constexpr = (OUT + OUT_BLOCK - 1) // OUT_BLOCK
    C_BLOCKS: tl.constexpr = (C + C_BLOCK - 1) // C_BLOCK
    # Neighbours read the same x.
    i_tile = tl.program_id(0) // OUT_BLOCKS
    start_out = tl.program_id(0) % OUT_BLOCKS * OUT_BLOCK
    o_b, o_y, o_x, m_y = places(i_tile, B, OH, OW, ROWS)
    o_row = row_offsets(o_b, o_y * STRIDE - 1, o_x * STRIDE - 1, H, W, C)
    acc = zero_rows(ROWS, OUT_CHUNKS)
    for i in range(9 * C_BLOCKS):
        # [ROWS, C_BLOCK]
        tap = i // C_BLOCKS
        start = i % C_BLOCKS * C_BLOCK
        _, _, m_x = tap_reads(o_y, o_x, m_y, tap, H, W, STRIDE)
        p_x = x + (tap // 3 * W + tap % 3) * C
        b_x = load_channels(p_x, o_row, m_x, start, C, C_CHUNKS, DOT_F32)
        if scale is not None:
            b_scale = load_vectors(scale, start, C, C_CHUNKS)
            b_shift = load_vectors(shift, start, C, C_CHUNKS)
            b_x = activated(b_x, b_scale, b_shift, m_x)
        acc = add_taps(
            acc, b_x, weight, tap, start_out, start, OUT, C, OUT_CHUNKS, C_CHUNKS, PRECISION,
            DOT_F32,
        )  # fmt: skip
    finish_layer(
        acc, out, gamma, beta, mean, variance, eps, partials, i_tile, tiles, start_out, m_y,
        OUT, OUT_CHUNKS, ROWS,
    )  # fmt: skip


def stem_conv(x, weight, affine, norm, eps, out, partials, stride, precision, config):
    """x (B, C, H, W) into ``out`` (B, OUT, OH, OW), both with C innermost in memory.

    ``weight`` (OUT, C, 3, 3) has C innermost, too. ``affine`` (2, C) is the scale and shift that
    make x an activation, or None; ``norm`` the weight, bias, mean and variance of the batch norm
    that follows, or None. ``partials`` is None or (2, tiles, OUT).
    """
    B, C, H, W = x.shape
    _, OUT, OH, OW = out.shape
    gamma, beta, mean, variance = norm if norm is not None else (None,) * 4
    tiles = triton.cdiv(B * OH * OW, config.rows)
    block = sum(config.keys)
    stem_conv_kernel[(tiles * triton.cdiv(OUT, block),)](
        x=x,
        weight=weight,
        scale=None if affine is None else affine[0],
        shift=None if affine is None else affine[1],
        gamma=gamma,
        beta=beta,
        mean=mean,
        variance=variance,
        eps=eps,
        out=out,
        partials=partials,
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
        C_CHUNKS=config.channels,
        C_BLOCK=sum(config.channels),
        PRECISION=precision,
        DOT_F32=INTERPRETED,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )

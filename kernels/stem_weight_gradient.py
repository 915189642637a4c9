# SPDX-License-Identifier: Apache-2.0
"""The gradient of the weights of a convolution of the stem, 3x3 with padding 1 or the last 1x1.

The positions are split into parts, each summed by its own program, and ``stem_weight_sum`` adds
the parts up in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import INTERPRETED
from .stem_blocks import activated, affine, load_channels, places, row_offsets, tap_reads


@triton.jit(do_not_specialize=["B", "H", "W", "OH", "OW", "TILES"])
def stem_weight_gradient_kernel(
    grad,
    below,
    gamma,
    beta,
    mean,
    variance,
    partials,
    grad_strides,
    eps,
    B,
    H,
    W,
    OH,
    OW,
    TILES,
    UNIT: tl.constexpr,
    STRIDE: tl.constexpr,
    TAPS: tl.constexpr,
    C: tl.constexpr,
    OUT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    INS: tl.constexpr,
    OUTS: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """GROUP taps of INS by OUTS channels, over TILES tiles of ROWS positions, into partials
    (programs, C, TAPS, OUT).
    """
    GROUPS: tl.constexpr = TAPS // GROUP
    OUT_BLOCKS: tl.constexpr = (OUT + OUTS - 1) // OUTS
    i_s = tl.program_id(1)
    first_tap = tl.program_id(0) % GROUPS * GROUP
    i_out = tl.program_id(0) // GROUPS % OUT_BLOCKS
    i_in = tl.program_id(0) // (GROUPS * OUT_BLOCKS)
    o_in = i_in * INS + tl.arange(0, INS)
    o_out = i_out * OUTS + tl.arange(0, OUTS)
    if gamma is not None:
        b_scale, b_shift = affine(gamma, beta, mean, variance, o_in, eps, C)

    acc = ()
    for _ in tl.static_range(GROUP):
        acc = acc + (tl.zeros([INS, OUTS], tl.float32),)
    tiles = ((tl.cast(B, tl.int64) * OH * OW + ROWS - 1) // ROWS).to(tl.int32)
    for i_t in range(i_s * TILES, tl.minimum(i_s * TILES + TILES, tiles)):
        o_b, o_y, o_x, m_p = places(tl.cast(i_t, tl.int32), B, OH, OW, ROWS)
        if TAPS == 1:
            o_n = (o_y * OW + o_x).to(tl.int64)
            o_row = (o_b * grad_strides[0] + o_n * grad_strides[1]) * UNIT
            o_below = row_offsets(o_b, o_y, o_x, H, W, C)
        else:
            o_row = row_offsets(o_b, o_y, o_x, OH, OW, OUT)
            o_below = row_offsets(o_b, o_y * STRIDE - 1, o_x * STRIDE - 1, H, W, C)
        # [ROWS, OUTS]
        b_g = load_channels(grad, o_row, m_p, i_out * OUTS, OUT, (OUTS,), DOT_F32)[0]
        sums = ()
        for t in tl.static_range(GROUP):
            m_x = m_p
            p_x = below
            if TAPS == 9:
                tap = first_tap + t
                m_x = tap_reads(o_y, o_x, m_p, tap, H, W, STRIDE)[2]
                p_x = below + (tap // 3 * W + tap % 3) * C
            # [ROWS, INS]
            b_x = load_channels(p_x, o_below, m_x, i_in * INS, C, (INS,), DOT_F32)
            if gamma is not None:
                b_x = activated(b_x, (b_scale,), (b_shift,), m_x)
            sums = sums + (tl.dot(tl.trans(b_x[0]), b_g, acc[t], input_precision=PRECISION),)
        acc = sums

    for t in tl.static_range(GROUP):
        o_rows = (i_s.to(tl.int64) * C + o_in) * TAPS + first_tap + t
        m_w = (o_in < C)[:, None] & (o_out < OUT)[None, :]
        tl.store(partials + (o_rows[:, None] * OUT + o_out[None, :]), acc[t], mask=m_w)


def stem_weight_gradient(grad, stride, taps, below, norm, eps, dtype, precision, config):
    """The gradient of a convolution's weights in parts (parts, C * taps, OUT) of ``dtype`` float32.

    grad is that of :func:`stem_input_gradient`; ``taps`` 9 or 1. ``below`` (B, C, H, W), channels
    innermost, is what the batch norm ``norm`` (weight, bias, mean, variance) read before this
    convolution; without a norm, what the convolution itself read.
    """
    B, C, H, W = below.shape
    (OH, OW), OUT = ((H, W), grad.shape[2]) if taps == 1 else (grad.shape[2:], grad.shape[1])
    strides = grad.stride()[:2] if taps == 1 else (0, 0)
    unit = 8 if all(s % 8 == 0 for s in strides) else 1
    group = min(config.taps, taps)
    INS, OUTS = config.channels[0], config.keys[0]
    blocks = triton.cdiv(C, INS) * triton.cdiv(OUT, OUTS) * (taps // group)
    tiles = triton.cdiv(B * OH * OW, config.rows)
    each = triton.cdiv(tiles, config.groups)
    programs = triton.cdiv(tiles, each)
    partials = grad.new_empty(programs, C * taps, OUT, dtype=dtype)
    gamma, beta, mean, variance = norm if norm is not None else (None,) * 4
    stem_weight_gradient_kernel[(blocks, programs)](
        grad=grad,
        below=below,
        gamma=gamma,
        beta=beta,
        mean=mean,
        variance=variance,
        partials=partials,
        grad_strides=tuple(s // unit for s in strides),
        eps=eps,
        B=B,
        H=H,
        W=W,
        OH=OH,
        OW=OW,
        TILES=each,
        UNIT=unit,
        STRIDE=stride,
        TAPS=taps,
        C=C,
        OUT=OUT,
        GROUP=group,
        ROWS=config.rows,
        INS=INS,
        OUTS=OUTS,
        PRECISION=precision,
        DOT_F32=INTERPRETED,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )
    return partials

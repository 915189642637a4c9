# SPDX-License-Identifier: Apache-2.0
"""The first two convolutions of the stem in one kernel, for inference: what the first gives is the
largest map of the network, and is computed again at each tap of the second instead of being stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import INTERPRETED, zero_rows
from .stem_blocks import (
    add_taps,
    affine,
    finish_layer,
    first_image,
    image_columns,
    image_scale,
    load_image_taps,
    load_image_weights,
    places,
    power,
    rectified,
    tap_reads,
)


@triton.jit(do_not_specialize=["B", "H", "W", "H1", "W1", "OH", "OW"])
def stem_pair_kernel(
    x,
    weight1,
    gamma1,
    beta1,
    mean1,
    variance1,
    weight2,
    gamma2,
    beta2,
    mean2,
    variance2,
    eps,
    out,
    x_strides,
    factors,
    shifts,
    B,
    H,
    W,
    H1,
    W1,
    OH,
    OW,
    C: tl.constexpr,
    C1: tl.constexpr,
    OUT: tl.constexpr,
    STRIDE1: tl.constexpr,
    STRIDE2: tl.constexpr,
    ROWS: tl.constexpr,
    OUT_CHUNKS: tl.constexpr,
    C1_CHUNKS: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """out = stage2(stage1(x)), a stage being relu(batch_norm(conv(x))). One program for ROWS
    positions and all channels.
    """
    i_tile = tl.program_id(0)
    o_b, o_y, o_x, m_y = places(i_tile, B, OH, OW, ROWS)
    i_b = first_image(i_tile, OH, OW, ROWS)
    columns = image_columns(x_strides, K)
    weights = ()
    scales = ()
    shifts1 = ()
    start = 0
    for c in tl.static_range(len(C1_CHUNKS)):
        # [C1_CHUNKS[c], K]
        o_c = start + tl.arange(0, C1_CHUNKS[c])
        weights = weights + (load_image_weights(weight1, o_c, C1, C, K, DOT_F32),)
        b_scale, b_shift = affine(gamma1, beta1, mean1, variance1, o_c, eps, C1)
        scales = scales + (b_scale,)
        shifts1 = shifts1 + (b_shift,)
        start += C1_CHUNKS[c]
    acc = zero_rows(ROWS, OUT_CHUNKS)
    for tap in range(9):
        # Where the second convolution reads the first's map.
        o_h, o_w, m_h = tap_reads(o_y, o_x, m_y, tap, H1, W1, STRIDE2)
        b_x = load_image_taps(
            x, i_b, o_b, o_h, o_w, m_h, x_strides, H, W, factors, shifts, columns,
            weight1.dtype.element_ty, C, STRIDE1, K, DOT_F32,
        )  # fmt: skip
        tiles = ()
        for c in tl.static_range(len(C1_CHUNKS)):
            # [ROWS, C1_CHUNKS[c]]
            b_s = tl.dot(b_x, tl.trans(weights[c]), input_precision=PRECISION)
            b_a = rectified(b_s * scales[c][None, :] + shifts1[c][None, :])
            # The padding of the second convolution, which the shift has made something else.
            tiles = tiles + (tl.where(m_h[:, None], b_a, 0.0).to(b_x.dtype),)
        acc = add_taps(
            acc, tiles, weight2, tap, 0, 0, OUT, C1, OUT_CHUNKS, C1_CHUNKS, PRECISION, DOT_F32
        )
    finish_layer(
        acc, out, gamma2, beta2, mean2, variance2, eps, None, i_tile, 0, 0, m_y,
        OUT, OUT_CHUNKS, ROWS,
    )  # fmt: skip


def stem_pair(x, weights, norms, eps, out, pixels, strides, precision, config):
    """Images x (B, C, H, W), any strides, into ``out`` (B, OUT, OH, OW) with channels innermost.

    ``weights`` are (C1, C, 3, 3), contiguous, and (OUT, C1, 3, 3), its input channels innermost;
    ``norms`` the weight, bias, mean and variance of each batch norm; ``pixels`` the mean and std
    of uint8 images, None for others.
    """
    B, C, H, W = x.shape
    _, OUT, OH, OW = out.shape
    (gamma1, beta1, mean1, variance1), (gamma2, beta2, mean2, variance2) = norms
    factors, shifts = image_scale(*pixels) if pixels is not None else (None, None)
    stem_pair_kernel[(triton.cdiv(B * OH * OW, config.rows),)](
        x=x,
        weight1=weights[0],
        gamma1=gamma1,
        beta1=beta1,
        mean1=mean1,
        variance1=variance1,
        weight2=weights[1],
        gamma2=gamma2,
        beta2=beta2,
        mean2=mean2,
        variance2=variance2,
        eps=eps,
        out=out,
        x_strides=x.stride(),
        factors=factors,
        shifts=shifts,
        B=B,
        H=H,
        W=W,
        H1=(H - 1) // strides[0] + 1,
        W1=(W - 1) // strides[0] + 1,
        OH=OH,
        OW=OW,
        C=C,
        C1=weights[0].shape[0],
        OUT=OUT,
        STRIDE1=strides[0],
        STRIDE2=strides[1],
        ROWS=config.rows,
        OUT_CHUNKS=config.keys,
        C1_CHUNKS=config.channels,
        K=power(9 * C),
        PRECISION=precision,
        DOT_F32=INTERPRETED,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )

# SPDX-License-Identifier: Apache-2.0
"""Attention of any number of tokens, keys a block at a time with a running softmax
(FlashAttention, arXiv 2205.14135), and its place in GPSA.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    INTERPRETED,
    add_product,
    block_of_scores,
    image_and_head,
    in_units,
    load_rows,
    next_maximum,
    scaled,
    store_rows,
    stride_unit,
    zero_rows,
)


@triton.jit
def forward_stream_kernel(
    q,
    k,
    v,
    gating_param,
    out,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    B,
    scale,
    UNIT: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D_CHUNKS: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """out = softmax(scale q kᵀ) v; GATED, out = out + (1 - g) softmax(scale q kᵀ) v."""
    i_b, i_h = image_and_head(B)
    p_k = k + (i_b * k_strides[0] + i_h * k_strides[1]) * UNIT
    p_v = v + (i_b * v_strides[0] + i_h * v_strides[1]) * UNIT
    p_out = out + (i_b * out_strides[0] + i_h * out_strides[1]) * UNIT

    o_i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    p_q = q + (i_b * q_strides[0] + i_h * q_strides[1]) * UNIT
    b_q = load_rows(p_q, o_i, q_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    acc = zero_rows(ROWS, D_CHUNKS)
    for start in range(0, N, KEYS):
        # [ROWS, KEYS]
        o_j = start + tl.arange(0, KEYS)
        b_s, _ = block_of_scores(
            b_q, p_k, o_j, k_strides[2], scale, UNIT, N, D, KEYS, D_CHUNKS, PRECISION, DOT_F32
        )
        b_max, b_base, b_shrink = next_maximum(b_max, b_s)
        b_e = tl.exp2(b_s - b_base[:, None])
        b_sum = b_sum * b_shrink + tl.sum(b_e, 1)
        b_v = load_rows(p_v, o_j, v_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)
        acc = add_product(scaled(acc, b_shrink[:, None]), b_e, b_v, PRECISION)

    if GATED:
        share = tl.sigmoid(-tl.load(gating_param + i_h).to(tl.float32))
        acc = scaled(acc, (share / b_sum)[:, None])
        position = load_rows(p_out, o_i, out_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)
        mixed = ()
        for c in tl.static_range(len(D_CHUNKS)):
            mixed = mixed + (acc[c] + position[c].to(tl.float32),)
        store_rows(p_out, mixed, o_i, out_strides[2], UNIT, N, D, D_CHUNKS)
    else:
        store_rows(
            p_out, scaled(acc, (1.0 / b_sum)[:, None]), o_i, out_strides[2], UNIT, N, D, D_CHUNKS
        )


def forward_stream(q, k, v, gating_param, out, scale, precision, config):
    """q, k, v (B, H, N, d) into ``out``, by ``config``. With a gate, ``out`` holds the gated
    position term beforehand; without, ``gating_param`` is None.
    """
    B, H, N, D = q.shape
    unit = stride_unit(q, k, v, out)
    forward_stream_kernel[(B * H, triton.cdiv(N, config.rows))](
        q=q,
        k=k,
        v=v,
        gating_param=gating_param,
        out=out,
        q_strides=in_units(q, unit),
        k_strides=in_units(k, unit),
        v_strides=in_units(v, unit),
        out_strides=in_units(out, unit),
        B=B,
        scale=scale,
        UNIT=unit,
        N=N,
        D=D,
        ROWS=config.rows,
        KEYS=config.keys,
        D_CHUNKS=config.channels,
        GATED=gating_param is not None,
        PRECISION=precision,
        DOT_F32=INTERPRETED,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
        enable_fp_fusion=True,
    )

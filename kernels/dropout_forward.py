# SPDX-License-Identifier: Apache-2.0
"""GPSA with attention dropout. The keys pass by twice: for the softmax's sum, then for the mixed
weights, of which some stay.
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
from .dropout import amplification, kept, position_weights


@triton.jit
def dropout_forward_kernel(
    q,
    k,
    v,
    py,
    px,
    gating_param,
    seed,
    out,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    B,
    scale,
    dropout_p,
    amplify,
    UNIT: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    GW: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D_CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """out = amplify · (kept ∘ ((1 - g) softmax(scale q kᵀ) + g P)) v for one block of ROWS."""
    i_b, i_h = image_and_head(B)
    p_k = k + (i_b * k_strides[0] + i_h * k_strides[1]) * UNIT
    p_v = v + (i_b * v_strides[0] + i_h * v_strides[1]) * UNIT
    p_py = py + i_h * TILE_Y * TILE_Y
    p_px = px + i_h * TILE_X * TILE_X
    o_i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    p_q = q + (i_b * q_strides[0] + i_h * q_strides[1]) * UNIT
    b_q = load_rows(p_q, o_i, q_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)

    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    for start in range(0, N, KEYS):
        # [ROWS, KEYS]
        o_j = start + tl.arange(0, KEYS)
        b_s, _ = block_of_scores(
            b_q, p_k, o_j, k_strides[2], scale, UNIT, N, D, KEYS, D_CHUNKS, PRECISION, DOT_F32
        )
        b_max, b_base, b_shrink = next_maximum(b_max, b_s)
        b_sum = b_sum * b_shrink + tl.sum(tl.exp2(b_s - b_base[:, None]), 1)
    b_log = b_max + tl.log2(b_sum)

    gate = tl.sigmoid(tl.load(gating_param + i_h).to(tl.float32))
    # Not 1 - gate, which loses the digits of a gate that is almost open.
    share = tl.sigmoid(-tl.load(gating_param + i_h).to(tl.float32))
    acc = zero_rows(ROWS, D_CHUNKS)
    for start in range(0, N, KEYS):
        # [ROWS, KEYS]
        o_j = start + tl.arange(0, KEYS)
        b_s, _ = block_of_scores(
            b_q, p_k, o_j, k_strides[2], scale, UNIT, N, D, KEYS, D_CHUNKS, PRECISION, DOT_F32
        )
        b_p = position_weights(p_py, p_px, o_i[:, None], o_j[None, :], N, GW, TILE_Y, TILE_X)
        b_w = share * tl.exp2(b_s - b_log[:, None]) + gate * b_p
        b_kept = kept(seed, i_h * B + i_b, o_i, start, dropout_p, N, ROWS, KEYS)
        b_v = load_rows(p_v, o_j, v_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)
        acc = add_product(acc, tl.where(b_kept, b_w, 0.0), b_v, PRECISION)
    p_out = out + (i_b * out_strides[0] + i_h * out_strides[1]) * UNIT
    store_rows(p_out, scaled(acc, amplify), o_i, out_strides[2], UNIT, N, D, D_CHUNKS)


def dropout_forward(
    q, k, v, py, px, gating_param, seed, out, grid_size, scale, dropout_p, precision, config
):
    """GPSA of q, k, v (B, H, N, d) with the weights that ``seed`` (1,) in int64 drops with
    probability ``dropout_p``, into ``out``.
    """
    B, H, N, D = q.shape
    unit = stride_unit(q, k, v, out)
    dropout_forward_kernel[(B * H, triton.cdiv(N, config.rows))](
        q=q,
        k=k,
        v=v,
        py=py,
        px=px,
        gating_param=gating_param,
        seed=seed,
        out=out,
        q_strides=in_units(q, unit),
        k_strides=in_units(k, unit),
        v_strides=in_units(v, unit),
        out_strides=in_units(out, unit),
        B=B,
        scale=scale,
        dropout_p=dropout_p,
        amplify=amplification(dropout_p),
        UNIT=unit,
        N=N,
        D=D,
        GW=grid_size[1],
        TILE_Y=py.shape[1],
        TILE_X=px.shape[1],
        ROWS=config.rows,
        KEYS=config.keys,
        D_CHUNKS=config.channels,
        PRECISION=precision,
        DOT_F32=INTERPRETED,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
        enable_fp_fusion=True,
    )

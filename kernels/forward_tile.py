# SPDX-License-Identifier: Apache-2.0
"""Attention and GPSA of up to 256 tokens: a row of scores fits in registers, so the maps are mixed
after the softmax and the gate costs no product and no memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    INTERPRETED,
    LOG2_E,
    add_product,
    image_and_head,
    in_units,
    inner_products,
    load_rows,
    store_rows,
    stride_unit,
    zero_rows,
)
from .position_table import pitch


@triton.jit
def _mixed_rows(
    p_q,
    p_v,
    p_table,
    p_out,
    b_k,
    b_v,
    o_i,
    stride_qn,
    stride_vn,
    stride_on,
    scale,
    gate,
    share,
    UNIT: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D_CHUNKS: tl.constexpr,
    RESIDENT: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """The output of the queries ``o_i``."""
    b_q = load_rows(p_q, o_i, stride_qn, UNIT, N, D, D_CHUNKS, DOT_F32)
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    scores = ()
    start = 0
    for t in tl.static_range(len(KEYS)):
        # [ROWS, KEYS[t]]
        b_s = inner_products(b_q, b_k[t], PRECISION) * (scale * LOG2_E)
        if start + KEYS[t] > N:
            b_s = tl.where((start + tl.arange(0, KEYS[t]))[None, :] < N, b_s, float("-inf"))
        b_max = tl.maximum(b_max, tl.max(b_s, 1))
        scores = scores + (b_s,)
        start += KEYS[t]

    b_sum = tl.zeros([ROWS], tl.float32)
    exponentials = ()
    for t in tl.static_range(len(KEYS)):
        b_e = tl.exp2(scores[t] - b_max[:, None])
        b_sum += tl.sum(b_e, 1)
        exponentials = exponentials + (b_e,)

    b_share = (share / b_sum)[:, None]
    acc = zero_rows(ROWS, D_CHUNKS)
    start = 0
    for t in tl.static_range(len(KEYS)):
        # [ROWS, KEYS[t]]
        o_j = start + tl.arange(0, KEYS[t])
        b_w = exponentials[t] * b_share
        if GATED:
            p_p = p_table + o_i[:, None] * PITCH + o_j[None, :]
            b_w += gate * tl.load(p_p, mask=o_i[:, None] < N, other=0.0).to(tl.float32)
        if RESIDENT:
            acc = add_product(acc, b_w, b_v[t], PRECISION)
        else:
            b_x = load_rows(p_v, o_j, stride_vn, UNIT, N, D, D_CHUNKS, DOT_F32)
            acc = add_product(acc, b_w, b_x, PRECISION)
        start += KEYS[t]
    store_rows(p_out, acc, o_i, stride_on, UNIT, N, D, D_CHUNKS)


@triton.jit
def forward_tile_kernel(
    q,
    k,
    v,
    table,
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
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D_CHUNKS: tl.constexpr,
    RESIDENT: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """out = ((1 - g) softmax(scale q kᵀ) + g P) v of one head: all its queries with RESIDENT keys
    and values, else one block of ROWS. Without GATED, plain attention.
    """
    i_b, i_h = image_and_head(B)
    p_q = q + (i_b * q_strides[0] + i_h * q_strides[1]) * UNIT
    p_k = k + (i_b * k_strides[0] + i_h * k_strides[1]) * UNIT
    p_v = v + (i_b * v_strides[0] + i_h * v_strides[1]) * UNIT
    p_out = out + (i_b * out_strides[0] + i_h * out_strides[1]) * UNIT
    p_table = table
    gate = 0.0
    share = 1.0
    if GATED:
        p_table = table + i_h * N * PITCH
        gate = tl.sigmoid(tl.load(gating_param + i_h).to(tl.float32))
        # Not 1 - gate, which loses the digits of a gate that is almost open.
        share = tl.sigmoid(-tl.load(gating_param + i_h).to(tl.float32))

    b_k = ()
    b_v = ()
    start = 0
    for t in tl.static_range(len(KEYS)):
        # [KEYS[t], D]
        o_j = start + tl.arange(0, KEYS[t])
        b_k = b_k + (load_rows(p_k, o_j, k_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32),)
        if RESIDENT:
            b_v = b_v + (load_rows(p_v, o_j, v_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32),)
        start += KEYS[t]

    if RESIDENT:
        for i_r in range(tl.cdiv(N, ROWS)):
            _mixed_rows(
                p_q, p_v, p_table, p_out, b_k, b_v, i_r * ROWS + tl.arange(0, ROWS),
                q_strides[2], v_strides[2], out_strides[2], scale, gate, share,
                UNIT, N, D, PITCH, ROWS, KEYS, D_CHUNKS, RESIDENT, GATED, PRECISION, DOT_F32,
            )  # fmt: skip
    else:
        _mixed_rows(
            p_q, p_v, p_table, p_out, b_k, b_v, tl.program_id(1) * ROWS + tl.arange(0, ROWS),
            q_strides[2], v_strides[2], out_strides[2], scale, gate, share,
            UNIT, N, D, PITCH, ROWS, KEYS, D_CHUNKS, RESIDENT, GATED, PRECISION, DOT_F32,
        )  # fmt: skip


def forward_tile(q, k, v, table, gating_param, out, scale, precision, config):
    """q, k, v (B, H, N, d) into ``out``, by ``config``. ``table`` is None for plain attention."""
    B, H, N, D = q.shape
    grid = (B * H,) if config.resident else (B * H, triton.cdiv(N, config.rows))
    unit = stride_unit(q, k, v, out)
    forward_tile_kernel[grid](
        q=q,
        k=k,
        v=v,
        table=table,
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
        PITCH=pitch(N),
        ROWS=config.rows,
        KEYS=config.keys,
        D_CHUNKS=config.channels,
        RESIDENT=config.resident,
        GATED=table is not None,
        PRECISION=precision,
        DOT_F32=INTERPRETED,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
        enable_fp_fusion=True,
    )

# SPDX-License-Identifier: Apache-2.0
"""The gradients of q, k and v for up to 256 tokens in one kernel: each input is read once, nothing
is saved by the forward, and five products are the fewest that there can be.
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
    scaled,
    store_rows,
    stride_unit,
    zero_rows,
)
from .position_table import pitch


@triton.jit
def backward_tile_kernel(
    grad,
    q,
    k,
    v,
    table,
    gating_param,
    dq,
    dk,
    dv,
    content,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    dq_strides,
    dk_strides,
    dv_strides,
    B,
    scale,
    UNIT: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D_CHUNKS: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """One head: all KEYS stay, with the sums of dk and dv, while the queries pass by in ROWS.

    Tiles of scores are [KEYS, ROWS], and so is ``table``, P[h, j, i]. ``content`` (H, B) gets
    Σ dO · Oc, where Oc is the content term before its gate.
    """
    i_b, i_h = image_and_head(B)
    p_g = grad + (i_b * grad_strides[0] + i_h * grad_strides[1]) * UNIT
    p_q = q + (i_b * q_strides[0] + i_h * q_strides[1]) * UNIT
    p_dq = dq + (i_b * dq_strides[0] + i_h * dq_strides[1]) * UNIT
    gate = 0.0
    share = 1.0
    if GATED:
        gate = tl.sigmoid(tl.load(gating_param + i_h).to(tl.float32))
        share = tl.sigmoid(-tl.load(gating_param + i_h).to(tl.float32))

    o_j = tl.arange(0, KEYS)
    p_k = k + (i_b * k_strides[0] + i_h * k_strides[1]) * UNIT
    p_v = v + (i_b * v_strides[0] + i_h * v_strides[1]) * UNIT
    b_k = load_rows(p_k, o_j, k_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)
    b_v = load_rows(p_v, o_j, v_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)
    b_dk = zero_rows(KEYS, D_CHUNKS)
    b_dv = zero_rows(KEYS, D_CHUNKS)
    b_content = tl.zeros([ROWS], tl.float32)
    for start in range(0, N, ROWS):
        o_i = start + tl.arange(0, ROWS)
        b_q = load_rows(p_q, o_i, q_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)
        b_g = load_rows(p_g, o_i, grad_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)
        # [KEYS, ROWS]
        b_s = inner_products(b_k, b_q, PRECISION) * (scale * LOG2_E)
        if N % KEYS != 0:
            b_s = tl.where(o_j[:, None] < N, b_s, float("-inf"))
        b_e = tl.exp2(b_s - tl.max(b_s, 0)[None, :])
        b_a = b_e * (1.0 / tl.sum(b_e, 0))[None, :]
        if N % ROWS != 0:
            # Queries beyond N are zero, but zero times an infinite key is not a number.
            b_a = tl.where(o_i[None, :] < N, b_a, 0.0)
        b_da = inner_products(b_v, b_g, PRECISION)
        b_mean = tl.sum(b_a * b_da, 0)
        b_content += b_mean
        b_a *= share
        b_w = b_a
        if GATED:
            p_p = table + i_h * N * PITCH + o_j[:, None] * PITCH + o_i[None, :]
            b_w += gate * tl.load(p_p, mask=o_j[:, None] < N, other=0.0).to(tl.float32)
        b_dv = add_product(b_dv, b_w, b_g, PRECISION)
        b_ds = (b_a * (b_da - b_mean[None, :])).to(b_q[0].dtype)
        b_dk = add_product(b_dk, b_ds, b_q, PRECISION)
        b_dq = add_product(zero_rows(ROWS, D_CHUNKS), tl.trans(b_ds), b_k, PRECISION)
        store_rows(p_dq, scaled(b_dq, scale), o_i, dq_strides[2], UNIT, N, D, D_CHUNKS)

    p_dk = dk + (i_b * dk_strides[0] + i_h * dk_strides[1]) * UNIT
    p_dv = dv + (i_b * dv_strides[0] + i_h * dv_strides[1]) * UNIT
    store_rows(p_dk, scaled(b_dk, scale), o_j, dk_strides[2], UNIT, N, D, D_CHUNKS)
    store_rows(p_dv, b_dv, o_j, dv_strides[2], UNIT, N, D, D_CHUNKS)
    if GATED:
        tl.store(content + i_h * B + i_b, tl.sum(b_content))


def backward_tile(
    grad, q, k, v, table, gating_param, dq, dk, dv, content, scale, precision, config
):
    """Gradients of q, k and v (B, H, N, d) into dq, dk and dv; GPSA's with the transposed table,
    the gates and ``content`` (H, B) in float32, else None for all three.
    """
    B, H, N, D = q.shape
    unit = stride_unit(grad, q, k, v, dq, dk, dv)
    backward_tile_kernel[(B * H,)](
        grad=grad,
        q=q,
        k=k,
        v=v,
        table=table,
        gating_param=gating_param,
        dq=dq,
        dk=dk,
        dv=dv,
        content=content,
        grad_strides=in_units(grad, unit),
        q_strides=in_units(q, unit),
        k_strides=in_units(k, unit),
        v_strides=in_units(v, unit),
        dq_strides=in_units(dq, unit),
        dk_strides=in_units(dk, unit),
        dv_strides=in_units(dv, unit),
        B=B,
        scale=scale,
        UNIT=unit,
        N=N,
        D=D,
        PITCH=pitch(N),
        ROWS=config.rows,
        KEYS=config.keys,
        D_CHUNKS=config.channels,
        GATED=table is not None,
        PRECISION=precision,
        DOT_F32=INTERPRETED,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
        enable_fp_fusion=True,
    )

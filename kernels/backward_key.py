# SPDX-License-Identifier: Apache-2.0
"""The gradients of k and v for any number of tokens."""

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


@triton.jit
def backward_key_kernel(
    grad,
    q,
    k,
    v,
    gating_param,
    statistics,
    dk,
    dv,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    dk_strides,
    dv_strides,
    B,
    H,
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
    """One block of KEYS keys, by which the queries pass in ROWS. GATED, the gradients of the
    content term times its gate, and dv is added to.
    """
    i_b, i_h = image_and_head(B)
    p_g = grad + (i_b * grad_strides[0] + i_h * grad_strides[1]) * UNIT
    p_q = q + (i_b * q_strides[0] + i_h * q_strides[1]) * UNIT
    p_log = statistics + (i_b * H + i_h) * N
    p_mean = p_log + tl.cast(B, tl.int64) * H * N
    o_j = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    p_k = k + (i_b * k_strides[0] + i_h * k_strides[1]) * UNIT
    p_v = v + (i_b * v_strides[0] + i_h * v_strides[1]) * UNIT
    b_k = load_rows(p_k, o_j, k_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)
    b_v = load_rows(p_v, o_j, v_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)
    b_dk = zero_rows(KEYS, D_CHUNKS)
    b_dv = zero_rows(KEYS, D_CHUNKS)
    for start in range(0, N, ROWS):
        o_i = start + tl.arange(0, ROWS)
        b_q = load_rows(p_q, o_i, q_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)
        b_g = load_rows(p_g, o_i, grad_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)
        b_log = tl.load(p_log + o_i, mask=o_i < N, other=float("inf"))
        b_mean = tl.load(p_mean + o_i, mask=o_i < N, other=0.0)
        # [KEYS, ROWS]
        b_s = inner_products(b_k, b_q, PRECISION) * (scale * LOG2_E)
        b_a = tl.exp2(b_s - b_log[None, :])
        if N % ROWS != 0:
            # Queries beyond N are zero, but zero times an infinite key is not a number.
            b_a = tl.where(o_i[None, :] < N, b_a, 0.0)
        b_dv = add_product(b_dv, b_a, b_g, PRECISION)
        b_da = inner_products(b_v, b_g, PRECISION)
        b_dk = add_product(b_dk, b_a * (b_da - b_mean[None, :]), b_q, PRECISION)

    p_dk = dk + (i_b * dk_strides[0] + i_h * dk_strides[1]) * UNIT
    p_dv = dv + (i_b * dv_strides[0] + i_h * dv_strides[1]) * UNIT
    share = 1.0
    if GATED:
        share = tl.sigmoid(-tl.load(gating_param + i_h).to(tl.float32))
        position = load_rows(p_dv, o_j, dv_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)
        mixed = ()
        for c in tl.static_range(len(D_CHUNKS)):
            mixed = mixed + (b_dv[c] * share + position[c].to(tl.float32),)
        store_rows(p_dv, mixed, o_j, dv_strides[2], UNIT, N, D, D_CHUNKS)
    else:
        store_rows(p_dv, b_dv, o_j, dv_strides[2], UNIT, N, D, D_CHUNKS)
    store_rows(p_dk, scaled(b_dk, scale * share), o_j, dk_strides[2], UNIT, N, D, D_CHUNKS)


def backward_key(grad, q, k, v, gating_param, statistics, dk, dv, scale, precision, config):
    """Gradients of k and v (B, H, N, d) into dk and dv, from the statistics that
    :func:`backward_query` left. With a gate, dv holds the gradient of the gated position term.
    """
    B, H, N, D = q.shape
    unit = stride_unit(grad, q, k, v, dk, dv)
    backward_key_kernel[(B * H, triton.cdiv(N, config.keys))](
        grad=grad,
        q=q,
        k=k,
        v=v,
        gating_param=gating_param,
        statistics=statistics,
        dk=dk,
        dv=dv,
        grad_strides=in_units(grad, unit),
        q_strides=in_units(q, unit),
        k_strides=in_units(k, unit),
        v_strides=in_units(v, unit),
        dk_strides=in_units(dk, unit),
        dv_strides=in_units(dv, unit),
        B=B,
        H=H,
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

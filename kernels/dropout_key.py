# SPDX-License-Identifier: Apache-2.0
"""The gradients of k and v under attention dropout; symbols as in ``dropout_query``."""

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
from .dropout import amplification, kept_transposed, position_weights


@triton.jit
def dropout_key_kernel(
    grad,
    q,
    k,
    v,
    py,
    px,
    gating_param,
    seed,
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
    """One block of KEYS keys, by which the queries pass in ROWS: dk = scale dSᵀ q and
    dv = c (m ∘ M)ᵀ dO, where M is the mixed map.
    """
    i_b, i_h = image_and_head(B)
    p_g = grad + (i_b * grad_strides[0] + i_h * grad_strides[1]) * UNIT
    p_q = q + (i_b * q_strides[0] + i_h * q_strides[1]) * UNIT
    p_log = statistics + (i_b * H + i_h) * N
    p_dc = p_log + tl.cast(B, tl.int64) * H * N
    p_py = py + i_h * TILE_Y * TILE_Y
    p_px = px + i_h * TILE_X * TILE_X
    gate = tl.sigmoid(tl.load(gating_param + i_h).to(tl.float32))
    share = tl.sigmoid(-tl.load(gating_param + i_h).to(tl.float32))
    i_first = tl.program_id(1) * KEYS
    o_j = i_first + tl.arange(0, KEYS)
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
        b_dc = tl.load(p_dc + o_i, mask=o_i < N, other=0.0)
        # [KEYS, ROWS]
        b_s = inner_products(b_k, b_q, PRECISION) * (scale * LOG2_E)
        b_a = share * tl.exp2(b_s - b_log[None, :])
        if N % ROWS != 0:
            # Queries beyond N are zero, but zero times an infinite key is not a number.
            b_a = tl.where(o_i[None, :] < N, b_a, 0.0)
        b_p = position_weights(p_py, p_px, o_i[None, :], o_j[:, None], N, GW, TILE_Y, TILE_X)
        b_kept = kept_transposed(seed, i_h * B + i_b, o_i, i_first, dropout_p, N, ROWS, KEYS)
        b_dv = add_product(b_dv, tl.where(b_kept, b_a + gate * b_p, 0.0), b_g, PRECISION)
        b_dm = tl.where(b_kept, inner_products(b_v, b_g, PRECISION) * amplify, 0.0)
        b_dk = add_product(b_dk, b_a * (b_dm - b_dc[None, :]), b_q, PRECISION)

    p_dk = dk + (i_b * dk_strides[0] + i_h * dk_strides[1]) * UNIT
    p_dv = dv + (i_b * dv_strides[0] + i_h * dv_strides[1]) * UNIT
    store_rows(p_dk, scaled(b_dk, scale), o_j, dk_strides[2], UNIT, N, D, D_CHUNKS)
    store_rows(p_dv, scaled(b_dv, amplify), o_j, dv_strides[2], UNIT, N, D, D_CHUNKS)


def dropout_key(
    grad, q, k, v, py, px, gating_param, seed, statistics, dk, dv, grid_size, scale, dropout_p,
    precision, config,
):  # fmt: skip
    """Gradients of k and v (B, H, N, d) into dk and dv, from the statistics that
    :func:`dropout_query` left.
    """
    B, H, N, D = q.shape
    unit = stride_unit(grad, q, k, v, dk, dv)
    dropout_key_kernel[(B * H, triton.cdiv(N, config.keys))](
        grad=grad,
        q=q,
        k=k,
        v=v,
        py=py,
        px=px,
        gating_param=gating_param,
        seed=seed,
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

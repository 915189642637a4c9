# SPDX-License-Identifier: Apache-2.0
"""The gradient of q under attention dropout, what the position and gating parameters' gradients are
summed from, and the statistics of each row of scores that the gradients of k and v need.

With c the amplification, m the mask and dM = c m ∘ (dO vᵀ) the gradient of the mixed map,

    dS = (1 - g) A ∘ (dM - Dc),  Dc = Σ_j A dM,    R = P ∘ (dM - Dp),  Dp = Σ_j P dM,

where A is the content map, dq = scale dS k, and g Σ R dx, g Σ R dy and g Σ R (dx² + dy²) are the
gradients of the position weights.
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
    inner_products,
    load_rows,
    next_maximum,
    scaled,
    store_rows,
    stride_unit,
    zero_rows,
)
from .dropout import amplification, kept, position_weights


@triton.jit
def dropout_query_kernel(
    grad,
    q,
    k,
    v,
    py,
    px,
    gating_param,
    seed,
    dq,
    statistics,
    parts,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    dq_strides,
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
    """One block of ROWS queries. The keys pass by twice: for the logarithm of the softmax's sum,
    Dc, both into statistics (2, B, H, N), and Dp; then for dq and the sums of R.
    """
    i_b, i_h = image_and_head(B)
    i_bh = i_h * B + i_b
    p_k = k + (i_b * k_strides[0] + i_h * k_strides[1]) * UNIT
    p_v = v + (i_b * v_strides[0] + i_h * v_strides[1]) * UNIT
    p_py = py + i_h * TILE_Y * TILE_Y
    p_px = px + i_h * TILE_X * TILE_X
    o_i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    p_q = q + (i_b * q_strides[0] + i_h * q_strides[1]) * UNIT
    p_g = grad + (i_b * grad_strides[0] + i_h * grad_strides[1]) * UNIT
    b_q = load_rows(p_q, o_i, q_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)
    b_g = load_rows(p_g, o_i, grad_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)

    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_dc = tl.zeros([ROWS], tl.float32)
    b_dp = tl.zeros([ROWS], tl.float32)
    for start in range(0, N, KEYS):
        # [ROWS, KEYS]
        o_j = start + tl.arange(0, KEYS)
        b_s, _ = block_of_scores(
            b_q, p_k, o_j, k_strides[2], scale, UNIT, N, D, KEYS, D_CHUNKS, PRECISION, DOT_F32
        )
        b_v = load_rows(p_v, o_j, v_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)
        b_kept = kept(seed, i_bh, o_i, start, dropout_p, N, ROWS, KEYS)
        b_dm = tl.where(b_kept, inner_products(b_g, b_v, PRECISION) * amplify, 0.0)
        b_max, b_base, b_shrink = next_maximum(b_max, b_s)
        b_e = tl.exp2(b_s - b_base[:, None])
        b_sum = b_sum * b_shrink + tl.sum(b_e, 1)
        b_dc = b_dc * b_shrink + tl.sum(b_e * b_dm, 1)
        b_p = position_weights(p_py, p_px, o_i[:, None], o_j[None, :], N, GW, TILE_Y, TILE_X)
        b_dp += tl.sum(b_p * b_dm, 1)
    # Queries beyond N are zero, but zero times an infinite key is not a number.
    b_dc = tl.where(o_i < N, b_dc / b_sum, 0.0)
    b_log = b_max + tl.log2(b_sum)

    b_rx = tl.zeros([ROWS], tl.float32)
    b_ry = tl.zeros([ROWS], tl.float32)
    b_rr = tl.zeros([ROWS], tl.float32)
    acc = zero_rows(ROWS, D_CHUNKS)
    for start in range(0, N, KEYS):
        # [ROWS, KEYS]
        o_j = start + tl.arange(0, KEYS)
        b_s, b_k = block_of_scores(
            b_q, p_k, o_j, k_strides[2], scale, UNIT, N, D, KEYS, D_CHUNKS, PRECISION, DOT_F32
        )
        b_v = load_rows(p_v, o_j, v_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)
        b_kept = kept(seed, i_bh, o_i, start, dropout_p, N, ROWS, KEYS)
        b_dm = tl.where(b_kept, inner_products(b_g, b_v, PRECISION) * amplify, 0.0)
        b_ds = tl.exp2(b_s - b_log[:, None]) * (b_dm - b_dc[:, None])
        acc = add_product(acc, b_ds, b_k, PRECISION)
        b_p = position_weights(p_py, p_px, o_i[:, None], o_j[None, :], N, GW, TILE_Y, TILE_X)
        b_r = b_p * (b_dm - b_dp[:, None])
        b_dx = (o_j[None, :] % GW - o_i[:, None] % GW).to(tl.float32)
        b_dy = (o_j[None, :] // GW - o_i[:, None] // GW).to(tl.float32)
        b_rx += tl.sum(b_r * b_dx, 1)
        b_ry += tl.sum(b_r * b_dy, 1)
        b_rr += tl.sum(b_r * (b_dx * b_dx + b_dy * b_dy), 1)

    share = tl.sigmoid(-tl.load(gating_param + i_h).to(tl.float32))
    p_dq = dq + (i_b * dq_strides[0] + i_h * dq_strides[1]) * UNIT
    store_rows(p_dq, scaled(acc, scale * share), o_i, dq_strides[2], UNIT, N, D, D_CHUNKS)
    p_log = statistics + (i_b * H + i_h) * N + o_i
    tl.store(p_log, b_log, mask=o_i < N)
    tl.store(p_log + tl.cast(B, tl.int64) * H * N, b_dc, mask=o_i < N)
    # parts (H, B, blocks of rows, 4)
    p_part = parts + (i_bh * tl.num_programs(1) + tl.program_id(1)) * 4
    tl.store(p_part, tl.sum(b_rx))
    tl.store(p_part + 1, tl.sum(b_ry))
    tl.store(p_part + 2, tl.sum(b_rr))
    tl.store(p_part + 3, tl.sum(b_dp - b_dc))


def dropout_query(
    grad, q, k, v, py, px, gating_param, seed, dq, statistics, parts, grid_size, scale, dropout_p,
    precision, config,
):  # fmt: skip
    """The gradient of q (B, H, N, d) into dq, statistics (2, B, H, N) in float32, and into
    ``parts`` (H, B, blocks of rows, 4) in float32 what is to be summed: Σ R dx, Σ R dy,
    Σ R (dx² + dy²) and Σ (Dp - Dc).
    """
    B, H, N, D = q.shape
    unit = stride_unit(grad, q, k, v, dq)
    dropout_query_kernel[(B * H, triton.cdiv(N, config.rows))](
        grad=grad,
        q=q,
        k=k,
        v=v,
        py=py,
        px=px,
        gating_param=gating_param,
        seed=seed,
        dq=dq,
        statistics=statistics,
        parts=parts,
        grad_strides=in_units(grad, unit),
        q_strides=in_units(q, unit),
        k_strides=in_units(k, unit),
        v_strides=in_units(v, unit),
        dq_strides=in_units(dq, unit),
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

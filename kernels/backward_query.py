# SPDX-License-Identifier: Apache-2.0
"""The gradient of q for any number of tokens, and the statistics of each row of scores that the
gradients of k and v need.
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


@triton.jit
def backward_query_kernel(
    grad,
    q,
    k,
    v,
    gating_param,
    dq,
    statistics,
    content,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    dq_strides,
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
    """One block of ROWS queries. The keys pass by twice: for the logarithm of the softmax's sum
    and the mean of dO · v under it, which go into statistics (2, B, H, N); then for dq.
    """
    i_b, i_h = image_and_head(B)
    p_k = k + (i_b * k_strides[0] + i_h * k_strides[1]) * UNIT
    p_v = v + (i_b * v_strides[0] + i_h * v_strides[1]) * UNIT
    o_i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    p_q = q + (i_b * q_strides[0] + i_h * q_strides[1]) * UNIT
    p_g = grad + (i_b * grad_strides[0] + i_h * grad_strides[1]) * UNIT
    b_q = load_rows(p_q, o_i, q_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)
    b_g = load_rows(p_g, o_i, grad_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)

    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_mean = tl.zeros([ROWS], tl.float32)
    for start in range(0, N, KEYS):
        # [ROWS, KEYS]
        o_j = start + tl.arange(0, KEYS)
        b_s, _ = block_of_scores(
            b_q, p_k, o_j, k_strides[2], scale, UNIT, N, D, KEYS, D_CHUNKS, PRECISION, DOT_F32
        )
        b_v = load_rows(p_v, o_j, v_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)
        b_da = inner_products(b_g, b_v, PRECISION)
        b_max, b_base, b_shrink = next_maximum(b_max, b_s)
        b_e = tl.exp2(b_s - b_base[:, None])
        b_sum = b_sum * b_shrink + tl.sum(b_e, 1)
        b_mean = b_mean * b_shrink + tl.sum(b_e * b_da, 1)
    # Queries beyond N are zero, but zero times an infinite key is not a number.
    b_mean = tl.where(o_i < N, b_mean / b_sum, 0.0)
    b_log = b_max + tl.log2(b_sum)

    acc = zero_rows(ROWS, D_CHUNKS)
    for start in range(0, N, KEYS):
        # [ROWS, KEYS]
        o_j = start + tl.arange(0, KEYS)
        b_s, b_k = block_of_scores(
            b_q, p_k, o_j, k_strides[2], scale, UNIT, N, D, KEYS, D_CHUNKS, PRECISION, DOT_F32
        )
        b_v = load_rows(p_v, o_j, v_strides[2], UNIT, N, D, D_CHUNKS, DOT_F32)
        b_da = inner_products(b_g, b_v, PRECISION)
        b_ds = tl.exp2(b_s - b_log[:, None]) * (b_da - b_mean[:, None])
        acc = add_product(acc, b_ds, b_k, PRECISION)

    share = 1.0
    if GATED:
        share = tl.sigmoid(-tl.load(gating_param + i_h).to(tl.float32))
        i_part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(content + i_part, tl.sum(b_mean))
    p_dq = dq + (i_b * dq_strides[0] + i_h * dq_strides[1]) * UNIT
    store_rows(p_dq, scaled(acc, scale * share), o_i, dq_strides[2], UNIT, N, D, D_CHUNKS)
    p_log = statistics + (i_b * H + i_h) * N + o_i
    tl.store(p_log, b_log, mask=o_i < N)
    tl.store(p_log + tl.cast(B, tl.int64) * H * N, b_mean, mask=o_i < N)


def backward_query(grad, q, k, v, gating_param, dq, statistics, content, scale, precision, config):
    """The gradient of q (B, H, N, d) into dq, and statistics (2, B, H, N) in float32. For GPSA's
    content term ``content`` (H, B * blocks of rows) gets Σ dO · Oc in parts, before its gate;
    else both it and ``gating_param`` are None.
    """
    B, H, N, D = q.shape
    unit = stride_unit(grad, q, k, v, dq)
    backward_query_kernel[(B * H, triton.cdiv(N, config.rows))](
        grad=grad,
        q=q,
        k=k,
        v=v,
        gating_param=gating_param,
        dq=dq,
        statistics=statistics,
        content=content,
        grad_strides=in_units(grad, unit),
        q_strides=in_units(q, unit),
        k_strides=in_units(k, unit),
        v_strides=in_units(v, unit),
        dq_strides=in_units(dq, unit),
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

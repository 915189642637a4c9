# SPDX-License-Identifier: Apache-2.0
"""The position map of every head, for up to 256 tokens, made once a call for all images."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import LOG2_E

ROWS = 16


def pitch(tokens: int) -> int:
    """Columns of a table of that many tokens. Those beyond the tokens hold zeros, so that tiles
    can be read without a mask along a row.
    """
    return triton.cdiv(tokens, 64) * 64


@triton.jit
def position_table_kernel(
    pos_weight,
    table,
    pos_weight_strides,
    GH: tl.constexpr,
    GW: tl.constexpr,
    PITCH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """P[h, i, j] = softmax_j(a dx + b dy + c (dx² + dy²)) into table (H, N, PITCH), or into it as
    P[h, j, i].
    """
    N: tl.constexpr = GH * GW
    i_h = tl.program_id(0).to(tl.int64)
    p_weight = pos_weight + i_h * pos_weight_strides[0]
    a = tl.load(p_weight).to(tl.float32) * LOG2_E
    b = tl.load(p_weight + pos_weight_strides[1]).to(tl.float32) * LOG2_E
    c = tl.load(p_weight + 2 * pos_weight_strides[1]).to(tl.float32) * LOG2_E

    # [ROWS, 1] queries and [1, COLUMNS] keys
    o_i = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    o_j = tl.arange(0, COLUMNS)[None, :]
    dx = (o_j % GW - o_i % GW).to(tl.float32)
    dy = (o_j // GW - o_i // GW).to(tl.float32)
    b_s = tl.where(o_j < N, a * dx + b * dy + c * (dx * dx + dy * dy), float("-inf"))
    b_e = tl.exp2(b_s - tl.max(b_s, 1)[:, None])
    b_p = tl.where(o_i < N, b_e / tl.sum(b_e, 1)[:, None], 0.0)

    p_table = table + i_h * N * PITCH
    if TRANSPOSED:
        p_p = p_table + o_j * PITCH + o_i
        m_p = (o_j < N) & (o_i < PITCH)
    else:
        p_p = p_table + o_i * PITCH + o_j
        m_p = (o_i < N) & (o_j < PITCH)
    tl.store(p_p, b_p.to(table.dtype.element_ty), mask=m_p)


def position_table(pos_weight, dtype, grid_size, *, transposed=False):
    """The table (H, N, pitch(N)) of ``pos_weight`` (H, 3); transposed, its rows are the keys."""
    heads, tokens = pos_weight.shape[0], grid_size[0] * grid_size[1]
    table = pos_weight.new_empty(heads, tokens, pitch(tokens), dtype=dtype)
    grid = (heads, triton.cdiv(pitch(tokens) if transposed else tokens, ROWS))
    position_table_kernel[grid](
        pos_weight=pos_weight,
        table=table,
        pos_weight_strides=pos_weight.stride(),
        GH=grid_size[0],
        GW=grid_size[1],
        PITCH=pitch(tokens),
        COLUMNS=triton.next_power_of_2(pitch(tokens)),
        ROWS=ROWS,
        TRANSPOSED=transposed,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return table

# SPDX-License-Identifier: Apache-2.0
"""Attention dropout of GPSA: which weights of the mixed map stay, from counters instead of a map.

Philox4x32 (Salmon et al. 2011) is asked under the seed of the call with a counter of key, query,
head and image, so forward and backward, in tiles of any size, find the same. A mask breaks the
Kronecker form of the position term, so P is formed here beside the scores.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: The fewest rounds that pass all of BigCrush (Salmon et al., table 2).
ROUNDS = tl.constexpr(7)


def amplification(dropout_p):
    """What the weights that stay are multiplied by; none stays where all are dropped."""
    return 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)


@triton.jit
def _is_kept(word, dropout_p):
    # As many bits as float32 holds exactly.
    return (word >> 8).to(tl.float32) * (2.0**-24) >= dropout_p


@triton.jit
def _four_at_a_time(p_seed, o_fours, o_i, i_bh, dropout_p):
    """Of every four keys ``o_fours`` and query ``o_i``, shapes that broadcast, whether the weights
    stay: two more axes of 2.
    """
    b_0, b_1, b_2, b_3 = tl.philox(
        tl.load(p_seed), o_fours, o_i, i_bh.to(tl.int32), tl.zeros_like(o_i), ROUNDS
    )
    b_even = tl.join(_is_kept(b_0, dropout_p), _is_kept(b_2, dropout_p))
    b_odd = tl.join(_is_kept(b_1, dropout_p), _is_kept(b_3, dropout_p))
    return tl.join(b_even, b_odd)


@triton.jit
def kept(
    p_seed, i_bh, o_i, start, dropout_p, N: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):
    """Which weights of the ROWS queries ``o_i`` and of KEYS keys from ``start`` stay, none of them
    beyond N: [ROWS, KEYS].
    """
    o_fours = start // 4 + tl.arange(0, KEYS // 4)
    b_kept = _four_at_a_time(p_seed, o_fours[None, :], o_i[:, None], i_bh, dropout_p)
    o_j = start + tl.arange(0, KEYS)
    return tl.reshape(b_kept, (ROWS, KEYS)) & (o_i[:, None] < N) & (o_j[None, :] < N)


@triton.jit
def kept_transposed(
    p_seed, i_bh, o_i, start, dropout_p, N: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):
    """:func:`kept` as [KEYS, ROWS]."""
    o_fours = start // 4 + tl.arange(0, KEYS // 4)
    b_kept = _four_at_a_time(p_seed, o_fours[:, None], o_i[None, :], i_bh, dropout_p)
    b_kept = tl.reshape(tl.permute(b_kept, (0, 2, 3, 1)), (KEYS, ROWS))
    o_j = start + tl.arange(0, KEYS)
    return b_kept & (o_i[None, :] < N) & (o_j[:, None] < N)


@triton.jit
def position_weights(
    p_py,
    p_px,
    o_i,
    o_j,
    N: tl.constexpr,
    GW: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    """P of the queries ``o_i`` and the keys ``o_j``, shapes that broadcast; zero beyond N."""
    m_ij = (o_i < N) & (o_j < N)
    b_py = tl.load(p_py + (o_i // GW) * TILE_Y + o_j // GW, mask=m_ij, other=0.0)
    b_px = tl.load(p_px + (o_i % GW) * TILE_X + o_j % GW, mask=m_ij, other=0.0)
    return b_py * b_px

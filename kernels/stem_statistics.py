# SPDX-License-Identifier: Apache-2.0
"""Means and variances of a layer of the stem from those of its tiles, and the batch norm with them
as a scale and a shift.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .stem_blocks import affine, scale_and_shift

#: Tiles and channels that a program takes at a time.
ROWS, COLUMNS = 32, 16
#: Tiles, or groups of them, that one program goes through.
GROUP = 512


@triton.jit(do_not_specialize=["parts", "size", "total"])
def stem_statistics_kernel(
    partials,
    groups,
    gamma,
    beta,
    eps,
    mean,
    variance,
    out,
    parts,
    size,
    total,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Means and sums of squared deviations ``partials`` (2, parts, C), of ``size`` values each and
    of ``total`` together, to those of every GROUP of parts in ``groups``; or, if that is None, to
    the mean and biased variance of all, and the scale and shift of the batch norm in ``out``.

    Chan, Golub and LeVeque 1983: M2 = Σ (M2_i + n_i (mean_i - mean)²).
    """
    i_group = tl.program_id(1)
    o_c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = i_group * GROUP
    last = tl.minimum(first + GROUP, parts)
    count = 0.0
    b_mean = tl.zeros([COLUMNS], tl.float32)
    b_square = tl.zeros([COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        # [ROWS, COLUMNS]
        o_i = start + tl.arange(0, ROWS)
        m_i = (o_i < last)[:, None] & (o_c < C)[None, :]
        p_i = partials + o_i[:, None].to(tl.int64) * C + o_c[None, :]
        b_m = tl.load(p_i, mask=m_i, other=0.0)
        b_s = tl.load(p_i + parts.to(tl.int64) * C, mask=m_i, other=0.0)
        b_n = tl.minimum(total - o_i.to(tl.int64) * size, size)
        b_n = tl.where(o_i < last, b_n, 0).to(tl.float32)
        n = tl.sum(b_n, 0)
        b_new = tl.sum(b_m * b_n[:, None], 0) / n
        b_d = b_m - b_new[None, :]
        b_delta = b_new - b_mean
        share = n / (count + n)
        b_square += tl.sum(b_s + b_d * b_d * b_n[:, None], 0) + b_delta * b_delta * (count * share)
        b_mean += b_delta * share
        count += n
    m_c = o_c < C
    if groups is not None:
        p_group = groups + i_group * C + o_c
        tl.store(p_group, b_mean, mask=m_c)
        tl.store(p_group + tl.num_programs(1) * C, b_square, mask=m_c)
    else:
        b_variance = b_square / count
        tl.store(mean + o_c, b_mean, mask=m_c)
        tl.store(variance + o_c, b_variance, mask=m_c)
        b_scale, b_shift = scale_and_shift(gamma, beta, b_mean, b_variance, o_c, eps, C)
        tl.store(out + o_c, b_scale, mask=m_c)
        tl.store(out + C + o_c, b_shift, mask=m_c)


def stem_statistics(partials, size, total, gamma, beta, eps, mean, variance):
    """``mean`` and biased ``variance`` (C,) of ``total`` values from ``partials`` (2, parts, C) of
    ``size`` values each, and the scale and shift (2, C) of a batch norm with them.
    """
    _, parts, C = partials.shape
    out = partials.new_empty(2, C)
    while parts > 0:
        groups, count = None, triton.cdiv(parts, GROUP)
        if count > 1:
            groups = partials.new_empty(2, count, C)
        stem_statistics_kernel[(triton.cdiv(C, COLUMNS), count)](
            partials=partials,
            groups=groups,
            gamma=gamma,
            beta=beta,
            eps=eps,
            mean=mean,
            variance=variance,
            out=out,
            parts=parts,
            size=size,
            total=total,
            C=C,
            GROUP=GROUP,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=4,
            enable_fp_fusion=True,
        )
        partials, parts, size = groups, count if count > 1 else 0, size * GROUP
    return out


@triton.jit
def stem_affine_kernel(
    gamma, beta, mean, variance, eps, out, C: tl.constexpr, COLUMNS: tl.constexpr
):
    """The batch norm with statistics that are given as scale and shift (2, C)."""
    o_c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    b_scale, b_shift = affine(gamma, beta, mean, variance, o_c, eps, C)
    tl.store(out + o_c, b_scale, mask=o_c < C)
    tl.store(out + C + o_c, b_shift, mask=o_c < C)


def stem_affine(gamma, beta, mean, variance, eps):
    """Scale and shift (2, C) of a batch norm, in the dtype of ``mean``, which is float32."""
    C = mean.shape[0]
    out = mean.new_empty(2, C)
    stem_affine_kernel[(triton.cdiv(C, 128),)](
        gamma=gamma,
        beta=beta,
        mean=mean,
        variance=variance,
        eps=eps,
        out=out,
        C=C,
        COLUMNS=128,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out

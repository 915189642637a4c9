# SPDX-License-Identifier: Apache-2.0
"""Sums over the parts that the gradients of the stem leave, in the order of the parts."""

from __future__ import annotations

import triton
import triton.language as tl

#: Parts that are read at once, and channels.
PARTS = 32
COLUMNS = 64


@triton.jit
def _column_sums(p_x, step, COUNT, o_c, m_c, PARTS: tl.constexpr):
    """Sums of COUNT rows, ``step`` numbers from one to the next: [columns]."""
    b_sum = tl.zeros([PARTS, o_c.shape[0]], tl.float32)
    for start in range(0, COUNT, PARTS):
        o_s = start + tl.arange(0, PARTS)
        p_s = p_x + o_s[:, None].to(tl.int64) * step + o_c[None, :]
        b_sum += tl.load(p_s, mask=(o_s < COUNT)[:, None] & m_c[None, :], other=0.0)
    return tl.sum(b_sum, 0)


@triton.jit(do_not_specialize=["COUNT"])
def stem_weight_sum_kernel(
    partials,
    dweight,
    shifts,
    scales,
    COUNT,
    HEIGHT: tl.constexpr,
    OUT: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Row ``program_id(0)`` of partials (COUNT, rows, OUT), summed, into a column of dweight
    (OUT, HEIGHT). For uint8 images there are 9 more rows than HEIGHT = 9 C, as
    ``stem_image_gradient`` says.
    """
    i_r = tl.program_id(0)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < OUT
    ROWS: tl.constexpr = HEIGHT if shifts is None else HEIGHT + 9
    b_sum = _column_sums(partials + i_r * OUT, ROWS * OUT, COUNT, o_c, m_c, PARTS)
    if shifts is not None:
        p_inside = partials + (HEIGHT + i_r % 9) * OUT
        b_inside = _column_sums(p_inside, ROWS * OUT, COUNT, o_c, m_c, PARTS)
        shift = 0.0
        scale = 1.0
        for c in tl.static_range(C):
            shift = tl.where(i_r // 9 == c, shifts[c], shift)
            scale = tl.where(i_r // 9 == c, scales[c], scale)
        b_sum = (b_sum + b_inside * shift) / scale
    p_w = dweight + o_c.to(tl.int64) * HEIGHT + i_r
    tl.store(p_w, b_sum.to(dweight.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["COUNT"])
def stem_norm_gradient_kernel(
    partials,
    gamma,
    mean,
    variance,
    dgamma,
    dbeta,
    coefficients,
    eps,
    count,
    COUNT,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradients of a batch norm's weight and bias from partials (2, COUNT, C), which have the sums
    of dz and of dz (raw - mean), and the coefficients of :mod:`.stem_gradient_blocks`.
    """
    o_c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < C
    b_dbeta = _column_sums(partials, C, COUNT, o_c, m_c, PARTS)
    p_product = partials + tl.cast(COUNT, tl.int64) * C
    b_product = _column_sums(p_product, C, COUNT, o_c, m_c, PARTS)
    b_mean = tl.load(mean + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_variance = tl.load(variance + o_c, mask=m_c, other=1.0).to(tl.float32)
    b_gamma = tl.load(gamma + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_rstd = 1.0 / tl.sqrt(b_variance + eps)
    b_dgamma = b_product * b_rstd
    tl.store(dgamma + o_c, b_dgamma.to(dgamma.dtype.element_ty), mask=m_c)
    tl.store(dbeta + o_c, b_dbeta.to(dbeta.dtype.element_ty), mask=m_c)
    b_k1 = b_gamma * b_rstd
    p_k = coefficients + o_c
    tl.store(p_k, b_k1, mask=m_c)
    tl.store(p_k + C, -b_k1 * b_rstd * b_dgamma / count, mask=m_c)
    tl.store(p_k + 2 * C, -b_k1 * b_dbeta / count, mask=m_c)
    tl.store(p_k + 3 * C, b_mean, mask=m_c)


def stem_weight_sum(partials, dweight, shifts, scales):
    """partials (parts, C * taps, OUT), summed over the parts, into dweight (OUT, C, ...).

    For uint8 images partials are (parts, C * 9 + 9, OUT), and ``shifts`` and ``scales`` the numbers
    of each channel that :mod:`fastvit.ops.uint8_fold` has; else None.
    """
    parts, rows, OUT = partials.shape
    height = rows if shifts is None else rows - 9
    stem_weight_sum_kernel[(height, triton.cdiv(OUT, COLUMNS))](
        partials=partials,
        dweight=dweight,
        shifts=shifts,
        scales=scales,
        COUNT=parts,
        HEIGHT=height,
        OUT=OUT,
        C=dweight.shape[1],
        PARTS=PARTS,
        COLUMNS=COLUMNS,
        num_warps=4,
        enable_fp_fusion=True,
    )


def stem_norm_gradient(partials, norm, eps, count, dgamma, dbeta):
    """Gradients of a batch norm's weight and bias into dgamma and dbeta (C,), and the coefficients
    (4, C) of the gradient of what it read, ``count`` values a channel.

    ``partials`` (2, parts, C) come from :func:`stem_input_gradient`; ``norm`` has the weight, the
    bias, the mean and the variance.
    """
    _, parts, C = partials.shape
    gamma, _, mean, variance = norm
    coefficients = partials.new_empty(4, C)
    stem_norm_gradient_kernel[(triton.cdiv(C, COLUMNS),)](
        partials=partials,
        gamma=gamma,
        mean=mean,
        variance=variance,
        dgamma=dgamma,
        dbeta=dbeta,
        coefficients=coefficients,
        eps=eps,
        count=float(count),
        COUNT=parts,
        C=C,
        PARTS=PARTS,
        COLUMNS=COLUMNS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return coefficients

# SPDX-License-Identifier: Apache-2.0
"""What the gradients of the convolutional stem share: the way back through ReLU and batch norm.

With dz the gradient before the ReLU and raw the sums of the convolution, which were normalised by
the statistics of the batch, the gradient of the sums is

    k1 dz + k2 (raw - mean) + k3

with four numbers a channel, ``coefficients`` (4, C), that ``stem_sums`` makes of sums over all
positions. With fixed statistics it is k1 dz.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .stem_blocks import load_channels


@triton.jit
def load_coefficients(p_k, o_c, C: tl.constexpr):
    """k1, k2, k3 and the mean of the channels ``o_c``."""
    m_c = o_c < C
    b_k1 = tl.load(p_k + o_c, mask=m_c, other=0.0)
    b_k2 = tl.load(p_k + C + o_c, mask=m_c, other=0.0)
    b_k3 = tl.load(p_k + 2 * C + o_c, mask=m_c, other=0.0)
    b_mean = tl.load(p_k + 3 * C + o_c, mask=m_c, other=0.0)
    return b_k1, b_k2, b_k3, b_mean


@triton.jit
def load_raw_gradient(
    p_dz, p_raw, k, o_row, m_row, start, C: tl.constexpr, BLOCK: tl.constexpr, DOT_F32: tl.constexpr
):
    """The gradient of the sums as [ROWS, BLOCK] in the dtype of dz, zero where there is nothing:
    channels from ``start`` on at the offsets ``o_row``. Without raw, dz is that already.
    """
    b_g = load_channels(p_dz, o_row, m_row, start, C, (BLOCK,), False)[0]
    if p_raw is not None:
        b_k1, b_k2, b_k3, b_mean = k
        b_raw = load_channels(p_raw, o_row, m_row, start, C, (BLOCK,), False)[0]
        b_d = (b_raw.to(tl.float32) - b_mean[None, :]) * b_k2[None, :] + b_k3[None, :]
        b_d += b_g.to(tl.float32) * b_k1[None, :]
        b_g = tl.where(m_row[:, None], b_d, 0.0).to(p_dz.dtype.element_ty)
    if DOT_F32:
        b_g = b_g.to(tl.float32)
    return b_g


@triton.jit
def through_relu(b_dy, b_raw, b_scale, b_shift):
    """The gradient before relu(raw scale + shift), of which NaN is NaN."""
    b_y = b_raw.to(tl.float32) * b_scale[None, :] + b_shift[None, :]
    return tl.where(b_y <= 0.0, 0.0, b_dy)

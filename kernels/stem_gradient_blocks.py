# SPDX-License-Identifier: Apache-2.0
"""What the gradients of the convolutional stem share: the way back through ReLU and batch norm.

With dz the gradient before the ReLU and raw the sums of the convolution, which were normalised,
the gradient of the sums is

    k1 dz + k2 raw + k3

with three numbers a channel, ``coefficients`` (3, C), that ``stem_norm_gradient`` makes from sums
over all positions. So dz and raw are kept, and what follows from them is made where it is read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .stem_blocks import load_channels, load_vectors


@triton.jit
def load_raw_gradient(
    p_dz, p_raw, p_k, o_dz, o_row, m_row, start, C: tl.constexpr, CHUNKS: tl.constexpr,
    TRAINING: tl.constexpr, DOT_F32: tl.constexpr,
):  # fmt: skip
    """The gradient of the sums in the dtype of dz, zero where there is nothing: channels from
    ``start`` on, of dz at the offsets ``o_dz`` and of raw at ``o_row``.

    With fixed statistics (not TRAINING) k1 dz; without coefficients dz.
    """
    b_dz = load_channels(p_dz, o_dz, m_row, start, C, CHUNKS, False)
    tiles = ()
    for c in tl.static_range(len(CHUNKS)):
        # [ROWS, CHUNKS[c]]
        b_x = b_dz[c]
        if p_k is not None:
            b_k1 = load_vectors(p_k, start, C, (tl.constexpr(CHUNKS[c]),))[0]
            b_x = b_x.to(tl.float32) * b_k1[None, :]
            if TRAINING:
                b_k2 = load_vectors(p_k + C, start, C, (tl.constexpr(CHUNKS[c]),))[0]
                b_k3 = load_vectors(p_k + 2 * C, start, C, (tl.constexpr(CHUNKS[c]),))[0]
                b_raw = load_channels(
                    p_raw, o_row, m_row, start, C, (tl.constexpr(CHUNKS[c]),), False
                )[0]
                b_x += b_raw.to(tl.float32) * b_k2[None, :] + b_k3[None, :]
                b_x = tl.where(m_row[:, None], b_x, 0.0)
        b_x = b_x.to(p_dz.dtype.element_ty)
        if DOT_F32:
            b_x = b_x.to(tl.float32)
        tiles = tiles + (b_x,)
        start += CHUNKS[c]
    return tiles


@triton.jit
def through_relu(b_dy, b_raw, b_scale, b_shift):
    """The gradient before relu(raw scale + shift), of which NaN is NaN."""
    b_y = b_raw.to(tl.float32) * b_scale[None, :] + b_shift[None, :]
    return tl.where(b_y <= 0.0, 0.0, b_dy)

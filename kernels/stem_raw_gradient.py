# SPDX-License-Identifier: Apache-2.0
"""From the gradient before the ReLU to that of a convolution's sums, in place, where more than one
kernel reads it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .stem_gradient_blocks import load_coefficients, load_raw_gradient


@triton.jit(do_not_specialize=["COUNT"])
def stem_raw_gradient_kernel(
    dz,
    raw,
    coefficients,
    COUNT,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of the sums for ROWS of COUNT positions and BLOCK channels."""
    start = tl.program_id(1) * BLOCK
    o_c = start + tl.arange(0, BLOCK)
    # [ROWS]
    o_p = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_p = o_p < COUNT
    k = load_coefficients(coefficients, o_c, C)
    b_g = load_raw_gradient(dz, raw, k, o_p * C, m_p, start, C, BLOCK, False)
    p_g = dz + (o_p[:, None] * C + o_c[None, :])
    tl.store(p_g, b_g, mask=m_p[:, None] & (o_c < C)[None, :])


def stem_raw_gradient(dz, raw, coefficients, config):
    """dz and raw (B, C, H, W) have channels innermost in memory; ``coefficients`` (4, C)."""
    B, C, H, W = raw.shape
    block = config.keys[0]
    grid = (triton.cdiv(B * H * W, config.rows), triton.cdiv(C, block))
    stem_raw_gradient_kernel[grid](
        dz=dz,
        raw=raw,
        coefficients=coefficients,
        COUNT=B * H * W,
        C=C,
        ROWS=config.rows,
        BLOCK=block,
        num_warps=config.warps,
        enable_fp_fusion=True,
    )

# SPDX-License-Identifier: Apache-2.0
"""The last 1x1 convolution of the stem: a product of rows, written as tokens at their places."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import INTERPRETED, zero_rows
from .stem_blocks import activated, add_products, load_channels, load_vectors, places


@triton.jit(do_not_specialize=["B", "N"])
def stem_tokens_kernel(
    x,
    weight,
    bias,
    scale,
    shift,
    pos_embed,
    cls_token,
    out,
    B,
    N,
    C: tl.constexpr,
    OUT: tl.constexpr,
    PLACED: tl.constexpr,
    ROWS: tl.constexpr,
    OUT_CHUNKS: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    C_CHUNKS: tl.constexpr,
    C_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """out = x weightᵀ + bias + positions behind the class token, of x (B, N, C) or, with ``scale``
    and ``shift``, of relu(x scale + shift). One program for ROWS tokens and OUT_BLOCK channels.
    """
    OUT_BLOCKS: tl.constexpr = (OUT + OUT_BLOCK - 1) // OUT_BLOCK
    PREFIX: tl.constexpr = 0 if cls_token is None else 1
    # Neighbours read the same x.
    i_tile = tl.program_id(0) // OUT_BLOCKS
    start_out = tl.program_id(0) % OUT_BLOCKS * OUT_BLOCK
    o_b, _, o_n, m_n = places(i_tile, B, 1, N, ROWS)
    o_row = (i_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)) * C
    acc = zero_rows(ROWS, OUT_CHUNKS)
    for start in range(0, C, C_BLOCK):
        # [ROWS, C_BLOCK]
        b_x = load_channels(x, o_row, m_n, start, C, C_CHUNKS, DOT_F32)
        if scale is not None:
            b_scale = load_vectors(scale, start, C, C_CHUNKS)
            b_shift = load_vectors(shift, start, C, C_CHUNKS)
            b_x = activated(b_x, b_scale, b_shift, m_n)
        acc = add_products(
            acc, b_x, weight, start_out, start, OUT, C, C, OUT_CHUNKS, C_CHUNKS, PRECISION, DOT_F32
        )
    # The class token stands before the first of an image.
    o_cls = o_b * (N + PREFIX) * OUT
    o_token = o_cls + (o_n + PREFIX).to(tl.int64) * OUT
    o_position = (o_n + PLACED).to(tl.int64) * OUT
    for n in tl.static_range(len(OUT_CHUNKS)):
        # [ROWS, OUT_CHUNKS[n]]
        o_out = start_out + tl.arange(0, OUT_CHUNKS[n])
        m_out = m_n[:, None] & (o_out < OUT)[None, :]
        b_y = acc[n]
        if bias is not None:
            b_y += tl.load(bias + o_out, mask=o_out < OUT, other=0.0).to(tl.float32)[None, :]
        if pos_embed is not None:
            p_position = pos_embed + (o_position[:, None] + o_out[None, :])
            b_y += tl.load(p_position, mask=m_out, other=0.0).to(tl.float32)
        p_token = out + (o_token[:, None] + o_out[None, :])
        tl.store(p_token, b_y.to(out.dtype.element_ty), mask=m_out)
        if cls_token is not None:
            b_cls = tl.load(cls_token + o_out, mask=o_out < OUT, other=0.0).to(tl.float32)
            if PLACED:
                b_cls += tl.load(pos_embed + o_out, mask=o_out < OUT, other=0.0).to(tl.float32)
            b_cls = tl.broadcast_to(b_cls[None, :], b_y.shape).to(out.dtype.element_ty)
            p_first = out + (o_cls[:, None] + o_out[None, :])
            tl.store(p_first, b_cls, mask=m_out & (o_n == 0)[:, None])
        start_out += OUT_CHUNKS[n]


def stem_tokens(x, weight, bias, affine, pos_embed, cls_token, out, precision, config):
    """x (B, C, H, W) with channels innermost into tokens ``out`` (B, H W[+1], OUT).

    ``weight`` is (OUT, C, 1, 1); ``affine`` as in :func:`stem_conv`. The others are contiguous, or
    None; ``pos_embed`` may begin with that of the class token.
    """
    B, C, H, W = x.shape
    OUT = out.shape[2]
    placed = pos_embed is not None and pos_embed.shape[1] > H * W
    tiles = triton.cdiv(B * H * W, config.rows)
    block = sum(config.keys)
    stem_tokens_kernel[(tiles * triton.cdiv(OUT, block),)](
        x=x,
        weight=weight,
        bias=bias,
        scale=None if affine is None else affine[0],
        shift=None if affine is None else affine[1],
        pos_embed=pos_embed,
        cls_token=cls_token,
        out=out,
        B=B,
        N=H * W,
        C=C,
        OUT=OUT,
        PLACED=int(placed),
        ROWS=config.rows,
        OUT_CHUNKS=config.keys,
        OUT_BLOCK=block,
        C_CHUNKS=config.channels,
        C_BLOCK=sum(config.channels),
        PRECISION=precision,
        DOT_F32=INTERPRETED,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )

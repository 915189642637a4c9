# SPDX-License-Identifier: Apache-2.0
"""The position term as a Kronecker product: P = Py ⊗ Px of two maps of the grid's sides."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import INTERPRETED, LOG2_E, image_and_head, in_units, stride_unit

#: Grid rows and grid columns that a program works on at a time.
BLOCK = 16


def padded(side: int) -> int:
    """Side of the tile that holds a factor."""
    return max(BLOCK, triton.next_power_of_2(side))


@triton.jit
def _softmax_of_offsets(linear, square, SIDE: tl.constexpr, TILE: tl.constexpr):
    """softmax_j(linear (j - i) + square (j - i)²) as [TILE, TILE], zero beyond SIDE."""
    o_i = tl.arange(0, TILE)[:, None]
    o_j = tl.arange(0, TILE)[None, :]
    offset = (o_j - o_i).to(tl.float32)
    b_s = (linear * offset + square * offset * offset) * LOG2_E
    b_s = tl.where(o_j < SIDE, b_s, float("-inf"))
    b_e = tl.exp2(b_s - tl.max(b_s, 1)[:, None])
    return tl.where(o_i < SIDE, b_e / tl.sum(b_e, 1)[:, None], 0.0)


@triton.jit
def position_factors_kernel(
    pos_weight,
    py,
    px,
    pos_weight_strides,
    GH: tl.constexpr,
    GW: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    """Py (H, TILE_Y, TILE_Y) and Px (H, TILE_X, TILE_X) in float32."""
    i_h = tl.program_id(0).to(tl.int64)
    p_weight = pos_weight + i_h * pos_weight_strides[0]
    a = tl.load(p_weight).to(tl.float32)
    b = tl.load(p_weight + pos_weight_strides[1]).to(tl.float32)
    c = tl.load(p_weight + 2 * pos_weight_strides[1]).to(tl.float32)
    o_y = tl.arange(0, TILE_Y)
    o_x = tl.arange(0, TILE_X)
    p_py = py + i_h * TILE_Y * TILE_Y + o_y[:, None] * TILE_Y + o_y[None, :]
    p_px = px + i_h * TILE_X * TILE_X + o_x[:, None] * TILE_X + o_x[None, :]
    tl.store(p_py, _softmax_of_offsets(b, c, GH, TILE_Y))
    tl.store(p_px, _softmax_of_offsets(a, c, GW, TILE_X))


def position_factors(pos_weight, dtype, grid_size):
    """Py and Px of ``pos_weight`` (H, 3), padded with zeros; ``dtype`` is float32."""
    heads, (gh, gw) = pos_weight.shape[0], grid_size
    tile_y, tile_x = padded(gh), padded(gw)
    py = pos_weight.new_empty(heads, tile_y, tile_y, dtype=dtype)
    px = pos_weight.new_empty(heads, tile_x, tile_x, dtype=dtype)
    position_factors_kernel[(heads,)](
        pos_weight=pos_weight,
        py=py,
        px=px,
        pos_weight_strides=pos_weight.stride(),
        GH=gh,
        GW=gw,
        TILE_Y=tile_y,
        TILE_X=tile_x,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return py, px


@triton.jit
def load_grid(
    p_x,
    o_r,
    first,
    i_d,
    stride_r,
    stride_c,
    R: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """x of the grid as [o_r, (BLOCK of the other side from ``first``, CHANNELS)]."""
    o = tl.arange(0, BLOCK * CHANNELS)
    o_c = first + o // CHANNELS
    o_d = i_d * CHANNELS + o % CHANNELS
    p = p_x + o_r[:, None] * stride_r + (o_c * stride_c + o_d)[None, :]
    b_x = tl.load(p, mask=(o_r[:, None] < R) & ((o_c < C) & (o_d < D))[None, :], other=0.0)
    if DOT_F32:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def exchange(b_x, BLOCK: tl.constexpr, CHANNELS: tl.constexpr):
    """[a, (b, channels)] to [b, (a, channels)], a and b of BLOCK."""
    b_x = tl.permute(tl.reshape(b_x, (BLOCK, BLOCK, CHANNELS)), (1, 0, 2))
    return tl.reshape(b_x, (BLOCK, BLOCK * CHANNELS))


@triton.jit
def load_factor(p_factor, o_r, o_c, TILE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Rows ``o_r`` and columns ``o_c`` of a factor or of its transpose."""
    if TRANSPOSED:
        return tl.load(p_factor + o_c[None, :] * TILE + o_r[:, None])
    return tl.load(p_factor + o_r[:, None] * TILE + o_c[None, :])


@triton.jit
def kronecker_kernel(
    x,
    py,
    px,
    gating_param,
    out,
    x_strides,
    out_strides,
    B,
    UNIT: tl.constexpr,
    GH: tl.constexpr,
    GW: tl.constexpr,
    D: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """out = g (Py ⊗ Px) x, or with its transpose, for BLOCK grid columns and some CHANNELS."""
    i_b, i_h = image_and_head(B)
    i_d = tl.program_id(2)
    p_x = x + (i_b * x_strides[0] + i_h * x_strides[1]) * UNIT
    stride_n = tl.cast(x_strides[2], tl.int64) * UNIT
    # [BLOCK, TILE_X]
    o_ix = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_jx = tl.arange(0, TILE_X)
    o_iy = tl.arange(0, TILE_Y)
    b_px = load_factor(px + i_h * TILE_X * TILE_X, o_ix, o_jx, TILE_X, TRANSPOSED)
    acc = tl.zeros([TILE_Y, BLOCK * CHANNELS], tl.float32)
    for first in range(0, GH, BLOCK):
        # [TILE_X, (BLOCK rows of the grid, CHANNELS)]
        b_x = load_grid(
            p_x, o_jx, first, i_d, stride_n, GW * stride_n, GW, GH, D, BLOCK, CHANNELS, DOT_F32
        )
        b_w = tl.dot(b_px.to(b_x.dtype), b_x, input_precision=PRECISION).to(b_x.dtype)
        o_jy = first + tl.arange(0, BLOCK)
        b_py = load_factor(py + i_h * TILE_Y * TILE_Y, o_iy, o_jy, TILE_Y, TRANSPOSED)
        b_w = exchange(b_w, BLOCK, CHANNELS)
        acc = tl.dot(b_py.to(b_x.dtype), b_w, acc, input_precision=PRECISION)

    gate = tl.sigmoid(tl.load(gating_param + i_h).to(tl.float32))
    o = tl.arange(0, BLOCK * CHANNELS)
    o_x = tl.program_id(1) * BLOCK + o // CHANNELS
    o_d = i_d * CHANNELS + o % CHANNELS
    o_n = o_iy[:, None].to(tl.int64) * GW + o_x[None, :]
    p_out = out + (i_b * out_strides[0] + i_h * out_strides[1]) * UNIT
    p_out = p_out + o_n * out_strides[2] * UNIT + o_d[None, :]
    m_out = (o_iy[:, None] < GH) & ((o_x < GW) & (o_d < D))[None, :]
    tl.store(p_out, (acc * gate).to(out.dtype.element_ty), mask=m_out)


def kronecker(x, py, px, gating_param, out, grid_size, precision, config, *, transposed=False):
    """g (Py ⊗ Px) x into ``out``, both (B, H, N, d); transposed, g (Pyᵀ ⊗ Pxᵀ) x."""
    B, H, _, D = x.shape
    gh, gw = grid_size
    unit = stride_unit(x, out)
    kronecker_kernel[(B * H, triton.cdiv(gw, BLOCK), triton.cdiv(D, config.channels[0]))](
        x=x,
        py=py,
        px=px,
        gating_param=gating_param,
        out=out,
        x_strides=in_units(x, unit),
        out_strides=in_units(out, unit),
        B=B,
        UNIT=unit,
        GH=gh,
        GW=gw,
        D=D,
        TILE_Y=padded(gh),
        TILE_X=padded(gw),
        BLOCK=BLOCK,
        CHANNELS=config.channels[0],
        TRANSPOSED=transposed,
        PRECISION=precision,
        DOT_F32=INTERPRETED,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
        enable_fp_fusion=True,
    )

# SPDX-License-Identifier: Apache-2.0
"""Gradients of the position and gating parameters of GPSA, through the factors Py and Px.

With dO the gradient of the output, W = (I ⊗ Px) v and Y = (Pyᵀ ⊗ I) dO,

    dPy[iy, jy] = Σ dO[iy, ix] · W[jy, ix],    dPx[ix, jx] = Σ Y[jy, ix] · v[jy, jx],

summed over the images, the other side and the channels; then the backward of two small softmaxes.
Every sum has a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import INTERPRETED, in_units, stride_unit
from .kronecker import BLOCK, exchange, load_factor, load_grid, padded


@triton.jit
def factor_gradient_kernel(
    grad,
    v,
    py,
    px,
    dpy,
    dpx,
    grad_strides,
    v_strides,
    B,
    GROUPS,
    UNIT: tl.constexpr,
    GH: tl.constexpr,
    GW: tl.constexpr,
    D: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """For one head, every GROUPS-th image, BLOCK grid columns of the queries and BLOCK grid rows
    of the keys: their part of dPy into dpy (H, GROUPS, X blocks, TILE_Y, TILE_Y) and of dPx into
    dpx (H, GROUPS, Y blocks, TILE_X, TILE_X).
    """
    i_h = (tl.program_id(0) // GROUPS).to(tl.int64)
    i_g = tl.program_id(0) % GROUPS
    i_x = tl.program_id(1)
    i_y = tl.program_id(2)
    stride_gn = tl.cast(grad_strides[2], tl.int64) * UNIT
    stride_vn = tl.cast(v_strides[2], tl.int64) * UNIT
    o_iy = tl.arange(0, TILE_Y)
    o_jx = tl.arange(0, TILE_X)
    o_ix = i_x * BLOCK + tl.arange(0, BLOCK)
    o_jy = i_y * BLOCK + tl.arange(0, BLOCK)
    b_px = load_factor(px + i_h * TILE_X * TILE_X, o_ix, o_jx, TILE_X, False)
    b_pyt = load_factor(py + i_h * TILE_Y * TILE_Y, o_jy, o_iy, TILE_Y, True)

    b_dpy = tl.zeros([TILE_Y, BLOCK], tl.float32)
    b_dpx = tl.zeros([BLOCK, TILE_X], tl.float32)
    for i_b in range(i_g, B, GROUPS):
        i_image = tl.cast(i_b, tl.int64)
        p_g = grad + (i_image * grad_strides[0] + i_h * grad_strides[1]) * UNIT
        p_v = v + (i_image * v_strides[0] + i_h * v_strides[1]) * UNIT
        for i_d in range(tl.cdiv(D, CHANNELS)):
            # [TILE_X, (jy, channels)] and [TILE_Y, (ix, channels)]
            b_v = load_grid(
                p_v, o_jx, i_y * BLOCK, i_d, stride_vn, GW * stride_vn,
                GW, GH, D, BLOCK, CHANNELS, DOT_F32,
            )  # fmt: skip
            b_g = load_grid(
                p_g, o_iy, i_x * BLOCK, i_d, GW * stride_gn, stride_gn,
                GH, GW, D, BLOCK, CHANNELS, DOT_F32,
            )  # fmt: skip
            b_w = tl.dot(b_px.to(b_v.dtype), b_v, input_precision=PRECISION).to(b_v.dtype)
            b_w = exchange(b_w, BLOCK, CHANNELS)
            b_dpy = tl.dot(b_g, tl.trans(b_w), b_dpy, input_precision=PRECISION)
            b_y = tl.dot(b_pyt.to(b_g.dtype), b_g, input_precision=PRECISION).to(b_g.dtype)
            b_y = exchange(b_y, BLOCK, CHANNELS)
            b_dpx = tl.dot(b_y, tl.trans(b_v), b_dpx, input_precision=PRECISION)

    i_hg = i_h * GROUPS + i_g
    p_dpy = dpy + (i_hg * tl.num_programs(1) + i_x) * TILE_Y * TILE_Y
    p_dpx = dpx + (i_hg * tl.num_programs(2) + i_y) * TILE_X * TILE_X
    tl.store(p_dpy + o_iy[:, None] * TILE_Y + o_jy[None, :], b_dpy)
    tl.store(p_dpx + o_ix[:, None] * TILE_X + o_jx[None, :], b_dpx)


@triton.jit
def _total(p_x, COUNT, TILE: tl.constexpr):
    """The sum of COUNT squares (TILE, TILE) in a row."""
    o = tl.arange(0, TILE)
    b_sum = tl.zeros([TILE, TILE], tl.float32)
    for i in range(COUNT):
        b_sum += tl.load(p_x + i * TILE * TILE + o[:, None] * TILE + o[None, :])
    return b_sum


@triton.jit
def _logit_gradient(b_p, b_dp):
    """The backward of a softmax over the last axis."""
    b_inner = b_p * b_dp
    return b_inner - b_p * tl.sum(b_inner, 1)[:, None]


@triton.jit
def parameter_gradient_kernel(
    py,
    px,
    dpy,
    dpx,
    content,
    gating_param,
    dpos_weight,
    dgating_param,
    COUNT_Y,
    COUNT_X,
    COUNT_CONTENT,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sums the parts of one head; ``content`` (H, COUNT_CONTENT) has those of Σ dO · Oc, where Oc
    is the content term before its gate.
    """
    i_h = tl.program_id(0).to(tl.int64)
    o_y = tl.arange(0, TILE_Y)
    o_x = tl.arange(0, TILE_X)
    b_py = tl.load(py + i_h * TILE_Y * TILE_Y + o_y[:, None] * TILE_Y + o_y[None, :])
    b_px = tl.load(px + i_h * TILE_X * TILE_X + o_x[:, None] * TILE_X + o_x[None, :])
    b_dpy = _total(dpy + i_h * COUNT_Y * TILE_Y * TILE_Y, COUNT_Y, TILE_Y)
    b_dpx = _total(dpx + i_h * COUNT_X * TILE_X * TILE_X, COUNT_X, TILE_X)
    b_content = tl.zeros([LANES], tl.float32)
    for start in range(0, COUNT_CONTENT, LANES):
        o = start + tl.arange(0, LANES)
        b_content += tl.load(content + i_h * COUNT_CONTENT + o, mask=o < COUNT_CONTENT, other=0.0)

    gate = tl.sigmoid(tl.load(gating_param + i_h).to(tl.float32))
    share = tl.sigmoid(-tl.load(gating_param + i_h).to(tl.float32))
    # Σ dO · Op, where Op is the position term before its gate, is Σ Py dPy.
    dgating = gate * share * (tl.sum(b_py * b_dpy) - tl.sum(b_content))
    tl.store(dgating_param + i_h, dgating.to(dgating_param.dtype.element_ty))

    dy = (o_y[None, :] - o_y[:, None]).to(tl.float32)
    dx = (o_x[None, :] - o_x[:, None]).to(tl.float32)
    b_ty = gate * _logit_gradient(b_py, b_dpy)
    b_tx = gate * _logit_gradient(b_px, b_dpx)
    da = tl.sum(b_tx * dx)
    db = tl.sum(b_ty * dy)
    dc = tl.sum(b_tx * dx * dx) + tl.sum(b_ty * dy * dy)
    p_dweight = dpos_weight + i_h * 3
    tl.store(p_dweight, da.to(dpos_weight.dtype.element_ty))
    tl.store(p_dweight + 1, db.to(dpos_weight.dtype.element_ty))
    tl.store(p_dweight + 2, dc.to(dpos_weight.dtype.element_ty))


def factor_gradient(grad, v, py, px, grid_size, precision, config):
    """dPy (H, parts, TILE_Y, TILE_Y) and dPx (H, parts, TILE_X, TILE_X), to be summed over their
    parts, from ``grad`` and v (B, H, N, d) and the factors.
    """
    B, H, _, D = v.shape
    gh, gw = grid_size
    groups = config.groups
    x_blocks, y_blocks = triton.cdiv(gw, BLOCK), triton.cdiv(gh, BLOCK)
    # Zeros, since the blocks of a side do not cover its padding.
    dpy = py.new_zeros(H, groups * x_blocks, *py.shape[1:])
    dpx = px.new_zeros(H, groups * y_blocks, *px.shape[1:])
    unit = stride_unit(grad, v)
    factor_gradient_kernel[(H * groups, x_blocks, y_blocks)](
        grad=grad,
        v=v,
        py=py,
        px=px,
        dpy=dpy,
        dpx=dpx,
        grad_strides=in_units(grad, unit),
        v_strides=in_units(v, unit),
        B=B,
        GROUPS=groups,
        UNIT=unit,
        GH=gh,
        GW=gw,
        D=D,
        TILE_Y=padded(gh),
        TILE_X=padded(gw),
        BLOCK=BLOCK,
        CHANNELS=config.channels[0],
        PRECISION=precision,
        DOT_F32=INTERPRETED,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
        enable_fp_fusion=True,
    )
    return dpy, dpx


def parameter_gradient(py, px, dpy, dpx, content, gating_param, dpos_weight, dgating_param, config):
    """Gradients of ``pos_weight`` and ``gating_param`` into ``dpos_weight`` (H, 3) and
    ``dgating_param`` (H,), from :func:`factor_gradient`'s and ``content`` (H, parts), which has
    Σ dO · Oc in parts, in float32.
    """
    parameter_gradient_kernel[(py.shape[0],)](
        py=py,
        px=px,
        dpy=dpy,
        dpx=dpx,
        content=content,
        gating_param=gating_param,
        dpos_weight=dpos_weight,
        dgating_param=dgating_param,
        COUNT_Y=dpy.shape[1],
        COUNT_X=dpx.shape[1],
        COUNT_CONTENT=content.shape[1],
        TILE_Y=py.shape[1],
        TILE_X=px.shape[1],
        LANES=1024,
        num_warps=config.warps,
        enable_fp_fusion=True,
    )

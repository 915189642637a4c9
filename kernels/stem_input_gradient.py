# SPDX-License-Identifier: Apache-2.0
"""The gradient of what a convolution of the stem reads, 3x3 with padding 1 or the last 1x1: back
through the ReLU before it, and the sums that the batch norm there needs.

Of a 3x3 with stride 2, a pixel was read by one, two or four of the nine taps, as its row and column
are even or odd: a tile holds the pixels of one of these four kinds, and only their taps are summed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import INTERPRETED, add_product, zero_rows
from .stem_blocks import affine, load_channels, places, row_offsets
from .stem_gradient_blocks import through_relu


@triton.jit(do_not_specialize=["B", "H", "W", "OH", "OW", "TILES"])
def stem_input_gradient_kernel(
    grad,
    weight,
    below,
    gamma,
    beta,
    mean,
    variance,
    dx,
    partials,
    grad_strides,
    eps,
    B,
    H,
    W,
    OH,
    OW,
    TILES,
    UNIT: tl.constexpr,
    STRIDE: tl.constexpr,
    TAPS: tl.constexpr,
    C: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """TILES tiles of ROWS pixels of dx, one after the other, for WIDTH channels.

    Below a batch norm, which read ``below``, dx (B, H, W, C) is the gradient before the ReLU, and
    partials (2, programs, C) get the sums of it and of it times (below - mean); SCALED, dx is then
    multiplied by the norm's scale. Else dx is that of images (B, C, H, W).
    """
    KINDS: tl.constexpr = STRIDE * STRIDE
    STEPS: tl.constexpr = (OUT + DEPTH - 1) // DEPTH
    i_s = tl.program_id(0)
    start = tl.program_id(1) * WIDTH
    b_sum = ()
    b_product = ()
    for c in tl.static_range(len(CHUNKS)):
        b_sum = b_sum + (tl.zeros([tl.constexpr(CHUNKS[c])], tl.float32),)
        b_product = b_product + (tl.zeros([tl.constexpr(CHUNKS[c])], tl.float32),)

    pixels = ((H + STRIDE - 1) // STRIDE) * ((W + STRIDE - 1) // STRIDE)
    tiles = ((tl.cast(B, tl.int64) * pixels + ROWS - 1) // ROWS * KINDS).to(tl.int32)
    for i_t in range(i_s * TILES, tl.minimum(i_s * TILES + TILES, tiles)):
        i_tile = tl.cast(i_t, tl.int32)
        i_py = i_tile % KINDS // STRIDE
        i_px = i_tile % STRIDE
        rows = tl.maximum((H - i_py + STRIDE - 1) // STRIDE, 1)
        columns = tl.maximum((W - i_px + STRIDE - 1) // STRIDE, 1)
        o_b, o_y, o_x, m_p = places(i_tile // KINDS, B, rows, columns, ROWS)
        o_h = o_y * STRIDE + i_py
        o_w = o_x * STRIDE + i_px
        m_p = m_p & (o_h < H) & (o_w < W)
        # The outputs that read a pixel lie in a rectangle, of which this is the last corner.
        if TAPS == 1:
            last_y, last_x, taps_y, taps_x = 0, 0, 1, 1
        elif STRIDE == 1:
            last_y, last_x, taps_y, taps_x = 1, 1, 3, 3
        else:
            last_y, last_x, taps_y, taps_x = i_py, i_px, 1 + i_py, 1 + i_px

        if TAPS == 1:
            o_n = (o_y * OW + o_x).to(tl.int64)
            o_row = (o_b * grad_strides[0] + o_n * grad_strides[1]) * UNIT
        else:
            o_row = row_offsets(o_b, o_y + last_y, o_x + last_x, OH, OW, OUT)
        acc = zero_rows(ROWS, CHUNKS)
        for i_k in range(taps_y * taps_x * STEPS):
            i_ty = i_k // STEPS // taps_x
            i_tx = i_k // STEPS % taps_x
            o_oy = o_y + (last_y - i_ty)
            o_ox = o_x + (last_x - i_tx)
            m_o = m_p & (o_oy >= 0) & (o_oy < OH) & (o_ox >= 0) & (o_ox < OW)
            back = (i_ty * OW + i_tx) * OUT
            # Kind 0 is read by the middle tap alone, kind 1 by the two beside it.
            tap = 0
            if TAPS == 9:
                tap = (i_ty * STRIDE + STRIDE - 1 - last_y * (STRIDE - 1)) * 3
                tap += i_tx * STRIDE + STRIDE - 1 - last_x * (STRIDE - 1)
            k_start = i_k % STEPS * DEPTH
            # [ROWS, DEPTH]
            b_g = load_channels(grad - back, o_row, m_o, k_start, OUT, (DEPTH,), DOT_F32)[0]
            # [DEPTH, CHUNKS[c]]
            o_k = k_start + tl.arange(0, DEPTH)
            b_w = load_channels(
                weight, (o_k * TAPS + tap) * C, o_k < OUT, start, C, CHUNKS, DOT_F32
            )
            acc = add_product(acc, b_g, b_w, PRECISION)

        if below is not None:
            o_row = row_offsets(o_b, o_h, o_w, H, W, C)
            b_raw = load_channels(below, o_row, m_p, start, C, CHUNKS, False)
            sums = ()
            products = ()
            first = start
            for c in tl.static_range(len(CHUNKS)):
                # [ROWS, CHUNKS[c]]
                o_c = first + tl.arange(0, CHUNKS[c])
                b_scale, b_shift = affine(gamma, beta, mean, variance, o_c, eps, C)
                b_mean = tl.load(mean + o_c, mask=o_c < C, other=0.0).to(tl.float32)
                b_dx = through_relu(acc[c], b_raw[c], b_scale, b_shift).to(dx.dtype.element_ty)
                b_stored = b_dx
                if SCALED:
                    b_stored = (b_dx.to(tl.float32) * b_scale[None, :]).to(dx.dtype.element_ty)
                m_x = m_p[:, None] & (o_c < C)[None, :]
                tl.store(dx + (o_row[:, None] + o_c[None, :]), b_stored, mask=m_x)
                # Sums of what is rounded: with them the gradient of the sums below has no mean.
                b_dx = tl.where(m_p[:, None], b_dx.to(tl.float32), 0.0)
                sums = sums + (b_sum[c] + tl.sum(b_dx, 0),)
                b_d = tl.where(m_p[:, None], b_raw[c].to(tl.float32) - b_mean[None, :], 0.0)
                products = products + (b_product[c] + tl.sum(b_dx * b_d, 0),)
                first += CHUNKS[c]
            b_sum = sums
            b_product = products
        else:
            o_row = o_b * H * W * C + o_h * W + o_w
            first = start
            for c in tl.static_range(len(CHUNKS)):
                # [ROWS, CHUNKS[c]]
                o_c = first + tl.arange(0, CHUNKS[c])
                o_dx = o_row[:, None] + (o_c.to(tl.int64) * H * W)[None, :]
                m_x = m_p[:, None] & (o_c < C)[None, :]
                tl.store(dx + o_dx, acc[c].to(dx.dtype.element_ty), mask=m_x)
                first += CHUNKS[c]

    if below is not None:
        first = start
        for c in tl.static_range(len(CHUNKS)):
            o_c = first + tl.arange(0, CHUNKS[c])
            p_p = partials + i_s.to(tl.int64) * C + o_c
            tl.store(p_p, b_sum[c], mask=o_c < C)
            tl.store(p_p + tl.num_programs(0).to(tl.int64) * C, b_product[c], mask=o_c < C)
            first += CHUNKS[c]


def stem_input_gradient(grad, weight, stride, below, norm, eps, dx, scaled, precision, config):
    """The gradient of what a convolution reads, into dx.

    grad (B, OUT, OH, OW) of the output of a 3x3 convolution has channels innermost in memory, as
    has ``weight`` (OUT, C, 3, 3); or grad is (B, OH * OW, OUT), and ``weight`` (OUT, C).

    With ``below``, what the batch norm ``norm`` (weight, bias, mean, variance) read before this
    convolution, dx is the gradient before the ReLU between them, and its sums over parts of the
    positions are returned, (2, parts, C); ``scaled``, dx is that of ``below`` itself if the
    statistics are fixed. Both are (B, C, H, W) with channels innermost; dx without ``below`` is
    contiguous.
    """
    B, C, H, W = dx.shape
    taps, OUT = (1 if len(weight.shape) == 2 else 9), weight.shape[0]
    OH, OW = (H, W) if taps == 1 else grad.shape[2:]
    strides = grad.stride()[:2] if taps == 1 else (0, 0)
    unit = 8 if all(s % 8 == 0 for s in strides) else 1
    tiles = triton.cdiv(B * triton.cdiv(H, stride) * triton.cdiv(W, stride), config.rows)
    tiles *= stride * stride
    each = triton.cdiv(tiles, config.groups)
    programs = triton.cdiv(tiles, each)
    partials, (gamma, beta, mean, variance) = None, (None,) * 4
    if below is not None:
        gamma, beta, mean, variance = norm
        partials = mean.new_empty(2, programs, C)
    stem_input_gradient_kernel[(programs, triton.cdiv(C, sum(config.keys)))](
        grad=grad,
        weight=weight,
        below=below,
        gamma=gamma,
        beta=beta,
        mean=mean,
        variance=variance,
        dx=dx,
        partials=partials,
        grad_strides=tuple(s // unit for s in strides),
        eps=eps,
        B=B,
        H=H,
        W=W,
        OH=OH,
        OW=OW,
        TILES=each,
        UNIT=unit,
        STRIDE=stride,
        TAPS=taps,
        C=C,
        OUT=OUT,
        ROWS=config.rows,
        CHUNKS=config.keys,
        WIDTH=sum(config.keys),
        DEPTH=config.channels[0],
        SCALED=scaled,
        PRECISION=precision,
        DOT_F32=INTERPRETED,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )
    return partials

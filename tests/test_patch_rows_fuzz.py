# SPDX-License-Identifier: Apache-2.0
"""Random shapes, strides and offsets through the compiled module's reading of patches."""

from __future__ import annotations

import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastvit import _native
from fastvit.functional import patch_embed
from fastvit.reference import normalize_images

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@st.composite
def image_views(draw):
    """Images of any layout, most with gaps, some overlapping; the patch size; rows' dtype."""
    channels = draw(st.integers(1, 5))
    patch = draw(st.integers(1, 18)), draw(st.integers(1, 35))
    batch, rows, columns = (draw(st.integers(*r)) for r in ((0, 3), (1, 3), (1, 4)))
    sizes = [batch, channels, rows * patch[0], columns * patch[1]]
    dtype = draw(st.sampled_from(DTYPES))
    pixel = torch.uint8 if draw(st.booleans()) else dtype
    interleaved = draw(st.booleans())
    # Dimensions from the innermost; a stride of 0 is what expanding gives.
    fixed = (1, 3) if interleaved else (3,)
    free = draw(st.permutations([d for d in range(4) if d not in fixed]))
    strides, extent = [0] * 4, 1
    for dim in (*fixed, *free):
        if dim not in fixed:
            extent += draw(st.integers(0, 5))
        expanded = dim not in fixed and draw(st.integers(0, 9)) == 0
        strides[dim] = 0 if expanded else extent
        extent *= 1 if expanded else max(sizes[dim], 1)
    offset = draw(st.integers(0, 9))
    span = offset + 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True) if n > 0)
    seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if pixel == torch.uint8:
        memory = torch.randint(256, (span,), dtype=pixel, generator=seed)
    else:
        memory = torch.randn(span, generator=seed).to(pixel)
    return memory.as_strided(sizes, strides, offset), patch, interleaved, dtype


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(image_views(), st.booleans(), st.integers(1, 4))
def test_rows_of_any_view(case, normalized, threads):
    images, (ph, pw), interleaved, dtype = case
    B, C, H, W = images.shape
    byte = images.dtype == torch.uint8
    mean, std = (
        ([0.1 * c + 0.2 for c in range(C)], [0.3] * C) if byte and normalized else [None] * 2
    )
    memory = torch.full((B * C * H * W + 16,), -7.0, dtype=dtype)
    shape = (B, (H // ph) * (W // pw), C * ph * pw)
    rows = memory[8 : 8 + math.prod(shape)].view(shape)

    _native.load().patch_rows(images, ph, pw, interleaved, mean, std, rows, threads)

    x = normalize_images(images, mean, std, dtype).reshape(B, C, H // ph, ph, W // pw, pw)
    order = (0, 2, 4, 3, 5, 1) if interleaved else (0, 2, 4, 1, 3, 5)
    assert torch.equal(rows, x.permute(order).reshape(shape))
    assert (memory[:8] == -7).all()
    assert (memory[-8:] == -7).all()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(image_views(), st.booleans(), st.permutations(range(4)))
def test_op_takes_any_view(case, class_token, order):
    """The op takes what the module refuses, too: here dimensions in any order."""
    images, patch, _, _ = case
    images = images.permute(order).contiguous().permute([order.index(d) for d in range(4)])
    if images.dtype != torch.uint8:
        images = images.float()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, images.shape[1], *patch, generator=generator)
    cls = torch.randn(1, 1, 6, generator=generator) if class_token else None
    actual = patch_embed(images, weight, cls_token=cls, backend="native")
    expected = patch_embed(
        images.double() if images.is_floating_point() else images,
        weight.double(),
        cls_token=None if cls is None else cls.double(),
        backend="reference",
    )
    tolerance = 1e-6 * weight[0].numel() ** 0.5 * 8
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=tolerance)

# SPDX-License-Identifier: Apache-2.0
"""Bytes and FLOPs of every contest by hand, in all dtypes, and the share that figures reach."""

from __future__ import annotations

import pytest
from gpu_dry import gpu

DTYPES = {"bfloat16": 2, "float16": 2, "tf32": 4, "float32": 4}
RATES = {"bfloat16": 400.0, "float16": 300.0, "tf32": 240.0, "float32": 60.0}


@pytest.fixture(scope="module")
def floors():
    return gpu("floors")


def test_core(floors):
    """ConViT-S, 256 images, bfloat16: 4 tensors of 256 x 196 x 432 elements."""
    assert floors.core(256, 196, 9, 48, 2, backward=False) == (173_408_256, 16_994_009_088)
    assert floors.core(256, 196, 9, 48, 2, backward=True) == (476_872_704, 59_479_031_808)


def test_module(floors):
    """One token, one channel: 4 products of 2 FLOPs, and one attention."""
    assert floors.module(1, 1, 1, 1, 4, backward=False) == (4 * (2 + 4), 8 + 4)
    # x and the output, x and a gradient again, the gradient of x; the weights, again, and theirs.
    assert floors.module(1, 1, 1, 1, 4, backward=True) == (4 * (5 + 12), 24 + 14)


def test_patch_embed(floors):
    """Two images of three patches of four bytes, to five channels of two bytes."""
    bare = 2 * 3 * 4 + 2 * (2 * 3 * 5 + 5 * 4 + 5)
    # A class token for each image; four positions and the class token itself.
    whole = bare + 2 * (2 * 5 + 4 * 5 + 5)
    flops = 2 * 2 * 3 * 4 * 5
    arguments = (2, 3, 4, 5, 2, 1)
    assert floors.patch_embed(*arguments, backward=False, assembled=False) == (bare, flops)
    assert floors.patch_embed(*arguments, backward=False) == (whole, flops)
    assert floors.patch_embed(*arguments, backward=True) == (2 * whole, 2 * flops)


def test_patch_embed_of_a_vit(floors):
    """ViT-B, 256 images, bfloat16: 256 x 196 x 768 pixels and 256 x 197 x 768 channels."""
    moved = 2 * (38_535_168 + 38_731_776 + 589_824 + 768 + 151_296 + 768)
    work = floors.patch_embed(256, 196, 768, 768, 2, 2, backward=False)
    assert work == (moved, 59_190_018_048)


def test_stem(floors):
    """Two images of 4 x 4 pixels in bytes, through 2 x 2 of 5 channels, to tokens of 7."""
    shapes = gpu("shapes")
    problem = shapes.Stem("", 2, (4, 4), (5,), (2,), 7)
    weights, pixels, tokens = 9 * 3 * 5 + 5 * 7, 2 * 3 * 4 * 4, 2 * 2 * 2 * 7
    first, last = 2 * 2 * 4 * 27 * 5, 2 * 2 * 4 * 5 * 7
    forward = (pixels + tokens + weights, first + last)
    assert floors.stem(problem, 1, backward=False) == forward
    both = (2 * (pixels + tokens) + 3 * weights, 2 * first + 3 * last)
    assert floors.stem(problem, 1, backward=True) == both


def test_the_larger_term_counts(floors):
    ceilings = {"bandwidth": 10.0, "rates": {"bfloat16": 100.0}}
    assert floors.seconds(floors.Work(20.0, 100.0), ceilings, "bfloat16") == 2.0
    assert floors.seconds(floors.Work(20.0, 500.0), ceilings, "bfloat16") == 5.0


def test_more_than_all_of_it_is_a_fault(floors):
    assert floors.share(1.0, 2.0) == (0.5, None)
    reached, problem = floors.share(1.0, 0.8)
    assert reached == 1.25
    assert problem == "125 % of its floor: a fault of the measurement"


@pytest.mark.parametrize("dtype", DTYPES)
def test_seconds_of_a_core(floors, dtype):
    """2 images, 3 tokens, 5 heads of 7: q, k, v and the output of 210 elements each, and 2 x 2 x 5
    x 3 x 3 x 7 FLOPs for each of two products.
    """
    size = DTYPES[dtype]
    work = floors.core(2, 3, 5, 7, size, backward=False)
    assert work == (840 * size, 2520)
    # Three products of tf32 are faster than one of float32's own units.
    rate = {"bfloat16": 400, "float16": 300, "tf32": 240, "float32": 80}[dtype]
    by_memory, by_products = {"bandwidth": 1.0, "rates": RATES}, {"bandwidth": 1e9, "rates": RATES}
    assert floors.seconds(work, by_memory, dtype) == 840 * size
    assert floors.seconds(work, by_products, dtype) == 2520 / rate


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_a_layer_and_of_a_stem(floors, dtype):
    size = DTYPES[dtype]
    # 2 x 3 tokens of 35 channels, and 4 x 35 x 35 weights.
    assert floors.module(2, 3, 5, 7, size, backward=False).bytes == (420 + 4900) * size
    assert floors.module(2, 3, 5, 7, size, backward=True).bytes == (1050 + 14700) * size
    # One image of 4 x 4, a map of 2 x 2 x 5, tokens of 2 x 2 x 7: 48, 28, 135 and 35 elements.
    problem = gpu("shapes").Stem("", 1, (4, 4), (5,), (2,), 7)
    assert floors.stem(problem, size, backward=False).bytes == (48 + 28 + 135 + 35) * size
    assert floors.stem(problem, size, backward=True).bytes == (2 * (48 + 28) + 3 * 170) * size


@pytest.mark.parametrize("pixel", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_a_patch_embedding(floors, dtype, pixel):
    """Pixels in one dtype, everything else in another; the convolution alone has no positions."""
    size = DTYPES[dtype]
    alone = floors.patch_embed(1, 4, 12, 5, size, pixel, backward=False, assembled=False)
    assert alone == (48 * pixel + (20 + 60 + 5) * size, 480)
    # Tokens with the class token, weight, bias, positions, the class token.
    whole = floors.patch_embed(1, 4, 12, 5, size, pixel, backward=False)
    assert whole == (48 * pixel + (25 + 60 + 5 + 25 + 5) * size, 480)


def test_float32_without_tf32_units(floors):
    assert floors.rate({"float32": 60.0}, "float32") == 60.0
    assert floors.rate({"float32": 60.0, "tf32": 90.0}, "float32") == 60.0


def test_and_fails_its_stage(floors, tmp_path):
    contests = gpu("contests")
    records = gpu("record")
    record = records.Record(tmp_path, "kernels", 1.0)
    ceilings = {"bandwidth": 1e12, "rates": {"bfloat16": 1e15}}
    found = {"fastvit": {"median": 1e-9}}
    shape = gpu("full_plan").FULL.shapes[0]
    work = floors.core(*shape.problem, 2, backward=False)
    contests.judge(record, ceilings, work, "bfloat16", shape.name, found)
    assert not record.close()
    (problem,) = record.data["problems"]
    assert problem.startswith("S N=196 B=256, fastvit: ")
    assert problem.endswith("% of its floor: a fault of the measurement")

# SPDX-License-Identifier: Apache-2.0
"""The compiled module's placing of tokens, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastvit import _native
from fastvit.reference import assemble_tokens

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def native():
    return _native.load()


def same_bits(actual, expected):
    """Equal also in the sign of zero and where there are NaNs."""
    integer = {4: torch.int32, 2: torch.int16}[actual.element_size()]
    return torch.equal(actual.view(integer), expected.view(integer))


def fake(*shape, device):
    with FakeTensorMode():
        return torch.empty(*shape, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", ["none", "of the patches", "of all"])
@pytest.mark.parametrize("class_token", [False, True], ids=["no_class_token", "class_token"])
@pytest.mark.parametrize("shape", [(2, 5, 33), (3, 1, 1), (0, 4, 8), (2, 0, 8), (2, 4, 0)], ids=str)
def test_is_the_reference_bit_for_bit(native, shape, class_token, positions, dtype):
    B, N, D = shape
    length = N + class_token
    x = torch.randn(shape).to(dtype)
    cls = torch.randn(1, 1, D).to(dtype) if class_token else None
    pos = {
        "none": None,
        "of the patches": torch.randn(1, N, D).to(dtype),
        "of all": torch.randn(1, length, D).to(dtype),
    }[positions]
    out = torch.full((B, length, D), float("nan"), dtype=dtype)
    native.place_tokens(x, pos, cls, out, 1)
    assert same_bits(out, assemble_tokens(x, pos, cls))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_and_within_the_result(native, dtype):
    x, cls = torch.randn(3, 7, 20).to(dtype), torch.randn(1, 1, 20).to(dtype)
    pos = torch.randn(1, 7, 20).to(dtype)
    own = x.clone()
    native.place_tokens(own, pos, None, own, 1)
    assert same_bits(own, x + pos)
    out = torch.full((3, 8, 20), float("nan"), dtype=dtype)
    out[:, 1:] = x
    native.place_tokens(out[:, 1:], pos, cls, out, 1)
    assert same_bits(out, assemble_tokens(x, pos, cls))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number(native, dtype):
    """Sums of all with themselves shifted: subnormal, rounded, overflowing, NaN."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, 1, -1)
    for shift in (0, 1, 1000, 0x3FFF, 0x7C01):
        pos, out = x.roll(shift, 2), torch.full_like(x, 1)
        native.place_tokens(x, pos, None, out, 1)
        expected = x + pos
        assert torch.equal(out.isnan(), expected.isnan())
        known = ~expected.isnan()
        assert same_bits(out[known], expected[known])


def test_any_number_of_threads_gives_the_same(native):
    x, cls = torch.randn(8, 196, 384), torch.randn(1, 1, 384)
    pos = torch.randn(1, 197, 384)
    expected = assemble_tokens(x, pos, cls)
    for threads in (0, 1, 2, 3, 64):
        out = torch.full_like(expected, float("nan"))
        native.place_tokens(x, pos, cls, out, threads)
        assert same_bits(out, expected), threads


# What replaces one of the arguments of a good call, the exception, and the whole of its message.
BAD_CALLS = {
    "dtype": (
        {"x": torch.zeros(2, 4, 8, dtype=torch.float64)},
        TypeError,
        "x: expected float32 or float16 or bfloat16, got float64",
    ),
    "device": (
        {"x": fake(0, 4, 8, device="cuda")},
        ValueError,
        "x: expected a tensor on cpu, got cuda:0",
    ),
    "rank": (
        {"x": torch.zeros(4, 8)},
        ValueError,
        "x: expected 3 dimensions, got shape (4, 8)",
    ),
    "strided tokens": (
        {"x": torch.zeros(2, 4, 16)[..., ::2]},
        ValueError,
        "x: expected the tokens of an image to follow each other, got strides 16 and 2",
    ),
    "mixed dtypes": (
        {"cls_token": torch.zeros(1, 1, 8).half()},
        TypeError,
        "cls_token: expected float32 like x, got float16",
    ),
    "class token": (
        {"cls_token": torch.zeros(1, 8)},
        ValueError,
        "cls_token: expected shape (1, 1, 8), got (1, 8)",
    ),
    "rank of positions": (
        {"pos_embed": torch.zeros(5, 8)},
        ValueError,
        "pos_embed: expected 3 dimensions, got shape (5, 8)",
    ),
    "length of positions": (
        {"pos_embed": torch.zeros(1, 6, 8)},
        ValueError,
        "pos_embed: expected shape (1, 4, 8), got (1, 6, 8)",
    ),
    "positions of a class token that is not there": (
        {"cls_token": None, "out": torch.full((2, 4, 8), -1.0)},
        ValueError,
        "pos_embed: expected shape (1, 4, 8), got (1, 5, 8)",
    ),
    "strided positions": (
        {"pos_embed": torch.zeros(1, 8, 5).mT},
        ValueError,
        "pos_embed: expected a contiguous tensor, got shape (1, 5, 8) with strides (40, 1, 5)",
    ),
    "no room for the class token": (
        {"out": torch.full((2, 4, 8), -1.0)},
        ValueError,
        "out: expected shape (2, 5, 8), got (2, 4, 8)",
    ),
    "expanded result": (
        {"out": torch.full((1, 5, 8), -1.0).expand(2, -1, -1)},
        ValueError,
        "out: expected a contiguous tensor, got shape (2, 5, 8) with strides (0, 8, 1)",
    ),
}


@pytest.mark.parametrize(("wrong", "exception", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_arguments_are_named_before_anything_is_written(native, wrong, exception, message):
    good = {
        "x": torch.zeros(2, 4, 8),
        "pos_embed": torch.zeros(1, 5, 8),
        "cls_token": torch.zeros(1, 1, 8),
        "out": torch.full((2, 5, 8), -1.0),
        "threads": 1,
    }
    arguments = {**good, **wrong}
    with pytest.raises(exception) as error:
        native.place_tokens(**arguments)
    assert str(error.value) == message
    assert (arguments["out"] == -1).all()

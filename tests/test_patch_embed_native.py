# SPDX-License-Identifier: Apache-2.0
"""Backend ``native`` of the patch embedding on a processor: the numbers rule over dtypes, layouts
and geometries, and that it is what runs.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit import _native, reference
from fastvit.functional import patch_embed
from fastvit.testing import poisoned_allocations

pytestmark = pytest.mark.skipif(
    _native.reason() is not None, reason="needs the compiled module fastvit._C"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MEAN, STD = (0.485, 0.1, 0.406, 0.9), (0.229, 0.224, 1.0, 0.05)

native = partial(patch_embed, backend="native")


def problem(
    batch=2, channels=3, image=(32, 48), patch=(16, 16), width=48, dtype=torch.float32, *,
    layout=torch.contiguous_format, uint8=False, bias=True, positions=None, class_token=False,
) -> dict[str, object]:  # fmt: skip
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    patches = (image[0] // patch[0]) * (image[1] // patch[1])
    scale = (channels * patch[0] * patch[1]) ** -0.5
    p: dict[str, object] = {"weight": (torch.randn(width, channels, *patch) * scale).to(dtype)}
    if uint8:
        images = torch.randint(256, (batch, channels, *image), dtype=torch.uint8)
        p |= {"mean": MEAN[:channels], "std": STD[:channels]}
    else:
        images = draw(batch, channels, *image)
    p["images"] = images.contiguous(memory_format=layout)
    if bias:
        p["bias"] = draw(width)
    if positions is not None:
        p["pos_embed"] = draw(1, patches + (positions == "all"), width)
    if class_token:
        p["cls_token"] = draw(1, 1, width)
    return p


@pytest.fixture
def ran(monkeypatch):
    """The calls of the compiled module's functions, by name."""
    module, calls = _native.load(), []

    class Counting:
        def patch_rows(self, *args):
            calls.append("patch_rows")
            module.patch_rows(*args)

        def place_tokens(self, *args):
            calls.append("place_tokens")
            module.place_tokens(*args)

    monkeypatch.setattr(_native, "load", Counting)
    return calls


GEOMETRIES = {
    # batch, channels, image, patch, width
    "224, patch 16, 192 wide": (1, 3, (224, 224), (16, 16), 192),
    "518, patch 14": (1, 3, (518, 518), (14, 14), 16),
    "224, patch 14, 432 wide": (1, 1, (224, 224), (14, 14), 432),
    "32 x 48, patch 8, 768 wide": (3, 3, (32, 48), (8, 8), 768),
    "32 x 48, patch 16, 1000 wide": (3, 4, (32, 48), (16, 16), 1000),
    "256 x 64, patch 32": (3, 3, (256, 64), (32, 32), 64),
    "256 x 64, patch 16 x 8": (1, 4, (256, 64), (16, 8), 48),
    "empty batch": (0, 3, (32, 48), (16, 16), 192),
    "patch of one pixel": (2, 3, (4, 6), (1, 1), 16),
}


@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["planar", "channels_last"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_numbers_of_output_and_gradients(geometry, dtype, layout, uint8, ran, check_numbers):
    p = problem(*geometry, dtype, layout=layout, uint8=uint8, positions="all", class_token=True)
    check_numbers(native, reference.patch_embed, [p])
    assert ran == ["patch_rows", "place_tokens", "patch_rows"]


@pytest.mark.parametrize("weight_layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("batch", [1, 24])
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
def test_interleaved_rows_and_reordered_images(uint8, batch, weight_layout, ran, check_numbers):
    """Few images are reordered, many have the weight reordered, unless it is channels_last."""
    p = problem(batch, layout=torch.channels_last, uint8=uint8)
    p["weight"] = p["weight"].contiguous(memory_format=weight_layout)
    check_numbers(native, reference.patch_embed, [p])
    assert ran == ["patch_rows", "patch_rows"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("class_token", [True, False], ids=["class_token", "no_class_token"])
@pytest.mark.parametrize("positions", [None, "patches", "all"])
def test_every_set_of_arguments(positions, class_token, bias, uint8, dtype, ran, check_numbers):
    if positions == "all" and not class_token:
        pytest.skip("positions of a class token that is not there")
    p = problem(dtype=dtype, uint8=uint8, bias=bias, positions=positions, class_token=class_token)
    check_numbers(native, reference.patch_embed, [p])
    assert ran.count("patch_rows") == 2
    assert ran.count("place_tokens") == int(positions is not None or class_token)


@pytest.mark.parametrize("wanted", ["images", "weight", "bias", "pos_embed", "cls_token"])
def test_each_gradient_alone(wanted):
    p = problem(positions="all", class_token=True)
    p[wanted].requires_grad_()
    (actual,) = torch.autograd.grad(native(**p).square().sum(), p[wanted])
    (expected,) = torch.autograd.grad(reference.patch_embed(**p).square().sum(), p[wanted])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["planar", "channels_last"]
)
def test_every_gradient_for_bytes_in_float32_to_1e_5(layout, differentiate):
    """bfloat16 would not see a term of the mean that is missing."""
    p = problem(8, image=(64, 64), layout=layout, uint8=True, positions="all", class_token=True)
    doubles = {
        n: x.double() if isinstance(x, Tensor) and n != "images" else x for n, x in p.items()
    }
    actual = differentiate(native, p)
    expected = differentiate(reference.patch_embed, doubles)
    for name, x in expected.items():
        error = (actual[name].double() - x).abs().max() / x.abs().max()
        assert error < 1e-5, f"{name}: {error:.1e}"


VIEWS = {
    "expanded batch": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded pixels": lambda x: x[:, :, :1, :1].expand(-1, -1, 32, 32),
    "transposed": lambda x: x.transpose(2, 3),
    "every second column": lambda x: x[..., ::2],
    "crop": lambda x: x[:, :, 5:37, 3:35],
    "crop of channels_last": lambda x: x.contiguous(memory_format=torch.channels_last)[
        :, :, 5:37, 3:35
    ],
    "channels_last with a fourth channel": lambda x: torch.cat((x, x[:, :1]), 1).contiguous(
        memory_format=torch.channels_last
    )[:, :3],
}


@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view, uint8, differentiate):
    p = problem(image=(64, 64), uint8=uint8)
    p["images"] = view(p["images"])
    contiguous = {**p, "images": p["images"].contiguous()}
    actual, expected = differentiate(native, p), differentiate(native, contiguous)
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x)


@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_bit_by_bit_on_poisoned_memory(dtype, uint8, differentiate):
    p = problem(dtype=dtype, uint8=uint8, positions="all", class_token=True)
    first = differentiate(native, p)
    with poisoned_allocations():
        again = differentiate(native, p)
    for name, x in first.items():
        assert torch.equal(x, again[name]), name


def test_compiles_into_one_graph(ran, differentiate):
    p = problem(layout=torch.channels_last, uint8=True, positions="all", class_token=True)
    compiled = torch.compile(native, fullgraph=True, backend="aot_eager")
    actual, expected = differentiate(compiled, p), differentiate(native, p)
    for name, x in expected.items():
        assert torch.equal(actual[name], x), name
    assert ran.count("patch_rows") == 4


def test_it_is_what_auto_takes(ran):
    with torch.no_grad(), fastvit.backend("auto"):
        patch_embed(**problem())
    assert ran == ["patch_rows"]


def test_float64_runs_on_torch(ran):
    p = problem(dtype=torch.float64)
    patch_embed(**p, backend="auto")
    assert ran == []
    message = "the native kernels take float32, float16, bfloat16, and the weight is float64"
    with pytest.raises(RuntimeError, match=message):
        native(**p)


def test_a_missing_build_is_said_in_words(monkeypatch):
    monkeypatch.setattr(_native, "reason", lambda: "fastvit._C is not built")
    with pytest.raises(RuntimeError, match=r"'native' was asked for, but fastvit\._C is not built"):
        native(**problem())
    assert patch_embed(**problem(), backend="auto").shape == (2, 6, 48)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(dtype, ran):
    p = problem(positions="all", class_token=True)
    with torch.autocast("cpu", dtype):
        out = native(**p)
    assert out.dtype == dtype
    assert ran == ["patch_rows", "place_tokens"]
    rounded = {n: x.to(dtype) for n, x in p.items()}
    torch.testing.assert_close(out, native(**rounded))

# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the patch embedding where there is no GPU: their sources, compiled by the C++
compiler and run by the emulator of tests/emulator, which looks for races, unfinished copies and
accesses outside the tensors. The numbers rule, and every refusal of the binding.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import reference
from fastvit.testing import assert_agreement

ROOT = Path(__file__).resolve().parents[1]
NAN, INF = float("nan"), float("inf")
MEAN, STD = (0.485, 0.1, 0.406, 0.9), (0.229, 0.224, 1.0, 0.05)
TF32_FLOOR = 4 * 2.0**-10
KINDS = {
    "ieee": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
}
# Multiprocessors and bytes of shared memory, of a block and in all: they decide how many tiles are
# in flight, 3 and 4 on an H100, 2 and 4 on an A100, 3 of any on the rest.
H100 = (132, 227 * 1024, 228 * 1024)
DEVICES = {"sm_80": (108, 163 * 1024, 164 * 1024), "sm_89": (142, 99 * 1024, 100 * 1024)}

pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="csrc/ is not beside tests/"),
    pytest.mark.skipif(sys.platform != "linux", reason="macOS has given up ucontext"),
]

Numbers = Sequence[float] | None


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.full(tuple(shape), NAN, dtype=dtype)


class Kernels:
    """Calls the module with outputs full of NaN and no memory allowed but that of the tensors."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def _allow(self, *tensors: Tensor | None, writes: bool = False) -> None:
        """The bytes of the elements, and none between them."""
        for tensor in tensors:
            if tensor is None or tensor.numel() == 0:
                continue
            places = torch.zeros((), dtype=torch.int64)
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
                places = places[..., None] + torch.arange(size) * stride
            places = places.flatten().unique()
            breaks = (places.diff() != 1).nonzero().flatten() + 1
            for run in places.tensor_split(breaks):
                begin = tensor.data_ptr() + int(run[0]) * tensor.element_size()
                self.module.allow(begin, len(run) * tensor.element_size(), writes)

    def allow(self, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> None:
        self.module.clear_tensors()
        self._allow(*inputs)
        self._allow(*outputs, writes=True)

    def fold(
        self, weight: Tensor, bias: Tensor | None, mean: Numbers, std: Numbers, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        folded = poisoned((weight.shape[0], weight[0].numel()), weight.dtype)
        folded_bias = poisoned(weight.shape[:1], torch.float32)
        self.allow((weight, bias), (folded, folded_bias))
        self.module.fold_patch_weight(weight, bias, mean, std, interleaved, folded, folded_bias)
        return folded, folded_bias

    def forward(
        self,
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        pos_embed: Tensor | None = None,
        cls_token: Tensor | None = None,
        mean: Numbers = None,
        std: Numbers = None,
        interleaved: bool = False,
        tf32: bool = False,
        small: bool | None = True,
    ) -> Tensor:
        if images.dtype == torch.uint8:
            matrix, bias = self.fold(weight, bias, mean, std, interleaved)
        else:
            matrix = (weight.permute(0, 2, 3, 1) if interleaved else weight).flatten(1).contiguous()
        (D, _, ph, pw), (B, _, height, width) = weight.shape, images.shape
        tokens = (height // ph) * (width // pw) + (cls_token is not None)
        out = poisoned((B, tokens, D), weight.dtype)
        self.allow((images, matrix, bias, pos_embed, cls_token), (out,))
        self.module.patch_embed(
            images, matrix, bias, pos_embed, cls_token, mean, std, ph, pw, interleaved, tf32, out,
            small,
        )  # fmt: skip
        return out

    def weight_gradient(
        self,
        images: Tensor,
        grad: Tensor,
        patch: tuple[int, int],
        *,
        mean: Numbers = None,
        std: Numbers = None,
        interleaved: bool = False,
        tf32: bool = False,
        splits: int = 2,
    ) -> Tensor:
        C, D = images.shape[1], grad.shape[2]
        columns = C * patch[0] * patch[1]
        raw = images.dtype == torch.uint8
        dbias = grad.sum((0, 1), dtype=torch.float32) if raw else None
        partial = poisoned((splits, D, columns), torch.float32)
        dweight = poisoned((D, columns), grad.dtype)
        self.allow((images, grad, dbias), (partial, dweight))
        self.module.patch_weight_gradient(
            images, grad, mean, std, dbias, *patch, interleaved, tf32, partial, dweight
        )
        if interleaved:
            return dweight.view(D, *patch, C).permute(0, 3, 1, 2)
        return dweight.view(D, C, *patch)


@pytest.fixture
def kernels(emulated):
    module = emulated
    module.set_device(*H100)
    module.set_shuffle(0)
    conflicts = module.bank_conflicts()
    yield Kernels(module)
    assert module.bank_conflicts() == conflicts, "matrix loads met bank conflicts"


def double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def lay_out(images: Tensor, interleaved: bool) -> Tensor:
    return images.contiguous(
        memory_format=torch.channels_last if interleaved else torch.contiguous_format
    )


def draw_images(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(256, tuple(shape), dtype=dtype)
    return torch.randn(*shape).to(dtype)


def problem(
    batch=3, channels=3, image=(32, 24), patch=(16, 8), width=72, dtype=torch.float32, *,
    uint8=False, bias=True, positions="patches", class_token=True, interleaved=False,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of ``reference.patch_embed``."""
    patches = (image[0] // patch[0]) * (image[1] // patch[1])
    scale = (channels * patch[0] * patch[1]) ** -0.5
    images = draw_images((batch, channels, *image), torch.uint8 if uint8 else dtype)
    p: dict[str, Any] = {
        "images": lay_out(images, interleaved),
        "weight": (torch.randn(width, channels, *patch) * scale).to(dtype),
    }
    if uint8:
        p |= {"mean": MEAN[:channels], "std": STD[:channels]}
    if bias:
        p["bias"] = torch.randn(width).to(dtype)
    if positions:
        p["pos_embed"] = torch.randn(1, patches + (positions == "all"), width).to(dtype)
    if class_token:
        p["cls_token"] = torch.randn(1, 1, width).to(dtype)
    return p


def check_forward(kernels: Kernels, p: dict[str, Any], *, tf32=False, **options: Any) -> None:
    actual = kernels.forward(**p, tf32=tf32, **options)
    p = {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in p.items()}
    assert_agreement(
        actual,
        reference.patch_embed(**p).to(actual.dtype),
        reference.patch_embed(**{name: double(x) for name, x in p.items()}),
        floor=TF32_FLOOR if tf32 else 0.0,
    )


def reference_gradient(p: dict[str, Any], grad: Tensor, dtype: torch.dtype) -> Tensor:
    weight = p["weight"].to(dtype).requires_grad_()
    images = p["images"] if p["images"].dtype == torch.uint8 else p["images"].to(dtype)
    out = reference.patch_embed(images, weight, mean=p.get("mean"), std=p.get("std"))
    out.backward(grad.to(dtype))
    return weight.grad


def check_gradient(
    kernels: Kernels, p: dict[str, Any], grad: Tensor, *, tf32=False, limit=None, **options: Any
) -> None:
    actual = kernels.weight_gradient(
        p["images"], grad, p["weight"].shape[2:], mean=p.get("mean"), std=p.get("std"), tf32=tf32,
        **options,
    )  # fmt: skip
    expected = reference_gradient(p, grad, torch.float64)
    assert_agreement(
        actual,
        reference_gradient(p, grad, grad.dtype),
        expected,
        floor=TF32_FLOOR if tf32 else 0.0,
    )
    if limit is not None:
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert error <= limit


every_kind = pytest.mark.parametrize("kind", KINDS)
every_input = pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
every_layout = pytest.mark.parametrize(
    "interleaved", [False, True], ids=["planar", "channels_last"]
)
every_tile = pytest.mark.parametrize("small", [False, True], ids=["large", "small"])


# Forward


@every_tile
@every_layout
@every_input
@every_kind
def test_forward_of_every_dtype_and_layout(kernels, kind, uint8, interleaved, small):
    dtype, tf32 = KINDS[kind]
    p = problem(dtype=dtype, uint8=uint8, interleaved=interleaved, positions="all")
    check_forward(kernels, p, tf32=tf32, interleaved=interleaved, small=small)


# Of the lists of sizes each appears at least once, with whatever else.
GEOMETRIES = {
    "D=192, patch 8": {"width": 192, "patch": (8, 8), "image": (32, 48), "batch": 1},
    "D=384, patch 16": {"width": 384, "patch": (16, 16), "image": (32, 48), "batch": 1},
    "D=432": {"width": 432, "patch": (32, 32), "image": (256, 64), "batch": 1, "channels": 1},
    "D=768": {"width": 768, "patch": (16, 16), "image": (16, 48), "batch": 1, "channels": 4},
    "D=1000": {"width": 1000, "patch": (16, 8), "image": (16, 24), "channels": 1},
    "D=1024": {"width": 1024, "patch": (8, 8), "image": (16, 16), "channels": 1},
    "patch 14": {"width": 20, "patch": (14, 14), "image": (28, 42)},
    "patch 14, C=1": {"width": 20, "patch": (14, 14), "image": (28, 42), "channels": 1},
    "224², patch 32": {"width": 8, "patch": (32, 32), "image": (224, 224), "batch": 1},
    "224²": {"width": 8, "patch": (16, 16), "image": (224, 224), "batch": 1, "channels": 1},
    "patch 7": {"width": 36, "patch": (7, 7), "image": (14, 21)},
    "patch 1": {"width": 33, "patch": (1, 1), "image": (16, 9)},
    "patch 1, C=1": {"width": 3, "patch": (1, 1), "image": (16, 9), "channels": 1},
    "D=K=1": {"width": 1, "patch": (1, 1), "image": (1, 1), "batch": 1, "channels": 1},
    "patch 2 x 1, C=4": {"width": 12, "patch": (2, 1), "image": (8, 5), "channels": 4},
    "patch 5 x 6": {"width": 31, "patch": (5, 6), "image": (10, 18), "channels": 2},
    "a whole image": {"width": 24, "patch": (24, 40), "image": (24, 40), "channels": 1},
    "70 images": {"width": 16, "patch": (8, 8), "image": (8, 8), "batch": 70, "channels": 1},
    "batch 1": {"width": 40, "batch": 1},
    "C=4": {"width": 40, "channels": 4},
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_forward_of_every_geometry(kernels, name):
    # All kinds of numbers and layouts in turn; half of them where there is much to compute.
    turn = list(GEOMETRIES).index(name)
    for i, kind in enumerate(("bfloat16", "float16", "ieee", "tf32")):
        uint8, interleaved = bool((turn + i) & 1), bool((turn + i // 2) & 2)
        if i > 1 and GEOMETRIES[name]["width"] > 400:
            continue
        dtype, tf32 = KINDS[kind]
        p = problem(**GEOMETRIES[name], dtype=dtype, uint8=uint8, interleaved=interleaved)
        check_forward(kernels, p, tf32=tf32, interleaved=interleaved)


@pytest.mark.parametrize("width", [40, 41])
@pytest.mark.parametrize(
    ("positions", "class_token"),
    [(None, False), (None, True), ("patches", False), ("patches", True), ("all", True)],
)
@pytest.mark.parametrize("bias", [None, "own", "float32"])
def test_what_is_added_to_the_product(kernels, bias, positions, class_token, width):
    for dtype in (torch.bfloat16, torch.float32):
        p = problem(
            image=(12, 20), patch=(4, 4), width=width, channels=1, dtype=dtype, bias=bool(bias),
            positions=positions, class_token=class_token,
        )  # fmt: skip
        if bias == "float32":
            # Values that the other dtype holds: the reference has no other.
            p["bias"] = p["bias"].to(dtype)
            q = {**p, "bias": p["bias"].float()}
            actual = kernels.forward(**q)
            assert torch.equal(actual, kernels.forward(**p))
        else:
            check_forward(kernels, p)


@every_tile
def test_class_tokens_where_images_and_blocks_cross(kernels, small):
    """Blocks of several images, and images of several blocks."""
    for image in ((4, 6), (24, 36)):
        p = problem(batch=30 if image == (4, 6) else 2, channels=1, image=image, patch=(2, 2),
                    width=10, positions="all")  # fmt: skip
        check_forward(kernels, p, tf32=not small, small=small)


def test_a_float32_bias_is_not_rounded(kernels):
    p = problem(image=(4, 4), patch=(4, 4), channels=1, width=8, dtype=torch.bfloat16,
                positions=None, class_token=False)  # fmt: skip
    p["weight"].zero_()
    p["weight"][:, 0, 0, 0] = 1
    p["images"].fill_(-1)
    bias = torch.full((8,), 1 + 2.0**-16)
    assert (kernels.forward(**{**p, "bias": bias}) == 2.0**-16).all()


STRIDED = {
    "every second row": lambda x: x[:, :, ::2],
    "every second image": lambda x: x[::2],
    "a crop": lambda x: x[:, :, 3:, 8:],
    "a crop, misaligned": lambda x: x[:, :, 1:, 1:],
    "an expanded batch": lambda x: x[1:2].expand(4, -1, -1, -1),
    "some channels": lambda x: x[:, 1:3],
    "a row for all rows": lambda x: x[:, :, :1].expand(-1, -1, 32, -1),
    "an offset of one element": lambda x: (
        x.new_zeros(x.numel() + 1)[1:].as_strided(x.shape, x.stride()).copy_(x)
    ),
    "an offset of two elements": lambda x: (
        x.new_zeros(x.numel() + 2)[2:].as_strided(x.shape, x.stride()).copy_(x)
    ),
}


@every_layout
@every_input
@pytest.mark.parametrize("name", STRIDED)
def test_strided_images_are_read_where_they_lie(kernels, name, uint8, interleaved):
    if interleaved and name == "some channels":
        pytest.skip("pixels of a row then do not follow each other")
    for i, kind in enumerate(("bfloat16", "ieee")):
        dtype = KINDS[kind][0]
        images = draw_images((3, 4, 67, 49), torch.uint8 if uint8 else dtype)
        images = STRIDED[name](lay_out(images, interleaved))
        height, width = images.shape[2] // 16 * 16, images.shape[3] // 8 * 8
        images = images[..., :height, :width]
        p = problem(batch=images.shape[0], channels=images.shape[1], image=(height, width),
                    width=12, dtype=dtype, uint8=uint8)  # fmt: skip
        p["images"] = images
        check_forward(kernels, p, interleaved=interleaved)
        grad = torch.randn(images.shape[0], (height // 16) * (width // 8), 12).to(dtype)
        if i == 0:
            check_gradient(kernels, p, grad, interleaved=interleaved)


@pytest.mark.parametrize("wide", [1, 2, 3, 5, 8])
def test_patches_one_pixel_wide_may_have_any_stride(kernels, wide):
    images = torch.randn(2, 3, 8, 4 * wide)[..., ::wide]
    p = problem(batch=2, image=(8, 4), patch=(4, 1), width=9) | {"images": images}
    check_forward(kernels, p)
    images = torch.randn(2, 8, 4 * wide, 3)[:, :, ::wide].permute(0, 3, 1, 2)
    check_forward(kernels, p | {"images": images}, interleaved=True)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_misaligned_small_tensors(kernels, offset):
    for dtype in (torch.bfloat16, torch.float32):
        p = problem(image=(16, 16), dtype=dtype, width=36, positions="all")
        for name in ("weight", "bias", "pos_embed", "cls_token"):
            x = p[name]
            p[name] = x.new_zeros(x.numel() + offset)[offset:].view(x.shape).copy_(x)
        check_forward(kernels, p)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_misaligned_output(kernels, offset):
    p = problem(image=(16, 16), channels=1, width=36, bias=False, class_token=False,
                positions=None, dtype=torch.bfloat16)  # fmt: skip
    out = poisoned((3 * 2 * 36 + offset,), torch.bfloat16)[offset:].view(3, 2, 36)
    matrix = p["weight"].flatten(1)
    kernels.allow((p["images"], matrix), (out,))
    kernels.module.patch_embed(
        p["images"], matrix, None, None, None, None, None, 16, 8, False, False, out
    )
    assert torch.equal(out, kernels.forward(**p))


# The same bits


@every_input
@every_kind
def test_forward_bits_depend_neither_on_tile_nor_order_nor_device(kernels, kind, uint8):
    dtype, tf32 = KINDS[kind]
    p = problem(dtype=dtype, uint8=uint8, image=(32, 32), patch=(16, 16), batch=2)
    first = kernels.forward(**p, tf32=tf32)
    assert torch.equal(first, kernels.forward(**p, tf32=tf32))
    kernels.module.set_shuffle(1)
    assert torch.equal(first, kernels.forward(**p, tf32=tf32, small=False))
    for device in DEVICES.values():
        kernels.module.set_device(*device)
        assert torch.equal(first, kernels.forward(**p, tf32=tf32, small=False))
    assert torch.equal(first, kernels.forward(**p, tf32=tf32))
    # A token does not depend on the images beside its own.
    alone = {**p, "images": p["images"][1:]}
    assert torch.equal(first[1:], kernels.forward(**alone, tf32=tf32))


@pytest.mark.parametrize("kind", ["bfloat16", "tf32"])
def test_gradient_bits_depend_neither_on_order_nor_device(kernels, kind):
    dtype, tf32 = KINDS[kind]
    images, grad = draw_images((30, 3, 32, 24), torch.uint8), torch.randn(30, 6, 40).to(dtype)

    def run():
        return kernels.weight_gradient(
            images, grad, (16, 8), mean=MEAN[:3], std=STD[:3], tf32=tf32, splits=1
        )

    first = run()
    kernels.module.set_shuffle(1)
    assert torch.equal(first, run())
    kernels.module.set_device(*DEVICES["sm_89"])
    assert torch.equal(first, run())


def test_the_tile_is_chosen_by_the_size_of_the_problem(kernels):
    """Without an override; both give the same, so this only sees that either runs."""
    p = problem(image=(16, 16), channels=1, width=16, dtype=torch.bfloat16)
    expected = kernels.forward(**p)
    assert torch.equal(expected, kernels.forward(**p, small=None))
    kernels.module.set_device(0, *H100[1:])
    assert torch.equal(expected, kernels.forward(**p, small=None))


# The fold


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_fold_follows_the_formula(kernels, dtype, interleaved):
    weight, bias = torch.randn(5, 3, 10, 11).to(dtype), torch.randn(5).to(dtype)
    centre = 255 * torch.tensor(MEAN[:3], dtype=torch.float64).view(-1, 1, 1)
    scaled = weight.double() / (255 * torch.tensor(STD[:3], dtype=torch.float64).view(-1, 1, 1))
    # In float16 pixels count in units of 1 / 256.
    expected = scaled * (256 if dtype == torch.float16 else 1)
    terms = scaled * (centre.round() - centre)
    for b in (bias, None):
        folded, folded_bias = kernels.fold(weight, b, MEAN[:3], STD[:3], interleaved)
        order = expected.permute(0, 2, 3, 1) if interleaved else expected
        assert torch.equal(folded, order.flatten(1).float().to(dtype))
        wanted = terms.sum((1, 2, 3)) + (0 if b is None else b.double())
        torch.testing.assert_close(folded_bias.double(), wanted, rtol=2**-23, atol=1e-9)


def test_without_mean_and_std_pixels_are_divided_by_255(kernels):
    p = problem(uint8=True, dtype=torch.bfloat16, image=(16, 16))
    check_forward(kernels, p | {"mean": None, "std": None})


@every_layout
def test_128_channels_of_uint8(kernels, interleaved):
    p = problem(channels=128, image=(4, 6), patch=(2, 2), width=8, uint8=True)
    p["mean"] = [c / 256 for c in range(128)]
    p["std"] = [0.1 + c / 128 for c in range(128)]
    p["images"] = lay_out(p["images"], interleaved)
    check_forward(kernels, p, interleaved=interleaved)
    check_gradient(kernels, p, torch.randn(3, 6, 8), interleaved=interleaved)


# Backward


@every_layout
@every_input
@every_kind
def test_weight_gradient(kernels, kind, uint8, interleaved):
    dtype, tf32 = KINDS[kind]
    p = problem(dtype=dtype, uint8=uint8, interleaved=interleaved, batch=13, width=40)
    # Of the patch tokens behind the class token, as autograd hands it over.
    grad = torch.randn(13, 7, 40).to(dtype)[:, 1:]
    limit = 1e-5 if kind == "ieee" else None
    check_gradient(kernels, p, grad, tf32=tf32, interleaved=interleaved, splits=3, limit=limit)


GRADIENTS = {
    "one share": {"splits": 1},
    "a share for each patch": {"splits": 18},
    "shares without patches": {"splits": 11},
    "no class token": {"prefix": 0},
    "D not divisible by 4": {"width": 41},
    "D not divisible by 8": {"width": 42, "prefix": 0},
    "D = 1": {"width": 1},
    "several tiles": {"width": 136, "channels": 4, "batch": 1, "image": (16, 16), "splits": 1},
    "K = 1": {"channels": 1, "patch": (1, 1), "image": (4, 4)},
    "patch 14": {"patch": (14, 14), "image": (28, 42)},
    "patch 7, C=1": {"patch": (7, 7), "image": (14, 21), "channels": 1},
}


@every_input
@pytest.mark.parametrize("name", GRADIENTS)
def test_weight_gradient_of_every_geometry(kernels, name, uint8):
    options = {"width": 24, "splits": 2, "prefix": 1, **GRADIENTS[name]}
    splits, prefix = options.pop("splits"), options.pop("prefix")
    turn = list(GRADIENTS).index(name)
    for i, dtype in enumerate((torch.bfloat16, torch.float32)):
        interleaved = bool((turn + i) & 1)
        p = problem(**options, dtype=dtype, uint8=uint8, interleaved=interleaved)
        patches = p["pos_embed"].shape[1]
        grad = torch.randn(len(p["images"]), patches + prefix, options["width"])
        grad = grad.to(dtype)[:, prefix:]
        limit = 1e-5 if dtype == torch.float32 else None
        check_gradient(kernels, p, grad, interleaved=interleaved, splits=splits, limit=limit)


GRADS = {
    "expanded over the images": lambda g: g[:1].expand(3, -1, -1),
    "expanded over the tokens": lambda g: g[:, :1].expand(-1, 6, -1),
    "some outputs": lambda g: g[..., 1:],
    "an offset of one element": lambda g: (
        g.new_zeros(g.numel() + 1)[1:].view(g.shape).copy_(g)[:, :, :23]
    ),
    "tokens before images": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("name", GRADS)
def test_strided_gradients(kernels, name):
    for dtype in (torch.float16, torch.float32):
        grad = GRADS[name](torch.randn(3, 6, 24).to(dtype))
        p = problem(dtype=dtype, width=grad.shape[2])
        check_gradient(kernels, p, grad)


# Numbers that are none


@every_tile
@every_kind
def test_nan_and_inf_of_pixels_stay_in_their_patch(kernels, kind, small):
    dtype, tf32 = KINDS[kind]
    # Columns that leave a tail in the last tile.
    p = problem(dtype=dtype, image=(10, 18), patch=(5, 6), width=21, positions=None,
                class_token=False)  # fmt: skip
    clean = kernels.forward(**p, tf32=tf32, small=small)
    p["images"][0, 2, 9, 5], p["images"][2, 0, 0, 17] = NAN, INF
    out = kernels.forward(**p, tf32=tf32, small=small)
    changed = torch.zeros(3, 6, dtype=torch.bool)
    # Rows of patches are 3 long.
    changed[0, 3] = changed[2, 2] = True
    assert torch.equal(out[~changed], clean[~changed])
    assert out[0, 3].isnan().all()
    assert out[2, 2].isinf().all()


@every_tile
@every_input
@every_kind
def test_nan_and_inf_of_weights_stay_in_their_output(kernels, kind, uint8, small):
    dtype, tf32 = KINDS[kind]
    p = problem(dtype=dtype, uint8=uint8, image=(10, 18), patch=(5, 6), width=21, batch=1)
    clean = kernels.forward(**p, tf32=tf32, small=small)
    p["weight"][3, 2, 4, 5], p["weight"][20, 0, 0, 0] = NAN, INF
    out = kernels.forward(**p, tf32=tf32, small=small)
    rest = torch.ones(21, dtype=torch.bool)
    rest[3] = rest[20] = False
    assert torch.equal(out[..., rest], clean[..., rest])
    assert torch.equal(out[:, 0], clean[:, 0])
    assert out[:, 1:, 3].isnan().all()
    assert not out[:, 1:, 20].isfinite().any()


@every_input
@every_kind
def test_nan_and_inf_stay_in_their_part_of_the_gradient(kernels, kind, uint8):
    dtype, tf32 = KINDS[kind]
    images = draw_images((3, 3, 10, 18), torch.uint8 if uint8 else dtype)
    grad = torch.randn(3, 6, 21).to(dtype)
    numbers = {"mean": MEAN[:3], "std": STD[:3]} if uint8 else {}

    def run():
        return kernels.weight_gradient(images, grad, (5, 6), tf32=tf32, **numbers)

    clean = run()
    # The first of the second share, and the last of all.
    grad[1, 3, 2], grad[2, 5, 20] = NAN, INF
    rows = torch.ones(21, dtype=torch.bool)
    rows[2] = rows[20] = False
    dirty = run()
    assert torch.equal(dirty[rows], clean[rows])
    assert dirty[2].isnan().all()
    assert not dirty[20].isfinite().any()
    if uint8:
        return
    grad[1, 3, 2] = grad[2, 5, 20] = 1
    clean = run()
    images[0, 1, 4, 5] = INF
    dirty = run()
    at = torch.zeros(3, 5, 6, dtype=torch.bool)
    at[1, 4, 5] = True
    assert torch.equal(dirty[:, ~at], clean[:, ~at])
    assert not dirty[:, at].isfinite().any()


# Refusals


def forward_call() -> dict[str, Any]:
    p = problem(batch=2, image=(8, 12), patch=(4, 4), width=8)
    return {
        "images": p["images"], "weight": p["weight"].flatten(1), "bias": p["bias"],
        "pos_embed": p["pos_embed"], "cls_token": p["cls_token"], "mean": None, "std": None,
        "patch_height": 4, "patch_width": 4, "interleaved": False, "tf32": False,
        "out": poisoned((2, 7, 8), torch.float32),
    }  # fmt: skip


def uint8_call(**changes: Any) -> dict[str, Any]:
    images = draw_images((2, 3, 8, 12), torch.uint8)
    return {"images": images, "mean": MEAN[:3], "std": STD[:3], **changes}


def every_other(*shape: int) -> Tensor:
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


MANY = torch.zeros(1, 129, 4, 4, dtype=torch.uint8)
DOUBLE = torch.float64

FORWARD_REFUSALS = {
    "no tensor": ({"images": [1.0]}, TypeError, r"images: expected a torch.Tensor .*, got list"),
    "no memory": ({"images": torch.zeros(2, 3, 8, 12, device="meta")}, ValueError, "images: "),
    "rank of weight": (
        {"weight": torch.randn(8, 3, 4, 4)}, ValueError,
        r"weight: expected 2 dimensions, got shape \(8, 3, 4, 4\)",
    ),
    "stride of weight": (
        {"weight": every_other(8, 48)}, ValueError, "weight: expected a contiguous tensor",
    ),
    "dtype of weight": (
        {"weight": torch.randn(8, 48, dtype=DOUBLE)}, TypeError,
        "weight: expected float32 or float16 or bfloat16, got float64",
    ),
    "dtype of images": (
        {"images": torch.zeros(2, 3, 8, 12).half()}, TypeError,
        "images: expected float32 or uint8, got float16",
    ),
    "rank of images": (
        {"images": torch.randn(3, 8, 12)}, ValueError,
        r"images: expected 4 dimensions, got shape \(3, 8, 12\)",
    ),
    "patch of nothing": (
        {"patch_height": 0}, ValueError, "patch size: expected positive sides, got 0 x 4",
    ),
    "part of a patch": (
        {"patch_width": 5}, ValueError,
        "images: expected sides divisible by the patch size 4 x 5, got 8 x 12",
    ),
    "pixels apart": (
        {"images": every_other(2, 3, 8, 12)}, ValueError,
        r"images: expected the pixels of a row to follow each other .*any and 1.* got strides "
        r"\d+ and 2",
    ),
    "another layout": (
        {"interleaved": True}, ValueError,
        r"images: expected the pixels of a row to follow each other .*1 and 3.* got strides 96 and",
    ),
    "too many patches": (
        {"images": torch.zeros(1, 3, 1, 1).expand(2**31, -1, -1, -1), "patch_height": 1,
         "patch_width": 1}, ValueError,
        r"images: expected at most 2\^30 patches",
    ),
    "no images": (
        {"images": torch.zeros(0, 3, 8, 12)}, ValueError,
        "images: expected at least one patch with a channel, got none",
    ),
    "no channels": (
        {"images": torch.zeros(2, 0, 8, 12)}, ValueError, "images: expected at least one patch",
    ),
    "mean of floats": (
        {"mean": MEAN[:3], "std": STD[:3]}, ValueError,
        "mean, std: expected None for images that are not uint8, got numbers",
    ),
    "std of floats": ({"std": STD[:3]}, ValueError, "mean, std: expected None"),
    "too few means": (
        uint8_call(mean=[0.5]), ValueError,
        "mean: expected 3 values, one for each image channel of images, got 1",
    ),
    "std of 0": (
        uint8_call(std=[1.0, 0.0, 1.0]), ValueError,
        "std: expected values other than 0, got 0 for channel 1",
    ),
    "no std": (
        uint8_call(std=None), TypeError, "std: expected a sequence of numbers, got NoneType",
    ),
    "129 channels": (
        {"images": MANY, "mean": [0.5] * 129, "std": [1.0] * 129}, ValueError,
        "images: expected at most 128 channels of uint8 on a GPU, got 129",
    ),
    "columns of weight": (
        {"weight": torch.randn(8, 47)}, ValueError,
        r"weight: expected shape \(8, 48\), got \(8, 47\)",
    ),
    "shape of bias": (
        {"bias": torch.randn(7)}, ValueError, r"bias: expected shape \(8,\), got \(7,\)",
    ),
    "dtype of bias": (
        {"bias": torch.randn(8).half()}, TypeError, "bias: expected float32 like weight, got float",
    ),
    "stride of bias": ({"bias": every_other(8)}, ValueError, "bias: expected a contiguous tensor"),
    "shape of class": (
        {"cls_token": torch.randn(8)}, ValueError,
        r"cls_token: expected shape \(1, 1, 8\), got \(8,\)",
    ),
    "dtype of class": (
        {"cls_token": torch.randn(1, 1, 8, dtype=DOUBLE)}, TypeError,
        "cls_token: expected float32 like weight, got float64",
    ),
    "shape of positions": (
        {"pos_embed": torch.randn(1, 5, 8)}, ValueError,
        r"pos_embed: expected shape \(1, 6, 8\), got \(1, 5, 8\)",
    ),
    "a position without its token": (
        {"pos_embed": torch.randn(1, 7, 8), "cls_token": None}, ValueError,
        r"pos_embed: expected shape \(1, 6, 8\), got \(1, 7, 8\)",
    ),
    "dtype of positions": (
        {"pos_embed": torch.randn(1, 6, 8).bfloat16()}, TypeError,
        "pos_embed: expected float32 like weight, got bfloat16",
    ),
    "shape of out": (
        {"out": torch.zeros(2, 6, 8)}, ValueError,
        r"out: expected shape \(2, 7, 8\), got \(2, 6, 8\)",
    ),
    "dtype of out": (
        {"out": torch.zeros(2, 7, 8).half()}, TypeError, "out: expected float32 like weight",
    ),
    "stride of out": (
        {"out": every_other(2, 7, 8)}, ValueError, "out: expected a contiguous tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARD_REFUSALS)
def test_forward_refuses(kernels, name):
    changes, error, message = FORWARD_REFUSALS[name]
    with pytest.raises(error, match=message):
        kernels.module.patch_embed(**(forward_call() | changes))


def fold_call() -> dict[str, Any]:
    return {
        "weight": torch.randn(8, 3, 4, 4), "bias": torch.randn(8), "mean": MEAN[:3],
        "std": STD[:3], "interleaved": False, "folded": torch.zeros(8, 48),
        "folded_bias": torch.zeros(8),
    }  # fmt: skip


FOLD_REFUSALS = {
    "rank of weight": ({"weight": torch.randn(8, 48)}, ValueError, "weight: expected 4 dimensions"),
    "stride of weight": (
        {"weight": every_other(8, 3, 4, 4)}, ValueError, "weight: expected a contiguous tensor",
    ),
    "dtype of weight": (
        {"weight": torch.randn(8, 3, 4, 4, dtype=DOUBLE)}, TypeError,
        "weight: expected float32 or float16 or bfloat16, got float64",
    ),
    "too few means": (
        {"mean": [0.5]}, ValueError,
        "mean: expected 3 values, one for each image channel of weight, got 1",
    ),
    "no mean": ({"mean": None}, TypeError, "mean: expected a sequence of numbers, got NoneType"),
    "std of 0": ({"std": [0.0] * 3}, ValueError, "std: expected values other than 0"),
    "129 channels": (
        {"weight": torch.zeros(8, 129, 1, 1), "mean": [0.5] * 129, "std": [1.0] * 129}, ValueError,
        "weight: expected at most 128 channels of uint8 on a GPU, got 129",
    ),
    "shape of bias": ({"bias": torch.randn(7)}, ValueError, r"bias: expected shape \(8,\)"),
    "dtype of bias": (
        {"bias": torch.randn(8).half()}, TypeError, "bias: expected float32 like weight",
    ),
    "shape of folded": (
        {"folded": torch.zeros(8, 3, 4, 4)}, ValueError, r"folded: expected shape \(8, 48\)",
    ),
    "dtype of folded": (
        {"folded": torch.zeros(8, 48).half()}, TypeError, "folded: expected float32 like weight",
    ),
    "stride of folded": (
        {"folded": every_other(8, 48)}, ValueError, "folded: expected a contiguous tensor",
    ),
    "shape of folded_bias": (
        {"folded_bias": torch.zeros(9)}, ValueError, r"folded_bias: expected shape \(8,\)",
    ),
    "dtype of folded_bias": (
        {"folded_bias": torch.zeros(8).half()}, TypeError,
        "folded_bias: expected float32, got float16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLD_REFUSALS)
def test_fold_refuses(kernels, name):
    changes, error, message = FOLD_REFUSALS[name]
    with pytest.raises(error, match=message):
        kernels.module.fold_patch_weight(**(fold_call() | changes))


def gradient_call() -> dict[str, Any]:
    return {
        "images": torch.randn(2, 3, 8, 12), "grad": torch.randn(2, 6, 8), "mean": None,
        "std": None, "dbias": None, "patch_height": 4, "patch_width": 4, "interleaved": False,
        "tf32": False, "partial": torch.zeros(2, 8, 48), "dweight": torch.zeros(8, 48),
    }  # fmt: skip


GRADIENT_REFUSALS = {
    "dtype of grad": (
        {"grad": torch.randn(2, 6, 8, dtype=DOUBLE)}, TypeError,
        "grad: expected float32 or float16 or bfloat16, got float64",
    ),
    "dtype of images": (
        {"images": torch.randn(2, 3, 8, 12).half()}, TypeError,
        "images: expected float32 or uint8, got float16",
    ),
    "rank of grad": ({"grad": torch.randn(12, 8)}, ValueError, "grad: expected 3 dimensions"),
    "shape of grad": (
        {"grad": torch.randn(2, 7, 8)}, ValueError,
        r"grad: expected shape \(2, 6, 8\), got \(2, 7, 8\)",
    ),
    "stride of grad": (
        {"grad": every_other(2, 6, 8)}, ValueError,
        "grad: expected contiguous rows, got a stride of 2",
    ),
    "an expanded row": (
        {"grad": torch.randn(2, 6, 1).expand(-1, -1, 8)}, ValueError,
        "grad: expected contiguous rows, got a stride of 0",
    ),
    "part of a patch": ({"patch_width": 5}, ValueError, "images: expected sides divisible"),
    "no images": (
        {"images": torch.zeros(0, 3, 8, 12)}, ValueError, "images: expected at least one patch",
    ),
    "mean of floats": ({"mean": MEAN[:3], "std": STD[:3]}, ValueError, "mean, std: expected None"),
    "dbias of floats": (
        {"dbias": torch.zeros(8)}, ValueError,
        "dbias: expected None, since the images are not uint8",
    ),
    "no dbias": (
        uint8_call(), ValueError, "dbias: expected a tensor, since the images are uint8",
    ),
    "dtype of dbias": (
        uint8_call(dbias=torch.zeros(8).half()), TypeError, "dbias: expected float32, got float16",
    ),
    "shape of dbias": (
        uint8_call(dbias=torch.zeros(7)), ValueError, r"dbias: expected shape \(8,\), got \(7,\)",
    ),
    "129 channels": (
        {"images": MANY, "mean": [0.5] * 129, "std": [1.0] * 129, "dbias": torch.zeros(8)},
        ValueError, "images: expected at most 128 channels of uint8 on a GPU, got 129",
    ),
    "rank of partial": (
        {"partial": torch.zeros(8, 48)}, ValueError, "partial: expected 3 dimensions",
    ),
    "shape of partial": (
        {"partial": torch.zeros(2, 8, 47)}, ValueError,
        r"partial: expected shape \(2, 8, 48\), got \(2, 8, 47\)",
    ),
    "dtype of partial": (
        {"partial": torch.zeros(2, 8, 48).half()}, TypeError, "partial: expected float32, got",
    ),
    "no share": (
        {"partial": torch.zeros(0, 8, 48)}, ValueError,
        "partial: expected 1 to 12 shares, got 0",
    ),
    "too many shares": (
        {"partial": torch.zeros(13, 8, 48)}, ValueError,
        "partial: expected 1 to 12 shares, got 13",
    ),
    "shape of dweight": (
        {"dweight": torch.zeros(8, 3, 4, 4)}, ValueError, r"dweight: expected shape \(8, 48\)",
    ),
    "dtype of dweight": (
        {"dweight": torch.zeros(8, 48).half()}, TypeError, "dweight: expected float32 like grad",
    ),
    "stride of dweight": (
        {"dweight": every_other(8, 48)}, ValueError, "dweight: expected a contiguous tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADIENT_REFUSALS)
def test_weight_gradient_refuses(kernels, name):
    changes, error, message = GRADIENT_REFUSALS[name]
    with pytest.raises(error, match=message):
        kernels.module.patch_weight_gradient(**(gradient_call() | changes))


def test_no_outputs_launch_nothing(kernels):
    out = torch.zeros(2, 7, 0)
    rest = {"weight": torch.zeros(0, 48), "bias": torch.zeros(0), "pos_embed": None}
    kernels.module.patch_embed(
        **(forward_call() | rest | {"cls_token": torch.zeros(1, 1, 0), "out": out})
    )
    empty = {"grad": torch.zeros(2, 6, 0), "partial": torch.zeros(2, 0, 48)}
    kernels.module.patch_weight_gradient(
        **(gradient_call() | empty | {"dweight": torch.zeros(0, 48)})
    )

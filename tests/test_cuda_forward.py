# SPDX-License-Identifier: Apache-2.0
"""The forward CUDA kernel and the fold of the weights where there is no GPU: their sources,
compiled by the C++ compiler and run by the emulator of tests/emulator, which looks for races,
unfinished copies and accesses outside the tensors.
"""

from __future__ import annotations

import pytest
import torch
from cuda_kernels import (
    DEVICES,
    H100,
    INF,
    KINDS,
    MEAN,
    NAN,
    STD,
    check_forward,
    check_gradient,
    draw_images,
    every_input,
    every_kind,
    every_layout,
    every_tile,
    lay_out,
    poisoned,
    problem,
)

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

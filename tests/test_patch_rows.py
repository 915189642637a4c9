# SPDX-License-Identifier: Apache-2.0
"""The compiled module's rows of patches, against PyTorch's operators."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastvit import _native
from fastvit.reference import normalize_images

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MEANS, STDS = [0.485, 0.1, 0.3, 0.0], [0.229, 0.224, 1.0, 0.05]

GEOMETRIES = {
    # batch, channels, image, patch
    "patch 8": (2, 3, (16, 40), (8, 8)),
    "patch 14": (1, 3, (42, 28), (14, 14)),
    "patch 16": (2, 3, (32, 48), (16, 16)),
    "patch 32": (1, 4, (64, 32), (32, 32)),
    "patch 16x8": (3, 3, (32, 24), (16, 8)),
    "one pixel": (2, 3, (3, 5), (1, 1)),
    "one pixel wide": (2, 3, (8, 5), (4, 1)),
    "one pixel high": (2, 4, (3, 21), (1, 7)),
    "grey": (2, 1, (28, 28), (7, 14)),
    "one patch": (1, 3, (6, 10), (6, 10)),
    "no images": (0, 3, (16, 16), (8, 8)),
    "no channels": (2, 0, (16, 16), (8, 8)),
    "no patches": (2, 3, (0, 16), (8, 8)),
}


@pytest.fixture(scope="module")
def native():
    return _native.load()


def draw(batch, channels, image, dtype):
    if dtype == torch.uint8:
        return torch.randint(256, (batch, channels, *image), dtype=dtype)
    return torch.randn(batch, channels, *image).to(dtype)


def empty_rows(images, patch, dtype):
    """Rows full of NaN, which a forgotten element would keep."""
    B, C, H, W = images.shape
    patches = (H // patch[0]) * (W // patch[1])
    return torch.full((B, patches, C * patch[0] * patch[1]), float("nan"), dtype=dtype)


def gather(native, images, patch, interleaved, dtype, mean=None, std=None, threads=1):
    rows = empty_rows(images, patch, dtype)
    native.patch_rows(images, *patch, interleaved, mean, std, rows, threads)
    return rows


def expected_rows(images, patch, interleaved, dtype, mean=None, std=None):
    """The same by PyTorch's operators, with the arithmetic of the reference."""
    x = normalize_images(images, mean, std, dtype)
    B, C, H, W = x.shape
    (ph, pw), grid = patch, (H // patch[0], W // patch[1])
    x = x.contiguous().view(B, C, grid[0], ph, grid[1], pw)
    order = (0, 2, 4, 3, 5, 1) if interleaved else (0, 2, 4, 1, 3, 5)
    return x.permute(order).reshape(B, grid[0] * grid[1], C * ph * pw)


def same_bits(actual, expected):
    """Equal also in the sign of zero and where there are NaNs."""
    integer = {4: torch.int32, 2: torch.int16}[actual.element_size()]
    return torch.equal(actual.view(integer), expected.view(integer))


# (how the images lie in memory, whether their rows are read interleaved)
STRIDED = {
    "expanded batch": (lambda x: x[:1].expand(3, -1, -1, -1), False),
    "expanded channels": (lambda x: x[:, :1].expand(-1, 3, -1, -1), False),
    "flipped channel order": (lambda x: x.transpose(0, 1), False),
    "every second row": (lambda x: x[:, :, ::2], False),
    "crop": (lambda x: x[:, :, 5:21, 3:27], False),
    "crop of channels_last": (
        lambda x: x.contiguous(memory_format=torch.channels_last)[:, :, 5:21, 3:27],
        True,
    ),
    "expanded rows of channels_last": (
        lambda x: x.contiguous(memory_format=torch.channels_last)[:, :, :1].expand(-1, -1, 16, -1),
        True,
    ),
}


class TestPatchRows:
    @pytest.mark.parametrize("interleaved", [False, True], ids=["planar", "interleaved"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
    def test_floats_are_copied_and_bytes_normalised_bit_for_bit(
        self, native, geometry, dtype, interleaved
    ):
        *shape, patch = geometry
        layout = torch.channels_last if interleaved else torch.contiguous_format
        mean, std = MEANS[: shape[1]], STDS[: shape[1]]
        images = draw(*shape, dtype).contiguous(memory_format=layout)
        pixels = draw(*shape, torch.uint8).contiguous(memory_format=layout)
        for x, statistics in [(images, ()), (pixels, ()), (pixels, (mean, std))]:
            actual = gather(native, x, patch, interleaved, dtype, *statistics)
            assert same_bits(actual, expected_rows(x, patch, interleaved, dtype, *statistics))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("statistics", [(), (MEANS[:3], STDS[:3])], ids=["none", "mean_std"])
    def test_every_value_of_a_pixel(self, native, dtype, statistics):
        pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
        actual = gather(native, pixels, (16, 16), False, dtype, *statistics)
        expected = normalize_images(pixels, *(statistics or (None, None)), dtype)
        assert same_bits(actual, expected.view(1, 1, -1))

    @pytest.mark.parametrize("interleaved", [False, True], ids=["planar", "interleaved"])
    def test_every_value_in_bfloat16_whatever_the_statistics(self, native, interleaved):
        """Arithmetic stands for the table where it gives its bits, and there alone."""
        layout = torch.channels_last if interleaved else torch.contiguous_format
        pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 8, 32).repeat(1, 3, 1, 1)
        pixels = pixels.contiguous(memory_format=layout)
        drawn = (torch.rand(100, 6) * 2).tolist()
        extreme = [[0.5] * 6, [0.0, 0.0, 0.0, 1e-39, -1e-3, 1e30], [float("inf"), 0, 1, 1, 1, 1]]
        for *mean, a, b, c in drawn + extreme:
            for patch in ((8, 16), (4, 32)):
                statistics = (mean, (a or 1.0, b, c))
                actual = gather(native, pixels, patch, interleaved, torch.bfloat16, *statistics)
                expected = expected_rows(pixels, patch, interleaved, torch.bfloat16, *statistics)
                assert same_bits(actual, expected), statistics

    @pytest.mark.parametrize("offset", [1, 2, 3, 5])
    @pytest.mark.parametrize("width", [16, 48])
    def test_bytes_to_bfloat16_at_any_offset(self, native, width, offset):
        images = draw(1, 1, (1, 2 * 3 * 16 * 96 + offset), torch.uint8).flatten()[offset:]
        images = images.view(2, 3, 16, 96)
        memory = torch.full((images.numel() + offset,), float("nan"), dtype=torch.bfloat16)
        rows = memory[offset:].view(2, -1, 3 * 8 * width)
        native.patch_rows(images, 8, width, False, MEANS[:3], STDS[:3], rows, 1)
        expected = expected_rows(images, (8, width), False, torch.bfloat16, MEANS[:3], STDS[:3])
        assert same_bits(rows.contiguous(), expected)
        assert memory[:offset].isnan().all()

    def test_nan_inf_and_zero_keep_their_bits(self, native):
        bits = torch.tensor([0x7FC12345, 0x7F800000, -0x800000, -0x80000000], dtype=torch.int32)
        images = bits.view(torch.float32).view(1, 1, 1, 4)
        assert torch.equal(
            gather(native, images, (1, 4), False, torch.float32).view(torch.int32).flatten(), bits
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8], ids=str)
    @pytest.mark.parametrize(("view", "interleaved"), STRIDED.values(), ids=STRIDED)
    def test_strided_and_misaligned_images(self, native, view, interleaved, dtype):
        images = view(draw(3, 3, (32, 40), dtype))
        out = torch.float32 if dtype == torch.uint8 else dtype
        actual = gather(native, images, (8, 4), interleaved, out)
        assert same_bits(actual, expected_rows(images, (8, 4), interleaved, out))

    @pytest.mark.parametrize("offset", [1, 2, 3, 5])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.uint8], ids=str)
    def test_any_storage_offset(self, native, dtype, offset):
        images = draw(1, 1, (1, 2 * 3 * 16 * 28 + offset), dtype).flatten()[offset:]
        images = images.view(2, 3, 16, 28)
        out = torch.float16 if dtype == torch.uint8 else dtype
        memory = torch.full((2 * 2 * 3 * 8 * 28 + offset,), float("nan"), dtype=out)
        rows = memory[offset:].view(2, 2, -1)
        native.patch_rows(images, 8, 28, False, None, None, rows, 1)
        assert same_bits(rows.contiguous(), expected_rows(images, (8, 28), False, out))
        assert memory[:offset].isnan().all()

    @pytest.mark.parametrize("interleaved", [False, True], ids=["planar", "interleaved"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
    def test_any_number_of_threads_gives_the_same(self, native, dtype, interleaved):
        """3 MB of rows: enough for six."""
        layout = torch.channels_last if interleaved else torch.contiguous_format
        images = draw(5, 3, (224, 224), dtype).contiguous(memory_format=layout)
        expected = expected_rows(images, (16, 16), interleaved, torch.float32)
        for threads in (-1, 0, 1, 2, 3, 5, 64):
            actual = gather(native, images, (16, 16), interleaved, torch.float32, threads=threads)
            assert same_bits(actual, expected), threads

    def test_from_several_threads_at_once(self, native):
        images = draw(4, 3, (224, 224), torch.float32)
        expected = expected_rows(images, (16, 16), False, torch.float32)

        def run(_):
            return gather(native, images, (16, 16), False, torch.float32, threads=2)

        with ThreadPoolExecutor(4) as pool:
            assert all(same_bits(rows, expected) for rows in pool.map(run, range(12)))

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:This process")
    def test_in_a_forked_process(self, native):
        images = draw(8, 3, (224, 224), torch.float32)
        expected = gather(native, images, (16, 16), False, torch.float32, threads=4)
        rows = empty_rows(images, (16, 16), torch.float32)
        child = os.fork()
        if child == 0:
            # The threads did not come along; PyTorch's workers ask for one, too.
            native.patch_rows(images, 16, 16, False, None, None, rows, 1)
            same = memoryview(rows.numpy()).tobytes() == memoryview(expected.numpy()).tobytes()
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def fake(*shape, device):
    with FakeTensorMode():
        return torch.empty(*shape, device=device)


ROWS = torch.zeros(2, 6, 96)

# What replaces one of the arguments of a good call, the exception, and the whole of its message.
BAD_CALLS = {
    "no tensor": (
        {"images": [1.0]},
        TypeError,
        "images: expected a torch.Tensor (of torch 2.11 or later), got list",
    ),
    "dtype of the rows": (
        {"rows": ROWS.double()},
        TypeError,
        "rows: expected float32 or float16 or bfloat16, got float64",
    ),
    "dtype of the images": (
        {"images": torch.zeros(2, 3, 16, 12, dtype=torch.int32)},
        TypeError,
        "images: expected float32 or uint8, got int32",
    ),
    "mixed dtypes": (
        {"rows": ROWS.bfloat16()},
        TypeError,
        "images: expected bfloat16 or uint8, got float32",
    ),
    "images on a GPU": (
        {"images": fake(0, 3, 16, 12, device="cuda")},
        ValueError,
        "images: expected a tensor on cpu, got cuda:0",
    ),
    "rows on a GPU": (
        {"rows": fake(0, 6, 96, device="cuda")},
        ValueError,
        "rows: expected a tensor on cpu, got cuda:0",
    ),
    "rank": (
        {"images": torch.zeros(3, 16, 12)},
        ValueError,
        "images: expected 4 dimensions, got shape (3, 16, 12)",
    ),
    "patch of no pixels": (
        {"patch_width": 0},
        ValueError,
        "patch size: expected positive sides, got 8 x 0",
    ),
    "sides": (
        {"patch_height": 5},
        ValueError,
        "images: expected sides divisible by the patch size 5 x 4, got 16 x 12",
    ),
    "planar read of channels_last": (
        {"images": torch.zeros(2, 3, 16, 12).to(memory_format=torch.channels_last)},
        ValueError,
        "images: expected the pixels of a row to follow each other (strides of channels and "
        "columns any and 1), got strides 1 and 3",
    ),
    "interleaved read of contiguous": (
        {"interleaved": True},
        ValueError,
        "images: expected the pixels of a row to follow each other (strides of channels and "
        "columns 1 and 3), got strides 192 and 1",
    ),
    "patches beyond 31 bits": (
        {"images": torch.zeros(1).expand(1 << 20, 1, 64, 64), "patch_height": 1, "patch_width": 1},
        ValueError,
        "images: expected at most 2^30 patches in all and elements in each",
    ),
    "shape of the rows": (
        {"rows": torch.zeros(2, 96, 6)},
        ValueError,
        "rows: expected shape (2, 6, 96), got (2, 96, 6)",
    ),
    "strided rows": (
        {"rows": torch.zeros(2, 6, 192)[..., ::2]},
        ValueError,
        "rows: expected a contiguous tensor, got shape (2, 6, 96) with strides (1152, 192, 2)",
    ),
    "statistics of floats": (
        {"mean": MEANS[:3], "std": STDS[:3]},
        ValueError,
        "mean, std: expected None for floating images, got values",
    ),
    "count of means": (
        {"images": torch.zeros(2, 3, 16, 12, dtype=torch.uint8), "mean": [0.5], "std": [1.0] * 3},
        ValueError,
        "mean: expected 3 values, one for each image channel of images, got 1",
    ),
    "mean alone": (
        {"images": torch.zeros(2, 3, 16, 12, dtype=torch.uint8), "mean": MEANS[:3]},
        TypeError,
        "std: expected a sequence of numbers, got NoneType",
    ),
    "std of zero": (
        {
            "images": torch.zeros(2, 3, 16, 12, dtype=torch.uint8),
            "mean": MEANS[:3],
            "std": [1.0, 0.0, 1.0],
        },
        ValueError,
        "std: expected values other than 0, got 0 for channel 1",
    ),
}


@pytest.mark.parametrize(("wrong", "exception", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_arguments_are_named_before_anything_is_written(native, wrong, exception, message):
    rows = torch.full_like(ROWS, -1)
    good = {
        "images": torch.zeros(2, 3, 16, 12), "patch_height": 8, "patch_width": 4,
        "interleaved": False, "mean": None, "std": None, "rows": rows, "threads": 1,
    }  # fmt: skip
    with pytest.raises(exception) as error:
        native.patch_rows(**{**good, **wrong})
    assert str(error.value) == message
    assert (rows == -1).all()

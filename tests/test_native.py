# SPDX-License-Identifier: Apache-2.0
"""The compiled module: the view of a tensor with its checks, the uint8 fold, and the loader."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastvit
from fastvit import _native

NAN = float("nan")


@pytest.fixture(scope="module")
def native():
    return _native.load()


def image_statistics(channels):
    """Plausible means and standard deviations; 255 * 0.1 and 255 * 0.3 end in a half."""
    means, stds = [0.485, 0.1, 0.3, 0.0], [0.229, 0.224, 0.225, 1.0]
    return [means[c % 4] for c in range(channels)], [stds[c % 4] for c in range(channels)]


def random_case(shape, dtype, *, bias=True):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(shape[0], generator=generator, dtype=torch.float64).to(dtype)
    return weight, b if bias else None


def fold(native, weight, bias, mean, std):
    """Call the module with outputs full of NaN, which a forgotten element would keep."""
    out_weight = torch.full_like(weight, NAN)
    out_bias = torch.full((weight.shape[0],), NAN, dtype=weight.dtype, device=weight.device)
    native.fold_uint8(weight, bias, mean, std, out_weight, out_bias)
    return out_weight, out_bias


def fold_float64(weight, bias, mean, std):
    """The formula, in float64; also the sum of the magnitudes that the bias is made of."""
    center = 255 * torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1)
    scale = 255 * torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
    folded = weight.double().cpu() / scale
    terms = folded * (center.round() - center)
    b = torch.zeros(weight.shape[0], dtype=torch.float64) if bias is None else bias.double().cpu()
    return folded, b + terms.sum((1, 2, 3)), b.abs() + terms.abs().sum((1, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((33, 3, 16, 16), id="a whole number of vectors"),
        pytest.param((7, 4, 5, 3), id="rows of 15, shorter than a block of threads"),
        pytest.param((2, 1, 19, 17), id="rows of 323, longer than a block of threads"),
        pytest.param((1, 1, 1, 1), id="one pixel"),
        pytest.param((0, 3, 4, 4), id="no outputs"),
        pytest.param((3, 0, 4, 4), id="no channels"),
    ],
)
def test_fold_follows_the_formula(native, shape, bias, dtype):
    mean, std = image_statistics(shape[1])
    weight, b = random_case(shape, dtype, bias=bias)

    out_weight, out_bias = (t.double().cpu() for t in fold(native, weight, b, mean, std))

    expected_weight, expected_bias, magnitude = fold_float64(weight, b, mean, std)
    eps = torch.finfo(dtype).eps
    # Scaled once by a rounded reciprocal: in float64 that is a second rounding.
    torch.testing.assert_close(out_weight, expected_weight, rtol=1.5 * eps, atol=0)
    # Summed in double, rounded once to dtype; the double sum of n terms is within n ulps.
    terms = 1 + expected_weight[:1].numel()
    allowed = eps * expected_bias.abs() + terms * torch.finfo(torch.float64).eps * magnitude
    assert ((out_bias - expected_bias).abs() <= allowed).all()


def test_folded_weights_take_raw_pixels(native):
    """What the fold is for: W' (u - c) + b' equals the convolution of the normalised image."""
    mean, std = image_statistics(3)
    weight, bias = random_case((5, 3, 4, 4), torch.float64)
    pixels = torch.randint(0, 256, (2, 3, 8, 12), generator=torch.Generator().manual_seed(1))
    column = {
        name: torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)
        for name, values in [("mean", mean), ("std", std), ("c", [round(255 * m) for m in mean])]
    }

    folded, folded_bias = fold(native, weight, bias, mean, std)

    normalised = (pixels.double() / 255 - column["mean"]) / column["std"]
    expected = torch.nn.functional.conv2d(normalised, weight, bias, stride=4)
    actual = torch.nn.functional.conv2d(pixels - column["c"], folded, folded_bias, stride=4)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_fold_is_bitwise_repeatable_also_across_threads(native):
    mean, std = image_statistics(3)
    weight, bias = random_case((65, 3, 14, 14), torch.float32)
    first = fold(native, weight, bias, mean, std)
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda _: fold(native, weight, bias, mean, std), range(8)))
    for result in again:
        assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))


def test_nan_and_inf_stay_in_their_output(native):
    mean, std = image_statistics(3)
    weight, bias = random_case((4, 3, 5, 5), torch.float32)
    clean_weight, clean_bias = fold(native, weight, bias, mean, std)
    weight[1, 0, 2, 2], weight[2, 0, 0, 0] = NAN, float("inf")

    out_weight, out_bias = fold(native, weight, bias, mean, std)

    assert out_weight[1, 0, 2, 2].isnan()
    assert out_weight[2, 0, 0, 0].isinf()
    assert out_bias.isfinite().tolist() == [True, False, False, True]
    assert torch.equal(out_weight[[0, 3]], clean_weight[[0, 3]])
    assert torch.equal(out_bias[[0, 3]], clean_bias[[0, 3]])


def fake(*shape, device="cpu"):
    with FakeTensorMode():
        return torch.empty(*shape, device=device)


def misaligned(*shape):
    floats = torch.Size(shape).numel()
    memory = bytearray(4 * floats + 1)
    return torch.frombuffer(memory, dtype=torch.float32, count=floats, offset=1).view(shape)


# What replaces one of the arguments of a good call, the exception, and the whole of its message.
BAD_CALLS = {
    "no tensor": (
        {"weight": [1.0]},
        TypeError,
        "weight: expected a torch.Tensor (of torch 2.11 or later), got list",
    ),
    "NumPy array": (
        {"weight": torch.ones(5, 3, 4, 2).numpy()},
        TypeError,
        "weight: expected a torch.Tensor (of torch 2.11 or later), got ndarray",
    ),
    "dtype": (
        {"weight": torch.ones(5, 3, 4, 2, dtype=torch.bfloat16)},
        TypeError,
        "weight: expected float32 or float64, got bfloat16",
    ),
    "mixed dtypes": (
        {"bias": torch.ones(5, dtype=torch.float64)},
        TypeError,
        "bias: expected float32 like weight, got float64",
    ),
    "integer output": (
        {"out_bias": torch.ones(5, dtype=torch.int32)},
        TypeError,
        "out_bias: expected float32 like weight, got int32",
    ),
    "rank": (
        {"weight": torch.ones(5, 3, 8)},
        ValueError,
        "weight: expected 4 dimensions, got shape (5, 3, 8)",
    ),
    "too many dimensions": (
        {"weight": torch.ones([1] * 9)},
        ValueError,
        "weight: expected at most 8 dimensions, got 9",
    ),
    "shape": (
        {"out_weight": torch.ones(5, 3, 2, 4)},
        ValueError,
        "out_weight: expected shape (5, 3, 4, 2), got (5, 3, 2, 4)",
    ),
    "shape of another rank": (
        {"out_bias": torch.ones(1, 5)},
        ValueError,
        "out_bias: expected shape (5,), got (1, 5)",
    ),
    "not contiguous": (
        {"weight": torch.ones(5, 3, 2, 4).transpose(2, 3)},
        ValueError,
        "weight: expected a contiguous tensor, got shape (5, 3, 4, 2) with strides (24, 8, 1, 4)",
    ),
    "strided bias": (
        {"bias": torch.ones(10)[::2]},
        ValueError,
        "bias: expected a contiguous tensor, got shape (5,) with strides (2,)",
    ),
    "expanded output": (
        {"out_bias": torch.ones(1).expand(5)},
        ValueError,
        "out_bias: expected a contiguous tensor, got shape (5,) with strides (0,)",
    ),
    "misaligned memory": (
        {"weight": misaligned(5, 3, 4, 2)},
        ValueError,
        "weight: expected memory aligned to its 4-byte elements, got a misaligned address",
    ),
    "meta": (
        {"weight": torch.ones(5, 3, 4, 2, device="meta")},
        ValueError,
        'weight: expected a dense tensor with memory behind it, got "Cannot pack tensors on meta" '
        "from its framework",
    ),
    "fake": (
        {"weight": fake(5, 3, 4, 2)},
        ValueError,
        "weight: expected a dense tensor with memory behind it, got one of shape (5, 3, 4, 2) "
        "without any (a fake tensor?)",
    ),
    "another device": (
        {"bias": fake(0, device="cuda")},
        ValueError,
        "bias: expected a tensor on cpu like weight, got cuda:0",
    ),
    "count of means": (
        {"mean": [0.5, 0.5]},
        ValueError,
        "mean: expected 3 values, one for each image channel of weight, got 2",
    ),
    "count of stds": (
        {"std": [0.5] * 4},
        ValueError,
        "std: expected 3 values, one for each image channel of weight, got 4",
    ),
    "no numbers": (
        {"mean": "abc"},
        TypeError,
        "mean: expected a sequence of numbers, got str",
    ),
    "std of zero": (
        {"std": [0.5, 0.0, 0.5]},
        ValueError,
        "std: expected values other than 0, got 0 for channel 1",
    ),
}


@pytest.mark.parametrize(("wrong", "exception", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_arguments_are_named_before_anything_is_written(native, wrong, exception, message):
    mean, std = image_statistics(3)
    weight, bias = random_case((5, 3, 4, 2), torch.float32)
    outputs = {"out_weight": torch.full_like(weight, -1), "out_bias": torch.full((5,), -1.0)}
    good = {"weight": weight, "bias": bias, "mean": mean, "std": std, **outputs}
    with pytest.raises(exception) as error:
        native.fold_uint8(**{**good, **wrong})
    assert str(error.value) == message
    assert all((tensor == -1).all() for tensor in outputs.values())


def test_parameters_and_slices_of_larger_tensors_are_taken(native):
    mean, std = image_statistics(3)
    weight, bias = random_case((5, 3, 4, 2), torch.float32)
    larger = torch.randn(9, 3, 4, 2)
    larger[3:8] = weight

    expected = fold(native, weight, bias, mean, std)
    actual = fold(native, torch.nn.Parameter(larger[3:8]), torch.nn.Parameter(bias), mean, std)

    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_gpu_tensor_is_refused_in_words(native):
    weight, bias = fake(0, 3, 4, 4, device="cuda"), fake(0, device="cuda")
    with pytest.raises(ValueError, match=r"^weight: expected a tensor on cpu, got cuda:0$"):
        native.fold_uint8(weight, None, [0.5] * 3, [0.5] * 3, weight, bias)


@pytest.fixture
def fresh_loader():
    """Let the loader look again, before and after a test that moves what it looks at."""
    _native._attempt.cache_clear()
    yield
    _native._attempt.cache_clear()


def test_the_loader_gives_the_module_and_no_reason(fresh_loader):
    assert _native.reason() is None
    assert _native.load().build_info()["version"] == fastvit.__version__


def refusal_of_the_loader():
    reason = _native.reason()
    with pytest.raises(RuntimeError) as error:
        _native.load()
    assert str(error.value) == reason
    return reason


def test_a_missing_build_says_how_to_make_one(fresh_loader, monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "_PACKAGE", tmp_path / "fastvit")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert refusal_of_the_loader().startswith(
        f"fastvit._C is not built in {tmp_path / 'fastvit'}: run `pip install .`"
    )


def test_a_build_for_another_python_is_told_from_a_missing_one(fresh_loader, monkeypatch, tmp_path):
    (tmp_path / "_C.cpython-37m-x86_64-linux-gnu.so").touch()
    monkeypatch.setattr(_native, "_PACKAGE", tmp_path)
    monkeypatch.setattr(sys, "path", [])
    reason = refusal_of_the_loader()
    assert "built for another Python (_C.cpython-37m-x86_64-linux-gnu.so)" in reason


def test_a_build_of_another_version_is_refused(fresh_loader, monkeypatch):
    monkeypatch.setattr(_native, "__version__", "99.0")
    assert refusal_of_the_loader().startswith(
        f"fastvit._C was built for fastvit {fastvit.__version__} but the Python files are those "
        "of 99.0"
    )


def reason_in_a_copy(folder: Path, search_path: str) -> str:
    """What a new process says that imports the copy of the package in ``folder``."""
    code = "import fastvit._native as n; print(n.__file__); print(n.reason())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": search_path},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    file, reason = done.stdout.splitlines()
    assert Path(file).parent == folder / "fastvit"
    return reason


@pytest.fixture
def copied_package(tmp_path):
    """The Python files of the package, in a folder of their own."""
    package = tmp_path / "copy" / "fastvit"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(_native.__file__).parent, package, ignore=ignore)
    return package


def test_a_broken_build_keeps_the_words_of_the_loader(copied_package):
    (copied_package / f"_C{EXTENSION_SUFFIXES[0]}").write_text("no machine code")
    reason = reason_in_a_copy(copied_package.parent, "")
    assert reason.startswith("fastvit._C is built but cannot be loaded (")
    # Of the loaders of Linux and macOS.
    assert re.search("invalid ELF header|file too short|mach-o file", reason)


def test_an_unbuilt_checkout_that_hides_an_install_says_so(copied_package, tmp_path):
    installed = tmp_path / "site"
    (installed / "fastvit").mkdir(parents=True)
    (installed / "fastvit" / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    reason = reason_in_a_copy(copied_package.parent, str(installed))
    assert reason.startswith(
        f"fastvit was imported from the checkout {copied_package.parent}, which holds no compiled "
        f"fastvit._C and hides the one installed in {installed}: "
    )

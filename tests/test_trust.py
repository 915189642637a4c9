# SPDX-License-Identifier: Apache-2.0
"""A kernel proves itself before ``auto`` takes it. The interpreter stands for a GPU here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit.functional import attention, gpsa_attention
from fastvit.ops import backend, trust
from fastvit.testing import Agreement

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import stem_statistics
from fastvit.kernels.kronecker import padded

from fastvit.ops import (
    conv_stem_triton,
    conv_stem_triton_backward,
    conv_stem_trust,
    gpsa_triton,
    gpsa_trust,
)

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter stands for a GPU here"
)

GRID, N = (3, 4), 12


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Let ``auto`` take the interpreter as it takes a GPU; the cache's file, not yet there."""
    monkeypatch.setattr(backend, "_is_slow", lambda call, name: False)
    monkeypatch.setattr(trust, "needs_proof", lambda device: True)
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path / "cache"))
    trust.forget()
    yield tmp_path / "cache" / "verdicts.json"
    trust.forget()


def leaves(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [(2, 2, N, 16)] * 3 + [(2, 3), (2,)]
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def run(inputs: list[Tensor], backend: str = "auto") -> list[Tensor]:
    out = gpsa_attention(*inputs, GRID, backend=backend)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


def broken(
    name: str, monkeypatch: pytest.MonkeyPatch, module: ModuleType = gpsa_triton
) -> list[str]:
    """Make a launcher's kernel write numbers that are off by one in a hundred."""
    launcher, calls = getattr(module, name), []

    def launch(*args: object) -> object:
        found = launcher(*args)
        calls.append(name)
        for x in args:
            # The results of the launchers that are broken here are the last tensors.
            if isinstance(x, Tensor):
                last = x
        last.mul_(1.01)
        return found

    monkeypatch.setattr(module, name, launch)
    return calls


def test_a_kernel_that_agrees_is_taken_and_remembered(gpu: Path) -> None:
    inputs = leaves()
    run(inputs)
    verdicts = json.loads(gpu.read_text())
    forward, backward = sorted(verdicts, key=lambda key: "backward" in key)
    assert forward.startswith("gpsa/forward/float32,ieee/d=16/grid=3x4/position_factors(")
    assert backward.startswith("gpsa/backward/float32,ieee/d=16/grid=3x4/")
    assert set(verdicts.values()) == {""}
    assert trust.verified_here() == verdicts
    # A new process reads it and checks nothing again.
    trust.forget()
    run(inputs)
    assert trust.verified_here() == {}


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_broken_kernel_is_caught_and_not_used(
    direction: str, gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = leaves()
    expected = run(inputs, "torch")
    calls = broken("forward_stream" if direction == "forward" else "backward_key", monkeypatch)
    with pytest.warns(RuntimeWarning, match=rf"gpsa/{direction}/.* DISAGREES: error ") as caught:
        found = run(inputs)
    assert len(caught) == 1
    assert calls, "the check did not run the kernel"
    checked = len(calls)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(inputs)
    assert len(calls) == checked, "the broken kernel was launched after its check"
    # Whoever asks for it by name is told, and so is whoever asks what runs here.
    with pytest.raises(RuntimeError, match="'triton' was asked for, but its kernel failed"):
        run(inputs, "triton")
    (failed,) = (key for key, verdict in trust.verdicts().items() if verdict)
    assert failed.split("/")[1] == direction
    found = fastvit.info()
    assert found.to_dict()["verdicts"] == trust.verdicts()
    assert f"{failed} failed its check on this machine and is not used: " in str(found)


def test_a_kernel_that_raises_is_not_used(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*args: object) -> None:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(gpsa_triton, "forward_stream", launch)
    inputs = leaves()
    with pytest.warns(RuntimeWarning, match="RuntimeError: out of resources"):
        found = gpsa_attention(*inputs, GRID)
    torch.testing.assert_close(found, gpsa_attention(*inputs, GRID, backend="torch"))
    # Memory may have been short: the next process tries again.
    assert not gpu.exists()


def test_every_size_and_dtype_proves_itself(gpu: Path) -> None:
    inputs = [x.detach() for x in leaves()]
    gpsa_attention(*inputs, GRID)
    gpsa_attention(*inputs, (4, 3))
    gpsa_attention(*(x.half() for x in inputs), GRID)
    attention(*inputs[:3], backend="triton")
    keys = list(trust.verified_here())
    assert [key.split("/")[0] for key in keys] == ["gpsa", "gpsa", "gpsa", "mhsa"]
    assert len(set(keys)) == 4
    # More images are no other specialisation.
    gpsa_attention(*(x.repeat(3, 1, 1, 1) if x.ndim == 4 else x for x in inputs), GRID)
    assert list(trust.verified_here()) == keys


def test_the_check_goes_through_several_images(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many groups as images would hide a program that stops after its first."""
    groups = []
    gradient = gpsa_triton.factor_gradient

    def noted(*args: object) -> object:
        groups.append((args[0].shape[0], args[-1].groups))
        return gradient(*args)

    monkeypatch.setattr(gpsa_triton, "factor_gradient", noted)
    run(leaves())
    assert groups[0] == (2, 1)


@pytest.mark.parametrize("sides", [(24, 24), (17, 33), (64, 64), (5, 64), (20, 16), (64, 5)])
def test_a_check_of_many_tokens_has_the_same_tiles(sides: tuple[int, int]) -> None:
    N = sides[0] * sides[1]
    tokens, grid = gpsa_trust._small(N, sides)
    assert tokens == grid[0] * grid[1] <= max(N, 33 * 33)
    assert tokens > 256
    assert (tokens % 64 == 0) == (N % 64 == 0)
    for small, side in zip(grid, sides, strict=True):
        assert padded(small) == padded(side)


def test_what_the_package_ships_as_verified_is_not_checked(
    gpu: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inputs = leaves()
    run(inputs)
    shipped = tmp_path / "verified.json"
    shipped.write_text(json.dumps({key: {"gpu": "H200"} for key in trust.verified_here()}))
    gpu.unlink()
    trust.forget()
    monkeypatch.setattr(trust, "_VERIFIED", shipped)
    run(inputs)
    assert trust.verified_here() == {}
    assert not gpu.exists()


def test_a_change_of_the_sources_is_another_specialisation(tmp_path: Path) -> None:
    file = tmp_path / "kernel.py"
    file.write_text("a")
    first = trust.source_hash(file)
    assert trust.source_hash(file) == first
    file.write_text("b")
    assert trust.source_hash(file) != first


def test_a_capture_takes_what_is_known(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check copies to the host, so an unknown kernel is not tried while a graph is captured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    candidate = trust.Candidate("op/unknown", lambda: pytest.fail("checked during a capture"))
    assert not trust.trusts(candidate, "auto")
    assert trust.trusts(candidate, "triton")
    assert trust.verified_here() == {}


def test_a_cache_that_cannot_be_written(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.parent.mkdir(parents=True)
    (gpu.parent / "file").write_text("")
    monkeypatch.setenv("FASTVIT_CACHE", str(gpu.parent / "file"))
    ran = []

    def check() -> list[Agreement]:
        ran.append(1)
        return [Agreement("out", 0.0, 0.0, 1.0)]

    for _ in range(2):
        assert trust.trusts(trust.Candidate("op/key", check), "auto")
    assert ran == [1]


def test_a_damaged_cache_is_begun_again(gpu: Path) -> None:
    gpu.parent.mkdir(parents=True)
    gpu.write_text('{"cut off')
    candidate = trust.Candidate("op/key", lambda: [Agreement("out", 0.0, 0.0, 1.0)])
    assert trust.trusts(candidate, "auto")
    assert json.loads(gpu.read_text()) == {"op/key": ""}


def test_a_check_that_compares_nothing_is_no_proof(gpu: Path) -> None:
    with pytest.warns(RuntimeWarning, match="compared nothing"):
        assert not trust.trusts(trust.Candidate("op/key", list), "auto")


def test_many_processes_share_a_cache(gpu: Path) -> None:
    """Readers always find a whole file."""
    code = "from fastvit.ops import trust; [trust._add_to_cache('op/{}', '') for _ in range(50)]"
    writers = [
        subprocess.Popen([sys.executable, "-c", code.format(i)], cwd=gpu.parent.parent)
        for i in range(2)
    ]
    while any(writer.poll() is None for writer in writers):
        if gpu.exists():
            assert set(json.loads(gpu.read_text())) <= {"op/0", "op/1"}
    assert [writer.returncode for writer in writers] == [0, 0]
    assert not list(gpu.parent.glob("*.tmp"))


@pytest.fixture
def small_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter has time for."""
    monkeypatch.setattr(conv_stem_trust, "_SIDES", (9, 13))
    monkeypatch.setattr(stem_statistics, "GROUP", 32)


def stem(mode: str, backend: str = "auto", **options: object) -> fastvit.ConvStem:
    torch.manual_seed(0)
    layer = fastvit.ConvStem(3, (8, 16), (2, 2), 24, backend=backend, **options)
    return layer.train(mode == "train").requires_grad_(mode != "infer")


IMAGES = torch.linspace(0, 255, 2 * 3 * 9 * 13).view(2, 3, 9, 13)


def test_the_stem_proves_itself(gpu: Path, small_checks: None) -> None:
    for mode in ("infer", "keep", "train"):
        stem(mode)(IMAGES)
    stem("infer")(IMAGES.to(torch.uint8))
    stem("infer").half()(IMAGES.half())
    keys = list(trust.verified_here())
    assert [key.split("/")[:6] for key in keys] == [
        ["conv_stem", "forward", "float32,ieee", "float", "infer", "c=3-8-16-24,s=2-2"],
        ["conv_stem", "forward", "float32,ieee", "float", "keep", "c=3-8-16-24,s=2-2"],
        ["conv_stem", "forward", "float32,ieee", "float", "train", "c=3-8-16-24,s=2-2"],
        ["conv_stem", "forward", "float32,ieee", "uint8", "infer", "c=3-8-16-24,s=2-2"],
        ["conv_stem", "forward", "float16", "float", "infer", "c=3-8-16-24,s=2-2"],
    ]
    assert set(trust.verified_here().values()) == {""}
    # Neither other images nor other parameters are another specialisation.
    for mode in ("infer", "keep", "train"):
        stem(mode, norm_eps=1e-3)(IMAGES.repeat(2, 1, 1, 2))
    assert list(trust.verified_here()) == keys


@pytest.mark.parametrize(("images", "uint8"), [(1, False), (6, True), (9, True)])
def test_any_channels_of_a_stem_prove_themselves(
    images: int, uint8: bool, gpu: Path, small_checks: None
) -> None:
    layer = fastvit.ConvStem(images, (1, 12, 5), (2, 1, 2), 30)
    x = torch.rand(2, images, 9, 13)
    train_once(layer, x.mul(255).to(torch.uint8) if uint8 else x)
    widths = f"c={images}-1-12-5-30,s=2-1-2"
    assert [key.split("/")[5] for key in trust.verified_here()] == [widths] * 2
    assert set(trust.verified_here().values()) == {""}


@pytest.mark.parametrize(
    ("kernel", "mode"),
    [
        ("stem_first", "infer"),
        ("stem_conv", "keep"),
        ("stem_conv", "train"),
        ("stem_statistics", "train"),
        ("stem_tokens", "infer"),
    ],
)
def test_a_broken_kernel_of_the_stem_is_caught(
    kernel: str, mode: str, gpu: Path, small_checks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = broken(kernel, monkeypatch, conv_stem_triton)
    with pytest.warns(RuntimeWarning, match=rf"conv_stem/forward/.*/{mode}/.* DISAGREES: error "):
        found = stem(mode)(IMAGES)
    checked = len(calls)
    assert checked
    torch.testing.assert_close(found, stem(mode, "torch")(IMAGES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stem(mode)(IMAGES)
    assert len(calls) == checked, "the broken kernel was launched after its check"
    with pytest.raises(RuntimeError, match="'triton' was asked for, but its kernel failed"):
        stem(mode, "triton")(IMAGES)


def test_a_fault_in_the_second_step_of_statistics_is_caught(
    gpu: Path, small_checks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small images have too few tiles for it."""
    combine = stem_statistics.stem_statistics

    def launch(partials: Tensor, *args: object) -> object:
        found = combine(partials, *args)
        if partials.shape[1] > stem_statistics.GROUP:
            args[-1].mul_(1.01)
        return found

    monkeypatch.setattr(stem_statistics, "stem_statistics", launch)
    with pytest.warns(RuntimeWarning, match="variance of many tiles DISAGREES"):
        stem("train")(IMAGES)


def train_once(layer: fastvit.ConvStem, images: Tensor) -> list[Tensor]:
    layer(images).square().sum().backward()
    return [p.grad for p in layer.parameters()]


@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("mode", ["keep", "train"])
def test_the_backward_of_the_stem_proves_itself(
    mode: str, uint8: bool, gpu: Path, small_checks: None
) -> None:
    images = IMAGES.to(torch.uint8) if uint8 else IMAGES
    train_once(stem(mode), images)
    pixels = "uint8" if uint8 else "float"
    assert [key.split("/")[:5] for key in trust.verified_here()] == [
        ["conv_stem", direction, "float32,ieee", pixels, mode]
        for direction in ("forward", "backward")
    ]
    assert set(trust.verified_here().values()) == {""}


@pytest.mark.parametrize(
    "kernel", ["stem_input_gradient", "stem_image_gradient", "stem_norm_gradient"]
)
def test_a_broken_backward_of_the_stem_is_caught(
    kernel: str, gpu: Path, small_checks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher, calls = getattr(conv_stem_triton_backward, kernel), []

    def launch(*args: object) -> object:
        calls.append(kernel)
        found = launcher(*args)
        # What it returns, or what it writes to if that is nothing: of images.
        (args[6] if found is None else found).mul_(1.01)
        return found

    monkeypatch.setattr(conv_stem_triton_backward, kernel, launch)
    with pytest.warns(RuntimeWarning, match=r"conv_stem/backward/.*/train/.* DISAGREES: error "):
        found = train_once(stem("train"), IMAGES)
    checked = len(calls)
    assert checked
    for gradient, expected in zip(found, train_once(stem("train", "torch"), IMAGES), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_once(stem("train"), IMAGES)
    assert len(calls) == checked, "the broken kernel was launched after its check"
    with pytest.raises(RuntimeError, match="'triton' was asked for, but its kernel failed"):
        train_once(stem("train", "triton"), IMAGES)


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a number without an account, in a container."""

    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTVIT_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert trust.cache_directory() == Path(tempfile.gettempdir(), f"fastvit-{os.getuid()}")

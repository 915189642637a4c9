# SPDX-License-Identifier: Apache-2.0
"""The measured table of what cuDNN or the torch backend does faster than the stem's kernels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit import reference
from fastvit.testing import agreement

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.ops import backend, conv_stem_torch, conv_stem_triton, stem_choices, trust

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter stands for a GPU here"
)

MEASURED = {"date": "2026-01-02", "gpu": "a GPU", "torch": "2.15.0", "cudnn": "9.1"}
CHANNELS, STRIDES, D = (8, 16, 24, 40), (2, 1, 2, 1), 24
# Two images of 16 x 16: maps of 2 x 64 positions, then of 2 x 16.
LATER = ["16-24 s2 2^5", "24-40 s1 2^5"]


@contextmanager
def cudnn_precision(name: str) -> Iterator[None]:
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    switch.fp32_precision = name
    try:
        yield
    finally:
        switch.fp32_precision = before


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """``table(cudnn=..., torch=...)``: a table of these keys for an architecture."""
    monkeypatch.setattr(trust, "needs_proof", lambda device: False)

    def write(arch: str = "sm_90", **lists: Any) -> None:
        entry = {"measured": MEASURED, "cudnn": [], "torch": [], **lists}
        file = tmp_path / f"choices{len(list(tmp_path.iterdir()))}.json"
        file.write_text(json.dumps({arch: entry}), "utf-8")
        monkeypatch.setattr(stem_choices, "_FILE", file)

    with cudnn_precision("ieee"):
        yield write


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights that PyTorch was given for the kernels."""
    shapes: list[tuple[int, ...]] = []
    convolution = conv_stem_triton._convolution

    def counted(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        shapes.append(tuple(weight.shape[:2]))
        return convolution(x, weight, *args)

    monkeypatch.setattr(conv_stem_triton, "_convolution", counted)
    return shapes


def layer(kind: type = fastvit.ConvStem, **options: Any) -> Any:
    torch.manual_seed(0)
    found = kind(3, CHANNELS, STRIDES, D, **options)
    for stage in found.stages:
        torch.nn.init.uniform_(stage.bn.running_mean, -0.5, 0.5)
        torch.nn.init.uniform_(stage.bn.running_var, 0.5, 1.5)
    return found


def results(layer: Any, mode: str, dtype: torch.dtype) -> list[Tensor]:
    """Tokens, running statistics and, unless nothing is to be learned, gradients."""
    layer = layer.to(dtype).train(mode == "train").requires_grad_(mode != "infer")
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).half().to(dtype)
    out = layer(x)
    found = [out.detach(), *(b for b in layer.buffers() if b.is_floating_point())]
    if mode != "infer":
        out.square().sum().backward()
        found += [p.grad for p in layer.parameters()]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["infer", "frozen", "train"])
@pytest.mark.parametrize("which", [[0], [0, 1]], ids=["one", "both"])
def test_cudnn_takes_the_layers_of_the_table(
    which: list[int], mode: str, dtype: torch.dtype, table, convolutions
) -> None:
    arithmetic = "half" if dtype == torch.float16 else "ieee"
    prefix = f"{arithmetic} {'infer' if mode == 'infer' else 'train'} "
    table(cudnn=[prefix + LATER[i] for i in which])
    found = results(layer(backend="triton"), mode, dtype)
    assert convolutions == [[(24, 16), (40, 24)][i] for i in which]
    theirs = results(layer(reference.ConvStem), mode, dtype)
    expected = results(layer(reference.ConvStem).to(dtype), mode, torch.float64)
    for i, tensors in enumerate(zip(found, theirs, expected, strict=True)):
        ulps = 4 if tensors[0].ndim == 1 else 2
        floor = ulps * torch.finfo(dtype).eps
        check = agreement(*tensors, name=f"result {i}", floor=floor, rms=True)
        assert check.ok, str(check)


@pytest.mark.parametrize(
    ("arch", "key"),
    [
        ("sm_80", f"ieee infer {LATER[0]}"),
        ("sm_90", f"half infer {LATER[0]}"),
        ("sm_90", f"ieee train {LATER[0]}"),
        ("sm_90", "ieee infer 16-24 s2 2^9"),
        # The images' own convolution has no such choice.
        ("sm_90", "ieee infer 3-8 s2 2^7"),
    ],
)
def test_other_entries_are_ignored(arch: str, key: str, table, convolutions) -> None:
    table(arch, cudnn=[key])
    results(layer(backend="triton"), "infer", torch.float32)
    assert not convolutions


def test_switches_of_cudnn(table, convolutions, monkeypatch: pytest.MonkeyPatch) -> None:
    """tf32 only where the kernels' switch says so, and nothing that may change from run to run."""
    table(cudnn=[f"ieee infer {LATER[0]}"])

    def run() -> int:
        convolutions.clear()
        results(layer(backend="triton"), "infer", torch.float32)
        return len(convolutions)

    assert run() == 1
    with cudnn_precision("tf32"):
        assert run() == 0
    with monkeypatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert run() == 0
        patch.setattr(torch.backends.cudnn, "deterministic", True)
        assert run() == 1
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "enabled", False)
        assert run() == 0


def test_the_torch_backend_takes_the_calls_of_the_table(
    table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under auto, each direction by itself; one asked for by name stays."""
    monkeypatch.setattr(backend, "_is_slow", lambda call, name: False)
    ran: list[str] = []
    for name in ("forward", "backward"):
        op = getattr(conv_stem_torch, name)

        def counted(*args: Any, op: Any = op, name: str = name) -> Any:
            ran.append(name)
            return op(*args)

        monkeypatch.setattr(conv_stem_torch, name, counted)

    def run(asked: str) -> list[str]:
        ran.clear()
        results(layer(backend=asked), "train", torch.float32)
        return list(ran)

    assert run("auto") == []
    sizes = "3-8-16-24-40-24 s2-1-2-1 2^9"
    table(torch=[f"ieee train {sizes}"])
    assert run("auto") == ["forward"]
    assert run("triton") == []
    table(torch=[f"ieee backward {sizes}", f"ieee infer {sizes}"])
    assert run("auto") == ["backward"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cudnn": "all"}, r"sm_90.cudnn: expected a list, got 'all'"),
        ({"cudnn": ["half infer 16-24 s3 2^5"]}, r"sm_90.cudnn: 'half infer 16-24 s3 2\^5' is no"),
        ({"torch": ["half infer 16-24 s2"]}, "sm_90.torch: 'half infer 16-24 s2' is no key"),
        ({"measured": {"gpu": "x"}}, "sm_90.measured: expected cudnn, date, gpu, torch, got"),
        ({"surplus": 1}, "surplus"),
    ],
)
def test_a_malformed_table_is_refused(change: dict[str, Any], words: str, table) -> None:
    table(**change)
    with pytest.raises(ValueError, match=rf"choices0.json: not a table of choices: .*{words}"):
        stem_choices.choices("sm_90")


def test_the_table_of_the_package_is_well_formed() -> None:
    assert stem_choices.choices("sm_90").cudnn >= frozenset()


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 20000, 20000), r"less than 2\^30 numbers, and these are \(3, 20000, 20000\)"),
        ((1, 1, 1, 2**27), r"rows of less than 2\^29 numbers, .* 134217728 pixels and 8 channels"),
    ],
)
def test_sizes_beyond_32_bits_are_refused(shape: tuple[int, ...], words: str) -> None:
    """Nothing of this size is read: its strides are zero."""
    C, stride = shape[1], 2
    x = torch.zeros(()).expand(shape)
    one = torch.ones(8)
    stages = [(torch.zeros(8, C, 3, 3), one, one, one, one, stride)]
    weight = torch.zeros(8, 8, 1, 1)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=f"'triton' was asked for, but .*{words}"),
    ):
        fastvit.functional.conv_stem(x, stages, weight, backend="triton")

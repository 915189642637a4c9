# SPDX-License-Identifier: Apache-2.0
"""The script that times the host's part of a call: it goes the way that calls go on a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastvit import _native
from fastvit.functional import patch_embed
from fastvit.ops.patch_embed_cuda import Kernels

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "host_time.py"

pytestmark = [
    pytest.mark.skipif(not SCRIPT.exists(), reason="bench/ is not beside tests/"),
    pytest.mark.skipif(_native.reason() is not None, reason="needs the compiled module fastvit._C"),
]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPT.with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("host_time")
    monkeypatch.setattr(module, "CALLS", 2)
    monkeypatch.setattr(module, "ROUNDS", 2)
    return module


def test_every_case_is_timed(script, capsys):
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert all(float(line.split()[-2]) > 0 for line in lines)


def test_the_calls_end_in_the_gpus_kernels(script, monkeypatch):
    ran = []
    forward = Kernels.forward
    monkeypatch.setattr(
        Kernels, "forward", lambda self, *args: ran.append(self) or forward(self, *args)
    )
    images, weight = torch.randn(1, 3, 4, 4).half(), torch.randn(2, 3, 4, 4).half()
    with script.gpu():
        assert patch_embed(images, weight).shape == (1, 1, 2)
    assert ran == [Kernels(False, hopper="90a" in _native.load().build_info()["cuda_archs"])]


def test_what_adapters_ask_is_timed(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    module = load("adapter_time")
    monkeypatch.setattr(module, "CALLS", 1)
    monkeypatch.setattr(module, "ROUNDS", 1)
    threads = torch.get_num_threads()
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["us"] * 4 + ["ms"]

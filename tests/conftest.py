# SPDX-License-Identifier: Apache-2.0
"""Settings of every test, and the numbers rule applied to an op and all its gradients."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# Triton decides when a kernel is decorated, so this stands above every import of fastvit.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fastvit
from fastvit.ops import backend
from fastvit.testing import agreement

# Test shapes are small: more threads cost more than they give. The user's choice wins.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)

Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_choices() -> None:
    """Tests change what is built and which GPUs there are; processes do not."""
    backend._chosen.clear()


@pytest.fixture
def auto_backend() -> Iterator[None]:
    """Run with the default backend, whatever the environment says, and put it back."""
    with fastvit.backend("auto"):
        yield


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The CUDA kernels of csrc/ for the emulator, see tests/emulator/emulator.h."""
    path = Path(__file__).parent / "emulator" / "build.py"
    if not (path.parents[2] / "csrc").exists():
        pytest.skip("csrc/ is not beside tests/")
    if sys.platform != "linux":
        pytest.skip("macOS has given up ucontext")
    spec = importlib.util.spec_from_file_location("emulator_build", path)
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build.build(tmp_path_factory.mktemp("emulated-kernels"))


@pytest.fixture
def kernels(emulated: ModuleType) -> Iterator[Any]:
    """The CUDA kernels on an emulated H100, called as cuda_kernels.py says."""
    from cuda_kernels import H100, Kernels

    emulated.set_device(*H100)
    emulated.set_shuffle(0)
    conflicts = emulated.bank_conflicts()
    yield Kernels(emulated)
    assert emulated.bank_conflicts() == conflicts, "matrix loads met bank conflicts"


def _backward(out: Tensor, leaves: Mapping[str, Tensor], draw: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(1000 + draw)
    # The same cotangent in every dtype: one that bfloat16 holds exactly.
    out.backward(torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype))
    results = {"output": out.detach()}
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            assert leaf.grad is not None, f"no gradient for {name}"
            results[f"grad of {name}"] = leaf.grad
    return results


def _leaf(x: object) -> object:
    return x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x


def _differentiate(
    fn: Callable[..., Tensor], inputs: Mapping[str, object], draw: int = 0
) -> Tensors:
    leaves = {name: _leaf(x) for name, x in inputs.items()}
    tensors = {name: x for name, x in leaves.items() if isinstance(x, Tensor)}
    return _backward(fn(**leaves), tensors, draw)


@pytest.fixture
def differentiate() -> Callable[..., Tensors]:
    """``differentiate(fn, inputs, draw)``: the output of ``fn(**inputs)`` and the gradients of
    every floating input for the cotangent number ``draw``. The inputs keep their strides.
    """
    return _differentiate


@pytest.fixture
def differentiate_module() -> Callable[..., Tensors]:
    """``differentiate_module(module, x)``: the output, and the gradients of a floating ``x``
    and of all parameters by name.
    """

    def run(module: nn.Module, x: Tensor) -> Tensors:
        module.zero_grad()
        leaf = _leaf(x)
        return _backward(module(leaf), {"input": leaf, **dict(module.named_parameters())})

    return run


def _double(x: object) -> object:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.fixture
def check_agreement() -> Callable[..., None]:
    """``check_agreement(actual, reference, expected, floors=..., rms=...)`` on sequences of
    results of :func:`differentiate`, which are stacked; every disagreement is reported. Maxima
    are not compared for the names in ``rms``: sums of which there are few, and what a ReLU
    switches.
    """

    def check(
        actual: Sequence[Tensors],
        reference: Sequence[Tensors],
        expected: Sequence[Tensors],
        *,
        floors: Mapping[str, float] | None = None,
        rms: Sequence[str] = (),
    ) -> None:
        failures = []
        assert actual[0].keys() == expected[0].keys()
        sizes = [x.abs().max().item() for r in expected for x in r.values() if x.numel()]
        for name in expected[0]:
            stacked = [torch.stack([r[name] for r in s]) for s in (actual, reference, expected)]
            ulp = torch.finfo(stacked[0].dtype).eps
            # float64 against float64: another order of summation, not another dtype.
            default = 1e-12 if stacked[0].dtype == torch.float64 else 0.0
            floor = max(default, (floors or {}).get(name, 0.0))
            # What is zero in exact arithmetic is compared on the scale of the other results.
            scale = max(sizes, default=0.0) or 1.0 if (stacked[2].abs() < 1e-11).all() else None
            rules = [agreement(*stacked, name=f"rms {name}", floor=floor, scale=scale, rms=True)]
            if name not in rms:
                # The largest error of some hundred is chance within a factor of three; this
                # finds the single element that is wrong by more than rounding.
                floor = max(floor, 8 * ulp)
                rules.append(agreement(*stacked, name=name, floor=floor, scale=scale))
            failures += [str(rule) for rule in rules if not rule.ok]
        assert not failures, "\n".join(failures)

    return check


@pytest.fixture
def check_numbers(check_agreement) -> Callable[..., None]:
    """``check_numbers(fn, oracle, problems, floors=..., rms=...)``: the numbers rule for the
    output of ``fn(**problem)`` and every gradient. ``oracle`` takes the same arguments; in the
    problem's dtype it is the plain PyTorch reference, in float64 what is expected.
    """

    def check(
        fn: Callable[..., Tensor],
        oracle: Callable[..., Tensor],
        problems: Sequence[Mapping[str, object]],
        *,
        floors: Mapping[str, float] | None = None,
        rms: Sequence[str] = (),
    ) -> None:
        doubles = [{name: _double(x) for name, x in p.items()} for p in problems]
        check_agreement(
            [_differentiate(fn, p, i) for i, p in enumerate(problems)],
            [_differentiate(oracle, p, i) for i, p in enumerate(problems)],
            [_differentiate(oracle, p, i) for i, p in enumerate(doubles)],
            floors=floors,
            rms=rms,
        )

    return check

# SPDX-License-Identifier: Apache-2.0
"""Accelerated models give the library's numbers: the error against float64 is at most twice the
error that the library makes in the same dtype.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import FrameType

import pytest
import torch
from library_models import (
    CONVIT,
    MODELS,
    PATCH,
    SIZE,
    build,
    images,
    output,
)
from torch import Tensor, nn

import fastvit
from fastvit.testing import CANCELLING

MODEL_NAMES = list(MODELS)
STEMS = [name for name, case in MODELS.items() if "conv_stem" in case.swapped]
#: The authors' GPSA cannot be converted: its table of offsets stays in float32.
CONVERTIBLE = [name for name in MODEL_NAMES if name != "convit"]


class Logits(nn.Module):
    """The model with one tensor as its result."""

    def __init__(self, model: nn.Module, autocast: bool = False):
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return output(self.model, x)


def accelerated(model: nn.Module, **options: object) -> nn.Module:
    model = copy.deepcopy(model)
    assert fastvit.accelerate(model, **options)
    return model


def doubled(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module, CONVIT.GPSA):  # its offsets are no buffer and do not follow
            module.get_rel_indices((SIZE // PATCH) ** 2)
            module.rel_indices = module.rel_indices.double()
    return model


def floors(model: nn.Module) -> dict[str, float]:
    cancelling = ("pos_proj.weight", "gating_param")
    names = [name for name, _ in model.named_parameters() if name.endswith(cancelling)]
    return {f"grad of {name}": CANCELLING for name in names}


@pytest.fixture
def check_model(differentiate_module, check_agreement) -> Callable[..., None]:
    """The numbers rule for a model's output and all gradients."""

    def check(
        model: nn.Module,
        inputs: list[Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        autocast: bool = False,
        through_relu: bool = False,
    ) -> None:
        doubles = Logits(doubled(model))
        library = Logits(model.to(dtype), autocast)
        ours = Logits(accelerated(model), autocast)
        results = [
            [differentiate_module(m, x.to(d)) for x in inputs]
            for m, d in ((ours, dtype), (library, dtype), (doubles, torch.float64))
        ]
        names = list(results[0][0])
        if autocast:  # float32 sums of bfloat16 products: a unit of the latter for single elements
            check_agreement(*results, floors=dict.fromkeys(names, 8 * 2.0**-8))
        check_agreement(
            *results,
            floors=floors(library),
            rms=[name for name in names if autocast or (through_relu and name != "output")],
        )
        buffers = [dict(m.named_buffers()) for m in (ours, library, doubles)]
        statistics = [name for name in buffers[0] if "running" in name]
        if statistics:
            check_agreement(*[[{name: b[name] for name in statistics}] for b in buffers])

    return check


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_output_and_every_gradient(name: str, training: bool, check_model) -> None:
    inputs = [images(seed=seed) for seed in range(2)]
    check_model(build(name).train(training), inputs, through_relu=name in STEMS)


@pytest.mark.parametrize("name", ["timm-convit", "timm-vit_c", "torchvision-vit_p"])
def test_float64(name: str, check_model) -> None:
    check_model(build(name), [images()], dtype=torch.float64, through_relu=name in STEMS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONVERTIBLE)
def test_low_precision(name: str, dtype: torch.dtype, check_model) -> None:
    # Inputs that the dtype holds exactly: the float64 model sees the same.
    inputs = [images(seed=seed).bfloat16().float() for seed in range(3)]
    model = build(name).bfloat16().float().eval()
    check_model(model, inputs, dtype=dtype, through_relu=name in STEMS)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_autocast(name: str, training: bool, check_model) -> None:
    inputs = [images(seed=seed) for seed in range(3)]
    check_model(build(name).train(training), inputs, autocast=True, through_relu=name in STEMS)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_autocast_keeps_every_dtype(name: str) -> None:
    """The residual stream of float32 positions stays float32, attention's result bfloat16."""

    def dtypes(model: nn.Module) -> list[tuple[str, torch.dtype]]:
        seen = []

        def note(name: str, module: nn.Module, args: tuple, out: object) -> None:
            for role, x in (("in", args[:1]), ("out", (out,))):
                seen.extend((f"{name} {role}", t.dtype) for t in x if isinstance(t, Tensor))

        norms = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
        handles = [m.register_forward_hook(partial(note, n)) for n, m in norms]
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            seen.append(("output", output(model, images()).dtype))
        for handle in handles:
            handle.remove()
        return seen

    model = build(name)
    assert dtypes(accelerated(model)) == dtypes(model)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_training_steps(name: str, check_agreement) -> None:
    """Parameters and running statistics after three steps of SGD with momentum."""

    def train(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            output(model, images(4, seed=step).to(dtype)).square().mean().backward()
            optimizer.step()
        counts = {k: v for k, v in model.state_dict().items() if not v.is_floating_point()}
        assert all(count == 3 for count in counts.values())
        return {k: v for k, v in model.state_dict().items() if v.is_floating_point()}

    model = build(name)
    states = [
        [train(accelerated(model), torch.float32)],
        [train(copy.deepcopy(model), torch.float32)],
        [train(doubled(model), torch.float64)],
    ]
    check_agreement(*states, rms=list(states[0][0]), floors=dict.fromkeys(states[0][0], 1e-6))


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_infer(name: str, check_agreement) -> None:
    model = build(name)
    ours = accelerated(model, mode="infer")
    with torch.no_grad():
        results = [
            [{"output": output(m, images().to(d))}]
            for m, d in (
                (ours, torch.float32),
                (model, torch.float32),
                (doubled(model), torch.float64),
            )
        ]
    check_agreement(*results, floors={"output": 1e-5})


@contextlib.contextmanager
def entered(functions: Mapping[nn.Module, Callable]) -> Iterator[list[nn.Module]]:
    """The modules among these whose function of that kind runs in the block."""
    found: list[nn.Module] = []

    def trace(frame: FrameType, event: str, argument: object) -> None:
        module = frame.f_locals.get("self") if event == "call" else None
        known = functions.get(module) if isinstance(module, nn.Module) else None
        if known and frame.f_code is known.__code__:
            found.append(module)

    sys.setprofile(trace)
    try:
        yield found
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_library_does_not_run(name: str, mode: str) -> None:
    """The agreement above is not that of the library's forward with itself."""
    model = build(name)
    theirs = {m: type(m).forward for m in model.modules()}
    report = fastvit.accelerate(model, mode=mode)
    swapped = {model.get_submodule(e.name) for e in report.swapped}
    with entered({m: theirs[m] for m in swapped}) as found, torch.no_grad():
        output(model, images())
    assert not found
    fastvit.restore(model)
    with entered({m: theirs[m] for m in swapped}) as found, torch.no_grad():
        output(model, images())
    assert set(found) == swapped

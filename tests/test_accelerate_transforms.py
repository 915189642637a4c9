# SPDX-License-Identifier: Apache-2.0
"""What PyTorch users do to a model, done to accelerated ones: compile, export, trace, checkpoint,
call with other parameters. And what accelerate costs.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable

import pytest
import timm
import torch
from library_models import (
    CONVIT,
    HEADS,
    MODELS,
    PATCH,
    SIZE,
    WIDTH,
    build,
    images,
    output,
    sequential_stem,
    timm_vit,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

import fastvit

Tensors = dict[str, Tensor]

MODEL_NAMES = list(MODELS)


def accelerated(name: str, **options: object) -> tuple[nn.Module, nn.Module]:
    """An accelerated model and the library's."""
    model = build(name)
    ours = copy.deepcopy(model)
    assert fastvit.accelerate(ours, **options)
    return ours, model


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def close_gradients(actual: Tensors, expected: Tensors) -> None:
    """On the scale of each, or of all for those that cancel."""
    assert actual.keys() == expected.keys()
    least = 1e-3 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        scale = max(gradient.abs().max().item(), least)
        torch.testing.assert_close(
            actual[name] / scale, gradient / scale, rtol=2e-3, atol=2e-3, msg=name
        )


def gradients_of(model: nn.Module) -> Tensors:
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", [n for n in MODEL_NAMES if "deit" not in n])
def test_compile(name: str) -> None:
    """One graph in eval mode and for a training step; the backend of the graph is ours to skip."""
    torch.compiler.reset()
    ours, model = accelerated(name)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        close(output(compiled, images()), output(model, images()))
    compiled.train()
    output(compiled, images()).square().sum().backward()
    output(model.train(), images()).square().sum().backward()
    close_gradients(gradients_of(ours), gradients_of(model))
    for key, value in model.state_dict().items():
        close(ours.state_dict()[key], value)


@pytest.mark.parametrize("name", ["timm-convit", "torchvision-vit_c"])
def test_compile_of_a_frozen_model(name: str) -> None:
    torch.compiler.reset()
    ours, model = accelerated(name, mode="infer")
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        close(output(compiled, images()), output(model, images()))


def test_accelerate_after_compile_says_so() -> None:
    compiled = torch.compile(build("timm-vit"), backend="eager")
    with pytest.raises(TypeError, match="compile"):
        fastvit.accelerate(compiled)
    inside = nn.Sequential(compiled)
    with pytest.warns(UserWarning, match="nothing"):
        report = fastvit.accelerate(inside)
    assert not report
    inside(images())


def test_weights_changed_after_compile_count() -> None:
    torch.compiler.reset()
    ours, model = accelerated("timm-convit")
    compiled = torch.compile(ours, backend="eager")
    with torch.no_grad():
        compiled(images())
        for m in (ours, model):
            m.blocks[0].attn.proj.weight.mul_(2)
        close(compiled(images()), model(images()))


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_export(name: str) -> None:
    ours, model = accelerated(name)
    program = torch.export.export(ours, (images(),))
    with torch.no_grad():
        close(output(program.module(), images(seed=2)), output(model, images(seed=2)))


def test_export_with_any_batch() -> None:
    for name in ("timm-vit", "timm-convit", "torchvision-vit_c"):
        ours, model = accelerated(name)
        sizes = ({0: torch.export.Dim("batch", min=2, max=64)},)
        program = torch.export.export(ours, (images(3),), dynamic_shapes=sizes)
        with torch.no_grad():
            close(output(program.module(), images(5)), output(model, images(5)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["timm-convit", "timm-vit_c", "torchvision-vit_p"])
def test_jit_trace(name: str) -> None:
    ours, model = accelerated(name)
    with torch.no_grad():
        traced = torch.jit.trace(ours, images(), check_trace=False)
        close(traced(images(seed=2)), output(model, images(seed=2)))


@pytest.mark.parametrize("name", ["torchvision-vit_p", "torchvision-vit_c", "sequential"])
def test_fx_trace(name: str) -> None:
    """Whatever torch.fx can trace before, it can after."""
    ours, model = accelerated(name)
    with torch.no_grad():
        close(torch.fx.symbolic_trace(ours)(images()), model(images()))


@pytest.mark.parametrize(
    ("name", "node"),
    [
        ("torchvision-vit_p", "encoder.ln"),
        ("torchvision-vit_c", "encoder.ln"),
        ("torchvision-vit_c", "conv_proj"),
        ("torchvision-vit_p", "conv_proj"),
    ],
)
def test_feature_extractor(name: str, node: str) -> None:
    ours, model = accelerated(name)
    with torch.no_grad():
        mine, theirs = (create_feature_extractor(m, [node])(images())[node] for m in (ours, model))
    close(mine, theirs)


@pytest.mark.parametrize("name", ["timm-vit", "timm-convit"])
def test_feature_extractor_of_timm(name: str) -> None:
    from timm.models import create_feature_extractor as create

    ours, model = accelerated(name)
    with torch.no_grad():
        mine, theirs = (create(m, ["blocks.1"])(images())["blocks.1"] for m in (ours, model))
    close(mine, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_activation_checkpointing(name: str, reentrant: bool) -> None:
    ours, model = accelerated(name)
    results = []
    for m in (ours, model):
        m.train()
        x = images().requires_grad_()
        checkpoint(lambda x, m=m: output(m, x), x, use_reentrant=reentrant).sum().backward()
        results.append(x.grad)
    scale = results[1].abs().max()
    torch.testing.assert_close(results[0] / scale, results[1] / scale, rtol=1e-3, atol=1e-3)
    close_gradients(gradients_of(ours), gradients_of(model))


@pytest.mark.parametrize("name", ["timm-vit", "timm-convit"])
def test_checkpointing_of_timm(name: str) -> None:
    ours, model = accelerated(name)
    for m in (ours, model):
        if hasattr(m, "set_grad_checkpointing") and name == "timm-vit":
            m.set_grad_checkpointing()
        m.train()(images()).sum().backward()
    close_gradients(gradients_of(ours), gradients_of(model))


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_functional_call(name: str) -> None:
    ours, model = accelerated(name)
    other = {k: v.detach() * 1.1 for k, v in model.named_parameters()}
    with torch.no_grad():
        mine, theirs = (torch.func.functional_call(m, other, (images(),)) for m in (ours, model))
    close(getattr(mine, "logits", mine), getattr(theirs, "logits", theirs))

    def loss(parameters: dict[str, Tensor], m: nn.Module) -> Tensor:
        out = torch.func.functional_call(m, parameters, (images(),))
        return getattr(out, "logits", out).square().mean()

    gradients = [torch.func.grad(loss)(other, m) for m in (ours, model)]
    close_gradients(*gradients)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_per_sample_gradients() -> None:
    ours, model = accelerated("timm-convit")
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def gradients(m: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(m, parameters, (x[None],)).square().sum()

        m(images())  # timm's table of offsets changes at the first forward
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images())

    close_gradients(gradients(ours), gradients(model))


def test_meta_device() -> None:
    with torch.device("meta"):
        model = timm_vit()
    assert fastvit.accelerate(model)
    assert model(torch.empty(2, 3, SIZE, SIZE, device="meta")).shape == (2, 5)


def test_no_library_is_imported() -> None:
    code = """
        import sys, warnings
        import torch, fastvit
        warnings.simplefilter("ignore")
        layer = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.Linear(2, 2))
        fastvit.accelerate(layer)
        stem = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, 2, 1, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
            torch.nn.Conv2d(8, 4, 1))
        assert fastvit.accelerate(stem)
        stem(torch.randn(2, 3, 8, 8))
        fastvit.report(stem), fastvit.supports(stem), fastvit.restore(stem)
        found = {"timm", "torchvision", "transformers", "pycls", "convit"} & set(sys.modules)
        assert not found, found
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(code)]
    subprocess.run(command, check=True, timeout=120)


def best_of(function: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of so many calls."""
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        spent.append(time.perf_counter() - start)
    return min(spent)


def test_accelerate_is_quick() -> None:
    with torch.device("meta"):
        model = timm.create_model("convit_base")

    def once() -> None:
        fastvit.accelerate(model)
        fastvit.restore(model)

    assert best_of(once, 3) < 0.2
    fastvit.accelerate(model)
    assert len(fastvit.report(model).swapped) == 13


@pytest.mark.parametrize("kind", ["patch_embed", "conv_stem", "mhsa", "gpsa"])
def test_host_time_of_an_adapter(kind: str) -> None:
    """At most 10 us above fastvit's own layer on a quiet machine; a busy one gets more."""
    torch.manual_seed(0)
    tokens = torch.randn(1, 4, WIDTH)
    adapter, layer, x = {
        "patch_embed": lambda: (
            timm.layers.PatchEmbed(SIZE, PATCH, 3, WIDTH),
            fastvit.PatchEmbed(SIZE, PATCH, 3, WIDTH),
            images(1),
        ),
        "conv_stem": lambda: (
            sequential_stem(),
            fastvit.ConvStem(3, (8, 12, 16), (2, 2, 2), WIDTH, flatten=False),
            images(1),
        ),
        "mhsa": lambda: (CONVIT.MHSA(WIDTH, HEADS), fastvit.MHSA(WIDTH, HEADS), tokens),
        "gpsa": lambda: (
            CONVIT.GPSA(WIDTH, HEADS),
            fastvit.GPSA(WIDTH, HEADS, grid_size=(2, 2)),
            tokens,
        ),
    }[kind]()
    assert fastvit.accelerate(adapter)
    with torch.no_grad():
        pairs = [
            (best_of(lambda: adapter.eval()(x), 200), best_of(lambda: layer.eval()(x), 200))
            for _ in range(5)
        ]
    assert min(mine - own for mine, own in pairs) < 60e-6

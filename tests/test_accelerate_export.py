# SPDX-License-Identifier: Apache-2.0
"""Accelerated models as other programs: ONNX, which onnxruntime runs, AOTInductor, and counted."""

from __future__ import annotations

import copy
from pathlib import Path

import library_models
import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastvit

MODELS = ["timm-convit", "timm-vit", "torchvision-vit_c"]
BATCH = torch.export.Dim("batch", min=1, max=64)


def accelerated(name: str) -> nn.Module:
    model = library_models.build(name)
    assert fastvit.accelerate(model)
    return model


# timm's own forward compares sizes.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("name", MODELS)
def test_onnx_holds_plain_operators(name: str, dynamo: bool, tmp_path: Path) -> None:
    """The graph is the library's own; onnxruntime has none of our ops."""
    model, x, path = accelerated(name), library_models.images(), tmp_path / "model.onnx"
    options = {"dynamic_shapes": ({0: BATCH},), "verbose": False} if dynamo else {}
    torch.onnx.export(model, (x,), path, dynamo=dynamo, **options)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    (out,) = session.run(None, {argument.name: x.numpy()})
    expected = library_models.output(model, x).detach()
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-4, atol=1e-5)


def test_aot_inductor(tmp_path: Path) -> None:
    """One model that has every op: a library with them, for any batch."""
    model, x = accelerated("timm-convit"), library_models.images(3)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: BATCH},))
        assert "fastvit._gpsa_forward" in str(program.graph)
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        loaded = torch._inductor.aoti_load_package(package)
        for size in (2, 5):
            images = library_models.images(size)
            torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_the_library_s(name: str) -> None:
    """A counter sees the products of the ops as it saw those of the library, positions too."""
    theirs = library_models.build(name)
    ours, x, counts = copy.deepcopy(theirs), library_models.images(), []
    fastvit.accelerate(ours)
    for model in (theirs, ours):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x)
        counts.append(counter.get_total_flops())
    assert counts[1] == counts[0] > 0

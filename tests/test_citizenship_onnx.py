# SPDX-License-Identifier: Apache-2.0
"""Graphs of plain PyTorch operators: ONNX, which onnxruntime runs, and ``torch.jit.trace``."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from citizenship_cases import LAYERS, MODELS, OPS, Case, assert_same, batch_of, each

import fastvit

FRAME = (2, 3, 8, 12)
STATISTICS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.2)}
FORMATS = [
    Case(
        "ConvStem_map",
        lambda: (fastvit.ConvStem(3, (4, 6), (2, 2), 10, flatten=False), torch.randn(FRAME)),
    ),
    *(
        Case(
            f"PatchEmbed_{form}",
            lambda form=form: (
                fastvit.PatchEmbed((8, 12), 4, embed_dim=10, output_fmt=form), torch.randn(FRAME)
            ),
        )
        for form in ("NCHW", "NHWC", "NCL")
    ),
    Case(
        "ConvStem_uint8",
        lambda: (
            fastvit.ConvStem(3, (4, 6), (2, 2), 10, **STATISTICS),
            torch.randint(0, 256, FRAME, dtype=torch.uint8),
        ),
    ),
    Case(
        "PatchEmbed_uint8",
        lambda: (
            fastvit.PatchEmbed((8, 12), 4, embed_dim=10, **STATISTICS),
            torch.randint(0, 256, FRAME, dtype=torch.uint8),
        ),
    ),
]  # fmt: skip


@each(OPS, LAYERS, FORMATS, MODELS)
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx_takes_any_batch(case: Case, dynamo: bool, tmp_path: Path) -> None:
    module, x = case.make()
    path = tmp_path / "module.onnx"
    if dynamo:
        shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
        torch.onnx.export(module, (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    else:
        torch.onnx.export(
            module, (x,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}}
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (argument,), (result,) = session.get_inputs(), session.get_outputs()
    assert isinstance(result.shape[0], str), "the batch has a name and no size"
    for size in (1, 2, 5):
        sample = batch_of(x, size)
        (out,) = session.run(None, {argument.name: sample.numpy()})
        assert_same([torch.from_numpy(out)], [module(sample).detach()])


@each(OPS, LAYERS, FORMATS, MODELS)
def test_a_jit_trace_holds_plain_operators(case: Case) -> None:
    """It can be saved and run where fastvit is not installed."""
    module, x = case.make()
    traced = torch.jit.trace(module, (x,))
    assert "fastvit::" not in str(traced.inlined_graph)
    for size in (1, 5):
        sample = batch_of(x, size)
        assert_same([traced(sample)], [module(sample)])

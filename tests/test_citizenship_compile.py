# SPDX-License-Identifier: Apache-2.0
"""One graph for every batch size, in training and in evaluation."""

from __future__ import annotations

import copy

import pytest
import torch
from citizenship_cases import LAYERS, MODELS, OPS, Case, assert_same, batch_of, each, step
from torch._dynamo.testing import CompileCounterWithBackend


@pytest.fixture(autouse=True)
def compiler() -> None:
    torch._dynamo.reset()


@each(OPS, LAYERS, MODELS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiles_for_two_batch_sizes_and_no_more(case: Case, training: bool) -> None:
    """The second size makes the graph a dynamic one, which serves all others, also backwards.

    What Inductor makes of the graphs of the layers and of a model stands in test_transforms.py
    and test_models.py; here it would cost minutes of C++.
    """
    module, x = case.make(training)
    twin = copy.deepcopy(module)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for size in (2, 3):
        sample = batch_of(x, size)
        assert_same(step(compiled, sample), step(twin, sample))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (5, 4):
            sample = batch_of(x, size)
            assert_same(step(compiled, sample), step(twin, sample))
    assert counter.frame_count == 2
    assert_same(list(module.buffers()), list(twin.buffers()))


@each(OPS, LAYERS, MODELS)
def test_a_batch_that_is_marked_dynamic_is_compiled_once(case: Case) -> None:
    """PyTorch raises where a marked axis is specialised."""
    module, x = case.make()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    with torch.no_grad():
        for size in (2, 3, 5):
            sample = batch_of(x, size)
            torch._dynamo.mark_dynamic(sample, 0)
            assert_same([compiled(sample)], [module(sample)])
    assert counter.frame_count == 1


@each(OPS, LAYERS, MODELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_compiles_under_autocast(case: Case, dtype: torch.dtype) -> None:
    module, x = case.make(training=True)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype):
        actual, expected = step(compiled, x), step(twin, x)
    assert [a.dtype for a in actual] == [e.dtype for e in expected]
    assert_same(actual, expected, rtol=8 * torch.finfo(dtype).eps)

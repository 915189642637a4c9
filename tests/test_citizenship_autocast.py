# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: the dtypes of outputs and gradients, nesting, loss scaling, activation
checkpoints inside autocast.
"""

from __future__ import annotations

import copy

import pytest
import torch
from citizenship_cases import LAYERS, MODELS, OPS, Case, assert_same, batch_of, each, step
from torch.utils.checkpoint import checkpoint

import fastvit
from fastvit.testing import assert_agreement

DTYPES = [torch.float16, torch.bfloat16]


@each(OPS, LAYERS, MODELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_output_in_the_autocast_dtype_gradients_in_the_parameters(
    case: Case, dtype: torch.dtype, training: bool
) -> None:
    """And no worse than PyTorch's operators under the same autocast."""
    module, x = case.make(training)
    twin = copy.deepcopy(module)
    exact = step(copy.deepcopy(module).double(), x.double())
    with torch.autocast("cpu", dtype):
        actual = step(module, x)
        with fastvit.backend("reference"):
            reference = step(twin, x)
    assert actual[0].dtype == dtype
    assert [g.dtype for g in actual[1:]] == [p.dtype for p in module.parameters()]
    # A few numbers each, so that chance within a factor of three must pass.
    for a, r, e in zip(actual, reference, exact, strict=True):
        floor = 4 * torch.finfo(dtype).eps
        assert_agreement(a, r, e, rms=True, floor=floor, scale=float(e.abs().max()) or 1.0)
    assert_same(list(module.buffers()), list(twin.buffers()), rtol=8 * torch.finfo(dtype).eps)


@each(OPS, LAYERS, MODELS)
def test_the_backward_may_run_outside(case: Case) -> None:
    """As training loops do it, though ``step`` does not."""
    module, x = case.make()
    with torch.autocast("cpu", torch.bfloat16):
        _, *expected = step(module, x)
        module.zero_grad()
        loss = module(x).square().sum()
    loss.backward()
    assert_same([p.grad for p in module.parameters()], expected, rtol=1e-2)


@each(OPS, LAYERS, MODELS)
def test_nested(case: Case) -> None:
    module, x = case.make()
    plain = module(x)
    # With its cache PyTorch gives a Linear in the inner block the weights of the outer.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        outer = module(x)
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            assert module(x).dtype == torch.float16
        with torch.autocast("cpu", enabled=False):
            inner = module(x)
        assert torch.equal(module(x), outer)
    assert inner.dtype == torch.float32
    assert torch.equal(inner, plain)
    assert torch.equal(module(x), plain)


@each(OPS, LAYERS, MODELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_module_in_half_precision_takes_float32_under_autocast(
    case: Case, dtype: torch.dtype
) -> None:
    """What is left of a model that was converted by hand, and the reverse."""
    module, x = case.make()
    with torch.autocast("cpu", dtype):
        assert module(x.to(dtype)).dtype == dtype
        converted = copy.deepcopy(module).to(dtype)
        out = converted(x)
        out.sum().backward()
    assert out.dtype == dtype
    assert {p.grad.dtype for p in converted.parameters()} == {dtype}


@each(OPS, LAYERS, MODELS)
def test_float64_stays(case: Case) -> None:
    """PyTorch's autocast leaves it alone."""
    module, x = case.make()
    module, x = module.double(), x.double()
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same([module(x)], [expected], rtol=1e-12)


@each(LAYERS, MODELS)
def test_grad_scaler(case: Case) -> None:
    """A scaled step is the step; one with an overflow is skipped."""
    module, x = case.make(training=True)
    twin = copy.deepcopy(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with torch.autocast("cpu", torch.float16):
        loss = module(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1e6)
    scaler.step(optimizer)
    scaler.update()
    assert norm.isfinite()

    with torch.autocast("cpu", torch.float16):
        loss = twin(x).float().square().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter -= 0.1 * parameter.grad
    assert_same(list(module.parameters()), list(twin.parameters()), rtol=1e-3)

    before = [p.detach().clone() for p in module.parameters()]
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = module(x).float().square().mean()
    scaler.scale(loss * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**7
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))


@each(OPS, LAYERS, MODELS)
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_a_checkpoint_remembers_autocast(case: Case, reentrant: bool) -> None:
    module, x = case.make()
    x = batch_of(x, 3).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(x)
        actual = checkpoint(module, x, use_reentrant=reentrant)
    # Without gradients, as a reentrant one runs, the stem folds its batch norms.
    assert_same([actual], [expected], rtol=1e-2)
    parameters = list(module.parameters())
    wanted = torch.autograd.grad(expected.float().square().sum(), parameters)
    module.zero_grad()
    # Outside, where only what the checkpoint has kept says that autocast was on.
    actual.float().square().sum().backward()
    assert_same([p.grad for p in parameters], wanted, rtol=1e-2)

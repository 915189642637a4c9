# SPDX-License-Identifier: Apache-2.0
"""Modules as functions of their parameters: ``torch.func``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from citizenship_cases import LAYERS, MODELS, OPS, Case, assert_same, batch_of, each, step
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap

import fastvit

Parameters = dict[str, Tensor]


def state(module: nn.Module) -> tuple[Parameters, Parameters]:
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    return parameters, dict(module.named_buffers())


def loss(module: nn.Module, parameters: Parameters, buffers: Parameters, x: Tensor) -> Tensor:
    return functional_call(module, (parameters, buffers), (x,)).square().sum()


@each(OPS, LAYERS, MODELS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_functional_call_takes_other_parameters(case: Case, training: bool) -> None:
    module, x = case.make(training)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    parameters, buffers = state(other)
    before = [buffer.clone() for buffer in module.buffers()]
    twin = copy.deepcopy(other)
    with fastvit.backend("reference"):
        expected = twin(x)
    assert_same([functional_call(module, (parameters, buffers), (x,))], [expected])
    # What moves in training are the buffers that were given.
    assert_same(list(buffers.values()), list(twin.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), before, strict=True))


@each(OPS, LAYERS, MODELS)
def test_grad(case: Case) -> None:
    module, x = case.make()
    parameters, buffers = state(module)
    actual = grad(lambda p: loss(module, p, buffers, x))(parameters)
    _, *expected = step(module, x)
    assert_same(list(actual.values()), expected)


@each(OPS, LAYERS, MODELS)
def test_gradients_per_sample(case: Case) -> None:
    module, x = case.make()
    parameters, buffers = state(module)

    def of_one(p: Parameters, sample: Tensor) -> Tensor:
        return loss(module, p, buffers, sample[None])

    actual = vmap(grad(of_one), in_dims=(None, 0))(parameters, batch_of(x, 3))
    for i, sample in enumerate(batch_of(x, 3)):
        _, *expected = step(module, sample[None])
        assert_same([g[i] for g in actual.values()], expected)


@each(OPS, LAYERS, MODELS)
def test_an_ensemble(case: Case) -> None:
    first, x = case.make()
    second = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(0.5)
    stacked = stack_module_state([first, second])
    skeleton = copy.deepcopy(first).to("meta")

    def call(parameters: Parameters, buffers: Parameters) -> Tensor:
        return functional_call(skeleton, (parameters, buffers), (x,))

    assert_same(list(vmap(call)(*stacked)), [first(x), second(x)])


@each(OPS, LAYERS, MODELS)
def test_vmap_over_a_batch_of_batches(case: Case) -> None:
    module, x = case.make()
    stacked = torch.stack([batch_of(x, 3), batch_of(x, 3).flip(0)])
    assert_same(list(vmap(module)(stacked)), [module(sample) for sample in stacked])


@each(OPS, LAYERS)
def test_jacrev(case: Case) -> None:
    """The rows of the Jacobian, weighted, are the gradient of a weighted sum."""
    module, x = case.make()
    sample = x[:1]
    jacobian = jacrev(module)(sample)
    out = module(sample.requires_grad_())
    weights = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, sample, weights)
    actual = torch.tensordot(weights, jacobian, dims=out.ndim)
    assert_same([actual], [expected])


@each(OPS, LAYERS, MODELS)
@pytest.mark.parametrize("way", ["jvp", "hessian", "dual"])
def test_forward_mode_is_refused(case: Case, way: str) -> None:
    """A tangent of zero in silence would be the alternative."""
    module, x = case.make()

    def differentiate() -> Any:
        if way == "jvp":
            return jvp(module, (x,), (torch.ones_like(x),))
        if way == "hessian":
            return hessian(lambda t: module(t).square().sum())(x[:1])
        with torch.autograd.forward_ad.dual_level():
            return module(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))

    with pytest.raises(RuntimeError, match="backend='reference'"):
        differentiate()


@each(OPS, LAYERS, MODELS)
def test_the_reference_backend_has_forward_mode(case: Case) -> None:
    module, x = case.make()
    module, x, tangent = module.double(), x.double(), torch.randn_like(x.double())
    with fastvit.backend("reference"):
        _, actual = jvp(module, (x,), (tangent,))
        step_size = 1e-6
        above, below = module(x + step_size * tangent), module(x - step_size * tangent)
    assert_same([actual], [(above - below) / (2 * step_size)])

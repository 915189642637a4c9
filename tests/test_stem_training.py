# SPDX-License-Identifier: Apache-2.0
"""What training loops do to a stem, against the same done to PyTorch's own modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastvit
from fastvit import ConvStem, reference
from fastvit.functional import ConvStage, conv_stem

#: Backend and the dtype that it is compared in.
BACKENDS = [
    pytest.param(("torch", torch.float64), id="torch"),
    pytest.param(("triton", torch.float32), id="triton"),
]


@pytest.fixture(params=BACKENDS)
def stems(request: pytest.FixtureRequest) -> tuple[ConvStem, reference.ConvStem]:
    """Our stem on a backend, and PyTorch's modules with the same state."""
    return pair(*request.param)


def pair(backend: str, dtype: torch.dtype, **options: Any) -> tuple[ConvStem, reference.ConvStem]:
    theirs = reference.ConvStem(3, (8, 16), (2, 1), 8, dtype=dtype, **options)
    with torch.no_grad():
        for stage in theirs.stages:
            stage.bn.weight.normal_(1, 0.3)
            stage.bn.bias.normal_()
    ours = ConvStem(3, (8, 16), (2, 1), 8, dtype=dtype, backend=backend, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def images(module: nn.Module) -> Tensor:
    return torch.randn(2, 3, 9, 12, dtype=next(module.parameters()).dtype)


def assert_close(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert (x is None) == (actual[name] is None), name
        if x is not None:
            rtol = 1e-9 if x.dtype == torch.float64 else 1e-4
            torch.testing.assert_close(
                actual[name], x, rtol=rtol, atol=rtol, msg=lambda m, name=name: f"{name}: {m}"
            )


def gradients(module: nn.Module, x: Tensor, call: Any = None) -> dict[str, Tensor | None]:
    """Of a quadratic loss: of the images and all parameters, None where nobody asks."""
    module.zero_grad()
    x = x.detach().requires_grad_(x.requires_grad)
    (call or module)(x).square().sum().backward()
    return {"input": x.grad, **{n: p.grad for n, p in module.named_parameters()}}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "wanted",
    [
        ("input",),
        ("1.conv.weight",),
        ("0.bn.weight", "1.bn.weight"),
        ("0.bn.bias",),
        ("2.conv.weight",),
        ("2.conv.bias",),
        ("0.conv.weight", "2.conv.bias"),
        ("input", "1.bn.bias"),
    ],
    ids=lambda names: "-".join(names),
)
def test_some_gradients_are_those_of_all(stems, wanted, training) -> None:
    ours = stems[0].train(training)
    x = images(ours).requires_grad_()
    everything = gradients(ours, x)
    x.requires_grad_("input" in wanted)
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(name in wanted)
    expected = {n: g if n in wanted else None for n, g in everything.items()}
    assert_close(gradients(ours, x), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(stems, reentrant) -> None:
    """The forward runs twice, and twice the running statistics move."""
    found = []
    for module in stems:
        x = torch.ones(2, 3, 9, 12, dtype=images(module).dtype).cumsum(-1).sin().requires_grad_()

        def call(x: Tensor, module: nn.Module = module) -> Tensor:
            return checkpoint(lambda x: module(x).exp(), x, use_reentrant=reentrant)

        found.append({**gradients(module, x, call), **dict(module.named_buffers())})
    assert_close(*found)
    assert found[0]["0.bn.num_batches_tracked"] == 2


def test_a_checkpoint_that_stops_early(stems) -> None:
    """A recomputation ends when all that was saved is there again. Where the stem is the last thing
    inside, that is before its statistics would move a second time.
    """
    ours, _ = stems
    twin = copy.deepcopy(ours)
    x = images(ours).requires_grad_()
    expected = gradients(twin, x)
    actual = gradients(ours, x, lambda x: checkpoint(ours, x, use_reentrant=False))
    assert_close(actual, expected)
    assert_close(dict(ours.named_buffers()), dict(twin.named_buffers()))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_modes_take_turns(stems, momentum) -> None:
    """Training, evaluation, training, frozen norms in training, and training again."""
    ours, theirs = stems
    for module in stems:
        for stage in module.stages:
            stage.bn.momentum = momentum
    for mode in ("train", "eval", "train", "frozen", "train"):
        x = images(ours).requires_grad_()
        found = []
        for module in stems:
            module.train(mode != "eval")
            for stage in module.stages:
                stage.bn.train(mode == "train")
            found.append({**gradients(module, x), **dict(module.named_buffers())})
        assert ours._fusible()
        assert_close(*found)
        assert_close({"out": ours(x)}, {"out": theirs(x)})


class TestCumulativeAverage:
    """momentum=None."""

    @pytest.mark.parametrize("ahead", [0, 3])
    def test_of_norms_with_their_own_counters(self, stems, ahead) -> None:
        for module in stems:
            for stage in module.stages:
                stage.bn.momentum = None
            module.stages[1].bn.num_batches_tracked += ahead
        ours, theirs = stems
        assert ours._fusible()
        for _ in range(3):
            x = images(ours)
            assert_close({"out": ours(x)}, {"out": theirs(x)})
            assert_close(ours.state_dict(), theirs.state_dict())

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_of_nothing_tracked(self, training) -> None:
        ours, theirs = pair("torch", torch.float64, norm_momentum=None)
        for module in (ours, theirs):
            for stage in module.train(training).stages:
                stage.bn.track_running_stats = False
                stage.bn.running_mean = stage.bn.running_var = stage.bn.num_batches_tracked = None
        assert ours._fusible()
        x = images(ours).requires_grad_()
        assert_close(gradients(ours, x), gradients(theirs, x))

    def test_in_half_precision(self) -> None:
        """The share itself is not rounded to eight bits."""
        ours, theirs = pair("torch", torch.bfloat16, norm_momentum=None)
        exact = copy.deepcopy(theirs).double()
        for _ in range(3):
            x = images(ours)
            for module in (ours, theirs, exact):
                module(x.to(images(module).dtype))
        for i in range(2):
            for name in ("running_mean", "running_var"):
                three = (getattr(m.stages[i].bn, name) for m in (ours, theirs, exact))
                fastvit.testing.assert_agreement(*three, name=f"{i}.{name}", rms=True)

    def test_compiled(self) -> None:
        torch._dynamo.reset()
        ours, theirs = pair("torch", torch.float64, norm_momentum=None)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            x = images(ours)
            assert_close({"out": compiled(x)}, {"out": theirs(x)})
            assert_close(ours.state_dict(), theirs.state_dict())

    def test_an_average_without_a_counter_stays_with_pytorch(self) -> None:
        ours, _ = pair("torch", torch.float64, norm_momentum=None)
        ours.stages[0].bn.num_batches_tracked = None
        assert not ours._fusible()


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("momentum", [torch.tensor(0.25), torch.tensor([0.25, 0.5])], ids=str)
def test_momentum_that_the_device_knows(backend: str, momentum: Tensor) -> None:
    ours, theirs = pair("reference", torch.float32)
    for stage, share in zip(theirs.stages, momentum.expand(2).tolist(), strict=True):
        stage.bn.momentum = share
    x, conv = images(ours), ours.projection.conv
    stages = [
        ConvStage(s.conv.weight, s.bn.weight, s.bn.bias, s.bn.running_mean, s.bn.running_var, 2 - i)
        for i, s in enumerate(ours.stages)
    ]
    options = {"training": True, "momentum": momentum, "backend": backend}
    out = conv_stem(x, stages, conv.weight, conv.bias, **options)
    assert_close({"out": out}, {"out": theirs(x)})
    for name, buffer in theirs.named_buffers():
        if buffer.ndim:
            assert_close({name: ours.get_buffer(name)}, {name: buffer})

# SPDX-License-Identifier: Apache-2.0
"""Faults that were found once. Each docstring tells the story."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import fastvit
from fastvit.functional import gpsa_attention, patch_embed
from fastvit.testing import assert_agreement

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_hook_on_pos_proj_is_called(backend: str) -> None:
    """The reference used pos_proj's weight without calling it, so nobody could watch or wrap it."""
    layer = fastvit.GPSA(16, 4, backend=backend)
    seen = []
    layer.pos_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    layer(torch.randn(2, 9, 16))
    assert seen == [(2, 9, 9, 4)]


def test_an_adapter_on_pos_proj_learns() -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * self.base(x)

    layer = fastvit.GPSA(16, 4)
    layer.pos_proj = Adapter(layer.pos_proj)  # type: ignore[assignment]
    layer(torch.randn(2, 9, 16)).square().sum().backward()
    assert layer.pos_proj.scale.grad.abs() > 0


def test_from_module_keeps_a_frozen_batch_norm_frozen() -> None:
    """train() on the new layer woke it, and its shared running mean moved."""
    stem = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1)
    )
    stem.train()
    stem[1].eval()
    layer = fastvit.ConvStem.from_module(stem)
    before = stem[1].running_mean.clone()
    layer(torch.randn(2, 3, 8, 8))
    assert torch.equal(stem[1].running_mean, before)


def test_a_training_step_may_come_between_an_eval_forward_and_its_backward() -> None:
    """The backward held the running buffers, which the training step changes in place."""
    stem, x = fastvit.ConvStem(3, (4,), (2,), 5), torch.randn(2, 3, 8, 8)
    expected = torch.autograd.grad(stem.eval()(x).sum(), stem.parameters())
    out = stem(x)
    stem.train()(x)
    for actual, e in zip(torch.autograd.grad(out.sum(), stem.parameters()), expected, strict=True):
        torch.testing.assert_close(actual, e)


def test_buffers_that_are_not_tracked_stay() -> None:
    stem = fastvit.ConvStem(3, (4,), (2,), 5)
    stem.stages[0].bn.track_running_stats = False
    before = stem.state_dict()["0.bn.running_mean"].clone()
    stem(torch.randn(2, 3, 8, 8))
    assert torch.equal(stem.state_dict()["0.bn.running_mean"], before)
    assert stem.stages[0].bn.num_batches_tracked == 0


@pytest.mark.parametrize(("learned", "count"), [((), 0), ((2,), 1), ((1, 2), 2)], ids=str)
def test_frozen_stages_cost_no_backward(learned: tuple[int, ...], count: int) -> None:
    """Training the last 1x1 alone went back through all stages: 50 times the work."""
    stem = fastvit.ConvStem(3, (4, 6, 8), (2, 2, 1), 5)
    for i, stage in enumerate(stem.stages):
        stage.requires_grad_(i in learned)
    out = stem(torch.randn(2, 3, 16, 16))
    # The profiler sees the operators inside our ops.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out.square().sum().backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.get("aten::convolution_backward", 0) == count
    assert all((p.grad is not None) == p.requires_grad for p in stem.parameters())


def test_float16_gradients_do_not_overflow_in_sums_over_the_grid() -> None:
    """Sums over a line of the grid and all channels were float16: NaN and Inf in the gate's and
    the position's gradients, where the reference is finite.
    """
    q, k, v = (torch.randn(1, 3, 196, 64, dtype=torch.float16) for _ in range(3))
    grad = ((torch.randn(1, 3, 196, 64) + 3) * 500).half()
    results = []
    for backend, dtype in (("torch", torch.float16), ("reference", torch.float64)):
        weight, gate = torch.ones(3, 3, dtype=dtype), torch.zeros(3, dtype=dtype)
        leaves = [weight.float().requires_grad_(), gate.float().requires_grad_()]
        if dtype == torch.float64:
            leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
        inputs = [x.to(dtype) for x in (q, k, v)]
        out = gpsa_attention(*inputs, *leaves, (14, 14), backend=backend)
        results.append(torch.autograd.grad(out, leaves, grad.to(dtype)))
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("size", [0.02, 0.0005])
def test_uint8_with_small_float16_weights(size: float) -> None:
    """W / (255 std) was subnormal in float16."""
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    weight = (torch.randn(8, 3, 16, 16) * size).half()
    for mean, std in ((None, None), (MEAN, STD)):
        options = {"mean": mean, "std": std}
        expected = patch_embed(images, weight.double(), backend="reference", **options)
        errors = [
            (patch_embed(images, weight, backend=b, **options).double() - expected).abs().max()
            for b in ("torch", "reference")
        ]
        assert errors[0] <= 2 * errors[1] + 2e-3 * expected.abs().max()


def test_the_output_may_be_modified_in_place() -> None:
    """It was a view made inside the Function, which autograd does not let anyone modify."""
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    out = gpsa_attention(q, q, q, torch.ones(2, 3), torch.zeros(2), (4, 4))
    out.mul_(2).sum().backward()
    assert q.grad is not None


def test_a_backend_block_ends_with_its_thread() -> None:
    """Blocks of two threads that end in the order they began left the first one's choice."""
    first_entered, second_entered, first_left = (threading.Event() for _ in range(3))

    def first() -> None:
        with fastvit.backend("reference"):
            first_entered.set()
            second_entered.wait(10)
        first_left.set()

    def second() -> None:
        first_entered.wait(10)
        with fastvit.backend("torch"):
            second_entered.set()
            first_left.wait(10)

    from fastvit.ops.backend import requested

    before = requested(None)
    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert requested(None) == before


def test_malformed_images_are_named() -> None:
    """Their sides were read before their rank was checked."""
    weight = torch.randn(4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"images: expected \(B, 3, H, W\).*got shape \(8,\)"):
        patch_embed(torch.randn(8), weight)
    with pytest.raises(TypeError, match=r"images: expected a tensor.*got list"):
        patch_embed([[0.0]], weight)  # type: ignore[arg-type]


def test_mean_and_std_may_be_tensors() -> None:
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    weight = torch.randn(4, 3, 8, 8)
    statistics = {"mean": torch.tensor(MEAN), "std": torch.tensor(STD)}
    torch.testing.assert_close(
        patch_embed(images, weight, **statistics), patch_embed(images, weight, mean=MEAN, std=STD)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_a_stem_on_no_images_has_zero_gradients(dtype: torch.dtype, training: bool) -> None:
    """PyTorch's batch norm backward divides by the number of values, and the process dies."""
    stem = fastvit.ConvStem(3, (4, 6), (2, 2), 5, dtype=dtype).train(training)
    out = stem(torch.randn(0, 3, 16, 16, dtype=dtype))
    grads = torch.autograd.grad(out.sum(), list(stem.parameters()))
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(9, 1), (1, 1), (8, 2), (1, 9), (4, 3), (33, 2)])
def test_a_stem_on_images_of_one_column(dtype: torch.dtype, size: tuple[int, int]) -> None:
    """oneDNN's convolutions in bfloat16 are garbage where they give one column: with AMX in any
    layout, so the reference is asked without oneDNN.
    """
    torch.manual_seed(0)
    stem = fastvit.ConvStem(3, (4, 6), (2, 2), 5).eval()
    x = torch.randn(4, 3, *size)

    def results(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        with fastvit.backend(backend):
            model = copy.deepcopy(stem).to(dtype)
            out = model(x.to(dtype))
            with torch.no_grad():
                inferred = model(x.to(dtype))
            return [inferred, *torch.autograd.grad(out.sum(), list(model.parameters()))]

    actual, exact = results(dtype, "torch"), results(torch.float64, "reference")
    with torch.backends.mkldnn.flags(enabled=False):
        plain = results(dtype, "reference")
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert_agreement(a, p, e, rms=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiny_variances_reach_the_running_statistics(dtype: torch.dtype) -> None:
    """Far below eps; out of the batch norm's rstd they would come with three digits."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16) * 1e-4
    stem = fastvit.ConvStem(3, (4,), (2,), 5, norm_momentum=1.0).train()
    half = copy.deepcopy(stem).to(dtype)
    half[0].bn.float()
    half(x.to(dtype))
    conv = half[0].conv.weight.double()
    raw = torch.nn.functional.conv2d(x.to(dtype).double(), conv, stride=2, padding=1)
    expected = raw.var((0, 2, 3))
    torch.testing.assert_close(half[0].bn.running_var.double(), expected, rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("missing", [("bias",), ("weight", "bias")], ids="-".join)
def test_a_batch_norm_without_bias(missing: tuple[str, ...]) -> None:
    """The op wants both parameters, and PyTorch's batch norm may lack them."""
    stem, images = (
        fastvit.ConvStem(channels=(4, 8), strides=(2, 2), embed_dim=8),
        torch.randn(2, 3, 16, 16),
    )
    for name in missing:
        setattr(stem[1].bn, name, None)
    expected = copy.deepcopy(stem)
    expected.backend = "reference"
    torch.testing.assert_close(stem(images), expected(images))
    torch.testing.assert_close(stem[1].bn.running_var, expected[1].bn.running_var)


def test_results_may_be_changed_in_place_whatever_made_them():
    """Before torch 2.15 ``linear`` gives a view, which no Function may hand out."""
    from fastvit.ops.library import differentiable

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return (2 * x).view(-1), x.shape[0]

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.shape = inputs[0].shape

        @staticmethod
        def backward(ctx, grad, _):
            return 2 * grad.view(ctx.shape)

    x = torch.ones(2, 3, requires_grad=True)
    doubled, rows = differentiable(Doubled)(Doubled.forward)(x)
    doubled.add_(1.0).sum().backward()
    assert rows == 2
    assert torch.equal(doubled, torch.full((6,), 3.0))
    assert torch.equal(x.grad, torch.full((2, 3), 2.0))

# SPDX-License-Identifier: Apache-2.0
"""GPSA against the dense formula in float64 and against timm's module."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from timm.models.convit import GPSA as TimmGPSA
from torch import Tensor

import fastvit
from fastvit import GPSA
from fastvit.functional import gpsa_attention
from fastvit.testing import CANCELLING, poisoned_allocations

BACKENDS = ["reference", "torch", None]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# Sums over all pairs of tokens that cancel.
FLOORS = {"grad of pos_weight": CANCELLING, "grad of gating_param": CANCELLING}
MODULE_FLOORS = {"grad of pos_proj.weight": CANCELLING, "grad of gating_param": CANCELLING}

GEOMETRIES = [
    # grid, heads, head dim
    pytest.param((14, 14), 9, 48, id="convit_small-14x14"),
    pytest.param((14, 14), 16, 48, id="convit_base-14x14"),
    pytest.param((4, 16), 3, 16, id="square_count_of_a_wide_grid-4x16"),
    pytest.param((16, 4), 3, 16, id="tall-16x4"),
    pytest.param((1, 7), 1, 5, id="one_row_one_head_odd_dim-1x7"),
    pytest.param((7, 1), 16, 5, id="one_column-7x1"),
    pytest.param((1, 1), 3, 16, id="one_token-1x1"),
]


def relative_positions(grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(N, N, 3): (dx, dy, dx² + dy²) of key j minus query i, tokens numbered row by row."""
    tokens = [(row, col) for row in range(grid[0]) for col in range(grid[1])]
    rows, cols = torch.tensor(tokens, dtype=dtype).unbind(1)
    dx, dy = cols[None, :] - cols[:, None], rows[None, :] - rows[:, None]
    return torch.stack([dx, dy, dx**2 + dy**2], dim=-1)


def dense_map(q, k, pos_weight, gating_param, grid_size, scale=None):
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    content = ((q @ k.transpose(-2, -1)).to(wide) * scale).softmax(-1)
    scores = torch.einsum("ijc,hc->hij", relative_positions(grid_size, wide), pos_weight.to(wide))
    gate = gating_param.to(wide).sigmoid()[:, None, None]
    return (1 - gate) * content + gate * scores.softmax(-1)


def dense_gpsa(q, k, v, pos_weight, gating_param, grid_size, scale=None):
    """Equation 7 of the paper with all N x N maps, at least in float32."""
    return dense_map(q, k, pos_weight, gating_param, grid_size, scale).to(v.dtype) @ v


def dense_module(module: GPSA, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """models.md 1.2, from the parameters of ``module``."""
    batch, tokens, dim = x.shape

    def heads(y: Tensor) -> Tensor:
        return y.reshape(batch, tokens, module.num_heads, -1).transpose(1, 2)

    q, k = map(heads, module.qk(x).chunk(2, dim=-1))
    out = dense_gpsa(
        q, k, heads(module.v(x)), module.pos_proj.weight, module.gating_param, grid, module.scale
    )
    return module.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


def problem(grid, heads, dim, dtype=torch.float32, *, batch=2, seed=0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tokens = grid[0] * grid[1]
    slope = torch.tensor([1.0, 1.0, 0.25]).to(dtype)
    return {
        "q": draw(batch, heads, tokens, dim),
        "k": draw(batch, heads, tokens, dim),
        "v": draw(batch, heads, tokens, dim),
        # Negative on the squared distance, as trained heads are: a Gaussian around an offset.
        "pos_weight": draw(heads, 3) * slope - torch.tensor([0, 0, 1.0]).to(dtype),
        "gating_param": draw(heads),
        "grid_size": grid,
    }


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter.shape[-1]
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)


@pytest.fixture(params=BACKENDS, ids=str)
def gpsa(request):
    return partial(gpsa_attention, backend=request.param)


class TestOp:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize(("grid", "heads", "dim"), GEOMETRIES)
    def test_agrees_with_the_dense_formula(self, gpsa, grid, heads, dim, dtype, check_numbers):
        floors = FLOORS if dtype == torch.float32 else dict.fromkeys(FLOORS, 1e-10)
        check_numbers(gpsa, dense_gpsa, [problem(grid, heads, dim, dtype)], floors=floors)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_agrees_in_half_precision(self, gpsa, dtype, check_numbers):
        """Errors of a handful of cancelling sums are chance, so those of many draws count."""
        problems = [problem((5, 7), 4, 16, dtype, seed=seed) for seed in range(12)]
        check_numbers(gpsa, dense_gpsa, problems, rms=list(FLOORS))

    @pytest.mark.parametrize(
        ("grid", "heads", "dim", "draws"),
        [
            pytest.param((4, 6), 4, 16, 40, id="4x6"),
            pytest.param((14, 14), 4, 48, 6, id="convit_tiny-14x14"),
        ],
    )
    def test_positions_and_gates_may_stay_in_float32(
        self, gpsa, grid, heads, dim, draws, check_numbers
    ):
        """As in mixed precision, with all gradients at the dtype of what they belong to."""
        problems = []
        for seed in range(draws):
            p = problem(grid, heads, dim, torch.bfloat16, seed=seed)
            p |= {name: p[name].float() for name in ("pos_weight", "gating_param")}
            problems.append(p)
        check_numbers(gpsa, dense_gpsa, problems, rms=list(FLOORS))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("gpsa", ["torch", None], indirect=True, ids=str)
    def test_squared_distances_that_the_dtype_cannot_hold(self, gpsa, dtype, check_numbers):
        """299² overflows float16 and bfloat16 is exact to 256 only; the logits are float32."""
        p = problem((1, 300), 2, 8, dtype, batch=1)
        p["pos_weight"] = torch.tensor([[0.5, 0, -0.001], [40.0, 0, -0.07]], dtype=dtype)
        p["gating_param"] = torch.full((2,), 2.0, dtype=dtype)
        out = gpsa(**p)
        expected = dense_gpsa(**{n: getattr(x, "double", lambda x=x: x)() for n, x in p.items()})
        error = (out.double() - expected).abs().max() / expected.abs().max()
        assert error < 4 * torch.finfo(dtype).eps
        check_numbers(gpsa, dense_gpsa, [p], rms=list(FLOORS))

    @pytest.mark.parametrize(
        ("pos_weight", "gating"),
        [
            pytest.param([3.0, -2.0, -100.0], 1.0, id="one_key_only"),
            pytest.param([0.0, 0.0, 2.0], 1.0, id="far_corners"),
            pytest.param([1e4, -1e4, -1e4], 1.0, id="logits_of_a_million"),
            pytest.param([0.0, 0.0, 0.0], 0.0, id="uniform"),
            pytest.param([1.0, 1.0, -1.0], 100.0, id="gate_open_position_only"),
            pytest.param([1.0, 1.0, -1.0], -100.0, id="gate_shut_content_only"),
        ],
    )
    def test_extreme_heads(self, gpsa, pos_weight, gating, check_numbers):
        p = problem((4, 5), 2, 8)
        p["pos_weight"] = torch.tensor([pos_weight] * 2)
        p["gating_param"] = torch.full((2,), gating)
        check_numbers(gpsa, dense_gpsa, [p], floors=FLOORS)

    def test_large_content_scores_do_not_overflow(self, gpsa, check_numbers):
        """Scores of 4000 are rounded to 4000 ulp, and so is a map recomputed from them."""
        p = problem((3, 4), 2, 8)
        p["q"] = p["q"] * 1e3
        floors = {f"grad of {n}": 8e3 * torch.finfo(torch.float32).eps for n in "qkv"}
        check_numbers(gpsa, dense_gpsa, [p], floors=FLOORS | floors)

    @pytest.mark.parametrize("scale", [0.37, 0.0, -1.0])
    def test_scale_replaces_the_default(self, gpsa, scale, check_numbers):
        p = problem((3, 4), 2, 8, torch.float64) | {"scale": scale}
        check_numbers(gpsa, dense_gpsa, [p], floors=dict.fromkeys(FLOORS, 1e-10))

    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_batch_sizes(self, gpsa, batch, check_numbers):
        p = problem((3, 4), 2, 8, torch.float64, batch=batch)
        check_numbers(gpsa, dense_gpsa, [p], floors=dict.fromkeys(FLOORS, 1e-10))

    @pytest.mark.parametrize(
        "relayout",
        [
            pytest.param(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), id="bnhd"),
            pytest.param(
                lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), id="rev"
            ),
            pytest.param(lambda x: torch.stack([x, x * 7], -1)[..., 0], id="inner_stride_2"),
            pytest.param(lambda x: torch.cat([x * 7, x], 1)[:, x.shape[1] :], id="offset"),
            pytest.param(lambda x: torch.cat([x * 7, x], 3)[..., x.shape[3] :], id="row_stride"),
            pytest.param(lambda x: x[:1].expand_as(x), id="expanded_batch"),
            pytest.param(lambda x: x[:, :1].expand_as(x), id="expanded_heads"),
            pytest.param(lambda x: x[..., :1].expand_as(x), id="expanded_channels"),
        ],
    )
    @pytest.mark.parametrize("names", ["q", "k", "v", "qkv"])
    def test_any_strides(self, gpsa, relayout, names, check_numbers):
        p = problem((3, 4), 3, 8, torch.float64)
        p |= {name: relayout(p[name]) for name in names}
        check_numbers(gpsa, dense_gpsa, [p], floors=dict.fromkeys(FLOORS, 1e-10))

    def test_views_of_one_projection(self, gpsa, check_numbers):
        """q, k and v as a packed linear layer gives them; gradients meet in one tensor."""
        packed = torch.randn(2, 12, 3 * 3 * 8, dtype=torch.float64)
        p = problem((3, 4), 3, 8, torch.float64)

        def through_views(op, packed, pos_weight, gating_param):
            q, k, v = packed.view(2, 12, 3, 3, 8).permute(2, 0, 3, 1, 4)
            return op(q, k, v, pos_weight, gating_param, (3, 4))

        inputs = {"packed": packed, **{n: p[n] for n in ("pos_weight", "gating_param")}}
        check_numbers(
            partial(through_views, gpsa),
            partial(through_views, dense_gpsa),
            [inputs],
            floors=dict.fromkeys(FLOORS, 1e-10),
        )

    def test_cotangent_of_any_strides(self, gpsa):
        """An expanded gradient, as ``out.sum()`` makes, and a transposed one."""
        p = problem((3, 4), 2, 8, torch.float64)
        names = ["q", "k", "v", "pos_weight", "gating_param"]
        leaves = [p[name].requires_grad_() for name in names]
        weights = torch.randn(2, 8, 12, 2, dtype=torch.float64)
        for reduce in (torch.sum, lambda out: (out.transpose(1, 3) * weights).sum()):
            actual = torch.autograd.grad(reduce(gpsa(*leaves, (3, 4))), leaves)
            expected = torch.autograd.grad(reduce(dense_gpsa(*leaves, (3, 4))), leaves)
            for name, a, e in zip(names, actual, expected, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11, msg=name)

    @pytest.mark.parametrize("backend", ["torch", "auto"])
    def test_merging_the_heads_copies_nothing(self, backend):
        out = gpsa_attention(**problem((3, 4), 2, 8), backend=backend)
        assert out.shape == (2, 2, 12, 8)
        assert out.transpose(1, 2).is_contiguous()

    @pytest.mark.parametrize("wanted", ["q", "k", "v", "pos_weight", "gating_param"])
    def test_each_gradient_alone(self, gpsa, wanted):
        p = problem((3, 4), 2, 8, torch.float64)
        p[wanted].requires_grad_()
        gpsa(**p).square().sum().backward()
        (expected,) = torch.autograd.grad(dense_gpsa(**p).square().sum(), p[wanted])
        torch.testing.assert_close(p[wanted].grad, expected, rtol=1e-9, atol=1e-11)
        assert all(getattr(x, "grad", None) is None for n, x in p.items() if n != wanted)

    def test_nothing_to_differentiate(self, gpsa):
        assert not gpsa(**problem((3, 4), 2, 8)).requires_grad

    def test_gradcheck(self, gpsa):
        p = problem((2, 3), 2, 4, torch.float64, batch=1)
        leaves = [p[n].requires_grad_() for n in ("q", "k", "v", "pos_weight", "gating_param")]
        assert torch.autograd.gradcheck(lambda *x: gpsa(*x, (2, 3)), leaves)

    def test_second_derivatives_are_right_or_refused(self, gpsa):
        p = problem((2, 3), 2, 4, torch.float64, batch=1)
        leaves = [p[n].requires_grad_() for n in ("q", "k", "v", "pos_weight", "gating_param")]

        def second(op):
            out = op(*leaves, (2, 3))
            first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

        try:
            actual = second(gpsa)
        except RuntimeError as error:
            if "differentiated again" not in str(error):
                raise
            return
        for a, e in zip(actual, second(dense_gpsa), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)

    def test_inputs_are_left_alone(self, gpsa, differentiate):
        p = problem((3, 4), 2, 8)
        before = copy.deepcopy(p)
        differentiate(gpsa, p)
        assert all(torch.equal(p[n], before[n]) for n in p if isinstance(p[n], Tensor))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
    @pytest.mark.parametrize("name", ["q", "k", "v", "pos_weight", "gating_param"])
    def test_nan_and_inf_go_through_as_in_the_formula(self, gpsa, name, value):
        p = problem((3, 4), 2, 8)
        p[name].view(-1)[3 if name == "pos_weight" else 1] = value
        torch.testing.assert_close(gpsa(**p), dense_gpsa(**p), rtol=1e-4, atol=1e-5, equal_nan=True)

    def test_repeats_bit_by_bit_on_poisoned_memory(self, gpsa, differentiate):
        """The same bits every time, and no element that nobody wrote."""
        p = problem((4, 5), 3, 8)
        first = differentiate(gpsa, p)
        with poisoned_allocations():
            again = differentiate(gpsa, p)
        for name, x in first.items():
            assert torch.equal(x, again[name]), name


def largest_allocation(run) -> int:
    """Bytes of the largest single allocation inside ``run()``, opaque ops included."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.fixture
def one_thread():
    """PyTorch's attention takes its buffer once a thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_torch_backend_makes_no_map_of_all_pairs(differentiate):
    """Its reason to exist: 1024 tokens, where one head's map has 64 times the bytes of q."""
    p = problem((32, 32), 2, 16, batch=1)
    one_map = 1024 * 1024 * 4
    sizes = {
        backend: largest_allocation(
            lambda backend=backend: differentiate(partial(gpsa_attention, backend=backend), p)
        )
        for backend in ("reference", "torch")
    }
    assert sizes["reference"] >= 2 * one_map
    # PyTorch's own attention takes a block of 512 x 512.
    assert sizes["torch"] < one_map / 2


class TestDropout:
    """Dropout acts on the mixed map; only its reference serves it."""

    # Values that show the map itself: v is the identity.
    TOKENS = 12

    def maps(self, **options):
        p = problem((3, 4), 2, self.TOKENS, batch=3)
        p["v"] = torch.eye(self.TOKENS).expand_as(p["v"])
        return gpsa_attention(**p, **options), gpsa_attention(**p)

    @pytest.mark.parametrize("backend", ["reference", None])
    def test_entries_are_dropped_or_scaled(self, backend):
        dropped, full = self.maps(dropout_p=0.25, backend=backend)
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], full[kept] / 0.75)
        # 864 draws: the share is within 5 standard deviations (0.0147 each).
        assert abs(kept.float().mean() - 0.75) < 0.074

    def test_expectation_is_the_map(self):
        draws = torch.stack([self.maps(dropout_p=0.5)[0] for _ in range(400)])
        full = self.maps()[1]
        # An entry a is 0 or 2a: standard deviation a, of the mean a / 20.
        assert ((draws.mean(0) - full).abs() <= 5 * full / 20).all()

    def test_zero_is_none_and_one_is_all(self):
        none, full = self.maps(dropout_p=0.0)
        assert torch.equal(none, full)
        assert not self.maps(dropout_p=1.0)[0].any()

    def test_seed_decides(self):
        def draw(seed):
            torch.manual_seed(seed)
            return self.maps(dropout_p=0.5)[0]

        assert torch.equal(draw(3), draw(3))
        assert not torch.equal(draw(3), draw(4))

    def test_gradients_see_the_mask(self, check_agreement, differentiate):
        p = problem((3, 4), 2, self.TOKENS, torch.float64, batch=3)

        def seeded(**tensors):
            torch.manual_seed(5)
            return gpsa_attention(**tensors, dropout_p=0.5)

        eye = torch.eye(self.TOKENS, dtype=torch.float64).expand_as(p["v"])
        mask = (seeded(**{**p, "v": eye}) != 0) * 2.0

        def masked(q, k, v, pos_weight, gating_param, grid_size):
            return (dense_map(q, k, pos_weight, gating_param, grid_size) * mask) @ v

        expected = differentiate(masked, p)
        check_agreement([differentiate(seeded, p)], [expected], [expected])

    def test_a_backend_without_it_says_so(self):
        with pytest.raises(RuntimeError, match=r"(?i)torch.*dropout"):
            self.maps(dropout_p=0.5, backend="torch")


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_op_runs_in_the_autocast_dtype(self, gpsa, dtype, differentiate):
        p = problem((3, 4), 2, 8)
        actual = differentiate(torch.autocast("cpu", dtype=dtype)(gpsa), p)
        rounded = p | {n: p[n].to(dtype) for n in "qkv"}
        expected = differentiate(gpsa, rounded)
        assert actual["output"].dtype == dtype
        for name, x in expected.items():
            # Gradients come back in float32, the dtype of what they belong to.
            assert actual[name].dtype == (dtype if name == "output" else torch.float32)
            assert torch.equal(actual[name], x.to(actual[name].dtype)), name

    @pytest.mark.parametrize("gpsa", ["torch", None], indirect=True, ids=str)
    def test_backward_inside_autocast(self, gpsa, differentiate):
        """Where many write it; it follows the forward, not the state around it."""
        p = problem((3, 4), 2, 8)
        expected = differentiate(torch.autocast("cpu", torch.bfloat16)(gpsa), p)
        with torch.autocast("cpu", torch.bfloat16):
            actual = differentiate(gpsa, p)
        with torch.autocast("cpu", torch.float16):
            mixed = differentiate(torch.autocast("cpu", torch.bfloat16)(gpsa), p)
        for name, x in expected.items():
            assert torch.equal(actual[name], x), name
            assert torch.equal(mixed[name], x), name

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_disabled_inside_enabled(self, gpsa, dtype, differentiate):
        p = problem((3, 4), 2, 8)
        expected = differentiate(gpsa, p)
        with torch.autocast("cpu", dtype=dtype), torch.autocast("cpu", enabled=False):
            actual = differentiate(gpsa, p)
        assert all(torch.equal(actual[name], x) for name, x in expected.items())

    def test_inner_dtype_wins(self, gpsa):
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", torch.float16):
            assert gpsa(**problem((3, 4), 2, 8)).dtype == torch.float16

    def test_mixed_dtypes_are_cast(self, gpsa):
        p = problem((3, 4), 2, 8)
        p["q"] = p["q"].bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            assert gpsa(**p).dtype == torch.bfloat16

    @pytest.mark.parametrize("backend", ["reference", "torch", None])
    def test_module_as_timm(self, backend, differentiate_module, check_agreement):
        results = []
        for seed in range(6):
            ours, theirs = pair(dim=24, num_heads=4, qkv_bias=True, seed=seed, backend=backend)
            x = torch.randn(2, 16, 24)
            with torch.autocast("cpu", torch.bfloat16):
                actual = differentiate_module(ours, x)
                reference = differentiate_module(theirs, x)
            assert actual["output"].dtype == reference["output"].dtype == torch.bfloat16
            expected = differentiate_module(copy.deepcopy(theirs).double(), x.double())
            # Zero in exact arithmetic; timm's is rounding noise of its dtype.
            for result in (actual, reference, expected):
                result.pop("grad of pos_proj.bias")
            results.append((actual, reference, expected))
        names = list(results[0][2])
        check_agreement(*zip(*results, strict=True), rms=names)


def pair(*, seed: int = 0, backend: str | None = None, dtype=None, **options):
    """Our GPSA and timm's with the same random parameters."""
    theirs = TimmGPSA(**options, dtype=dtype)
    randomize(theirs, seed)
    ours = GPSA(**options, dtype=dtype, backend=backend)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


class TestModule:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize(
        ("dim", "heads", "tokens", "bias"),
        [
            pytest.param(48, 1, 196, False, id="one_head"),
            pytest.param(15, 3, 49, True, id="odd_head_dim_5"),
            pytest.param(432, 9, 196, False, id="convit_small"),
            pytest.param(80, 16, 16, True, id="16_heads"),
        ],
    )
    def test_agrees_with_timm(
        self, backend, dtype, dim, heads, tokens, bias, differentiate_module, check_agreement
    ):
        ours, theirs = pair(dim=dim, num_heads=heads, qkv_bias=bias, backend=backend, dtype=dtype)
        x = torch.randn(2, tokens, dim, dtype=dtype)
        actual = differentiate_module(ours, x)
        reference = differentiate_module(theirs, x)
        expected = differentiate_module(copy.deepcopy(theirs).double(), x.double())
        bias_gradient = actual.pop("grad of pos_proj.bias")
        # Zero, and present: DistributedDataParallel takes None for an unused parameter.
        assert bias_gradient.shape == (heads,)
        assert bias_gradient.abs().max() <= 1e-4 * actual["grad of pos_proj.weight"].abs().max()
        reference.pop("grad of pos_proj.bias")
        expected.pop("grad of pos_proj.bias")
        floors = MODULE_FLOORS if dtype == torch.float32 else dict.fromkeys(MODULE_FLOORS, 1e-10)
        check_agreement([actual], [reference], [expected], floors=floors)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_in_half_precision(self, backend, dtype, differentiate_module, check_agreement):
        """``module.to(dtype)``, where the authors' own module fails."""
        results = []
        for seed in range(6):
            ours, theirs = pair(dim=24, num_heads=4, seed=seed, backend=backend, dtype=dtype)
            x = torch.randn(2, 16, 24).to(dtype)
            three = (
                differentiate_module(ours, x),
                differentiate_module(theirs, x),
                differentiate_module(copy.deepcopy(theirs).double(), x.double()),
            )
            for result in three:
                result.pop("grad of pos_proj.bias")
            results.append(three)
        check_agreement(*zip(*results, strict=True), rms=list(results[0][0]))

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_gradient_of_the_position_bias_is_exactly_zero(self, backend):
        ours, _ = pair(dim=24, num_heads=4, backend=backend)
        ours(torch.randn(2, 16, 24)).square().sum().backward()
        bound = 1e-4 * ours.pos_proj.weight.grad.abs().max()
        assert ours.pos_proj.bias.grad.abs().max() <= bound

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("given", ["constructor", "call", "call_over_constructor"])
    @pytest.mark.parametrize("grid", [(4, 16), (16, 4), (1, 64), (8, 8)], ids=str)
    def test_grids(self, backend, given, grid, check_agreement, differentiate_module):
        """64 tokens are 8 x 8 to timm whatever the image; here the grid that is given counts."""
        built = {"constructor": grid, "call": None, "call_over_constructor": (2, 32)}[given]
        module = GPSA(24, 4, qkv_bias=True, grid_size=built, backend=backend, dtype=torch.float64)
        randomize(module)
        x = torch.randn(2, 64, 24, dtype=torch.float64).requires_grad_()
        out = module(x) if given == "constructor" else module(x, grid_size=grid)
        expected = dense_module(module, x, grid)
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
        wanted = {n: p for n, p in module.named_parameters() if n != "pos_proj.bias"}
        cotangent = torch.randn_like(out)
        inputs = [x, *wanted.values()]
        actual = torch.autograd.grad(out, inputs, cotangent)
        gradients = torch.autograd.grad(expected, inputs, cotangent)
        for name, a, e in zip(["x", *wanted], actual, gradients, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-10, msg=name)

    def test_square_count_without_a_grid_is_a_square(self):
        module = GPSA(24, 4)
        randomize(module)
        x = torch.randn(2, 16, 24)
        assert torch.equal(module(x), module(x, grid_size=(4, 4)))
        assert not torch.allclose(module(x), module(x, grid_size=(2, 8)))

    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_batch_sizes(self, batch, differentiate_module):
        module = GPSA(24, 4)
        randomize(module)
        result = differentiate_module(module, torch.randn(batch, 16, 24))
        assert result["output"].shape == (batch, 16, 24)
        if batch == 0:
            assert not any(result[f"grad of {n}"].any() for n, _ in module.named_parameters())

    def test_input_of_any_strides(self):
        module = GPSA(24, 4, dtype=torch.float64)
        randomize(module)
        x = torch.randn(2, 24, 16, dtype=torch.float64).transpose(1, 2)
        torch.testing.assert_close(module(x), module(x.contiguous()), rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("qk_scale", [0.25, 1.0])
    def test_qk_scale(self, qk_scale):
        module = GPSA(24, 4, qk_scale=qk_scale, dtype=torch.float64)
        randomize(module)
        assert module.scale == qk_scale
        x = torch.randn(2, 16, 24, dtype=torch.float64)
        torch.testing.assert_close(module(x), dense_module(module, x, (4, 4)))

    def test_dropouts_act_in_training_only(self):
        module = GPSA(24, 4, attn_drop=0.5, proj_drop=0.5)
        plain = GPSA(24, 4)
        plain.load_state_dict(module.state_dict())
        x = torch.randn(2, 16, 24)
        assert torch.equal(module.eval()(x), plain(x))
        module.train()
        torch.manual_seed(1)
        first = module(x)
        assert not torch.equal(first, module(x))
        torch.manual_seed(1)
        assert torch.equal(first, module(x))
        # proj_drop on the output: half of it is exactly zero.
        assert 0.4 < (first == 0).float().mean() < 0.6

    def test_dropout_zero_trains_as_it_evaluates(self):
        module = GPSA(24, 4)
        randomize(module)
        x = torch.randn(2, 16, 24)
        torch.testing.assert_close(module.train()(x), module.eval()(x), rtol=0, atol=0)

    def test_dropout_on_a_backend_without_it(self):
        module = GPSA(24, 4, attn_drop=0.5, backend="torch")
        x = torch.randn(2, 16, 24)
        with pytest.raises(RuntimeError, match="dropout"):
            module(x)
        assert module.eval()(x).isfinite().all()

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_frozen_parameters(self, backend, differentiate_module):
        module = GPSA(24, 4, backend=backend, dtype=torch.float64)
        randomize(module)
        x = torch.randn(2, 16, 24, dtype=torch.float64)
        expected = differentiate_module(module, x)
        for frozen, parameter in module.named_parameters():
            parameter.requires_grad_(False)
            for name, gradient in differentiate_module(module, x).items():
                assert name != f"grad of {frozen}"
                torch.testing.assert_close(gradient, expected[name], msg=f"{name} ({frozen})")
            parameter.requires_grad_(True)

    def test_attention_dropout_of_one_leaves_the_bias(self):
        module = GPSA(24, 4, attn_drop=1.0)
        randomize(module)
        out = module(torch.randn(2, 16, 24))
        torch.testing.assert_close(out, module.proj.bias.expand_as(out))


class TestMapsAndInit:
    def test_attention_before_any_forward(self):
        """Where timm reads its placeholder of zeros, entries are off by half."""
        ours, theirs = pair(dim=24, num_heads=4, dtype=torch.float64)
        x = torch.randn(2, 16, 24, dtype=torch.float64)
        attention = ours.get_attention(x)
        assert attention.shape == (2, 4, 16, 16)
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 16, dtype=x.dtype))
        assert not torch.allclose(attention, theirs.get_attention(x), atol=1e-2)
        theirs(x)
        torch.testing.assert_close(attention, theirs.get_attention(x), rtol=1e-11, atol=1e-13)

    def test_attention_on_a_grid(self):
        module = GPSA(24, 4, grid_size=(2, 8), dtype=torch.float64)
        randomize(module)
        x = torch.randn(2, 16, 24, dtype=torch.float64)
        q, k = module.qk(x).view(2, 16, 2, 4, 6).permute(2, 0, 3, 1, 4)
        for grid, given in (((2, 8), None), ((8, 2), (8, 2))):
            expected = dense_map(q, k, module.pos_proj.weight, module.gating_param, grid)
            torch.testing.assert_close(module.get_attention(x, given), expected)

    @pytest.mark.parametrize("backend", ["reference", "torch", None])
    def test_attention_is_what_forward_applies(self, backend):
        module = GPSA(24, 4, backend=backend, dtype=torch.float64)
        randomize(module)
        x = torch.randn(2, 16, 24, dtype=torch.float64)
        v = module.v(x).view(2, 16, 4, 6).transpose(1, 2)
        out = module.proj((module.get_attention(x) @ v).transpose(1, 2).reshape(2, 16, 24))
        torch.testing.assert_close(module(x), out, rtol=1e-11, atol=1e-12)

    def test_attention_map_as_timm(self):
        ours, theirs = pair(dim=24, num_heads=4, dtype=torch.float64)
        x = torch.randn(3, 49, 24, dtype=torch.float64)
        theirs(x)
        distance, mean_map = theirs.get_attention_map(x, return_map=True)
        torch.testing.assert_close(ours.get_attention_map(x), distance, rtol=1e-11, atol=0)
        ours_distance, ours_map = ours.get_attention_map(x, return_map=True)
        assert ours_distance.shape == (4,)
        assert ours_map.shape == (4, 49, 49)
        torch.testing.assert_close(ours_distance, distance, rtol=1e-11, atol=0)
        torch.testing.assert_close(ours_map, mean_map, rtol=1e-11, atol=1e-13)

    def test_attention_map_of_a_wide_grid(self):
        module = GPSA(24, 4, grid_size=(2, 8), dtype=torch.float64)
        randomize(module)
        x = torch.randn(3, 16, 24, dtype=torch.float64)
        distance, mean_map = module.get_attention_map(x, return_map=True)
        metric = relative_positions((2, 8), torch.float64)[..., 2].sqrt()
        torch.testing.assert_close(mean_map, module.get_attention(x).mean(0))
        torch.testing.assert_close(distance, (metric * mean_map).sum((1, 2)) / 16)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("side", [1, 2, 14])
    def test_rel_indices_as_timm(self, side, dtype):
        ours, theirs = pair(dim=24, num_heads=4, dtype=dtype)
        actual, expected = ours.get_rel_indices(side**2), theirs.get_rel_indices(side**2)
        assert actual.dtype == expected.dtype
        assert actual.shape == (1, side**2, side**2, 3)
        # -0.0 and 0.0 are equal here and to the softmax.
        assert torch.equal(actual, expected)

    @pytest.mark.parametrize("grid", [(2, 8), (8, 2), (1, 16)], ids=str)
    def test_rel_indices_on_a_grid(self, grid):
        expected = relative_positions(grid, torch.float32)[None]
        assert torch.equal(GPSA(24, 4).get_rel_indices(16, grid), expected)
        assert torch.equal(GPSA(24, 4, grid_size=grid).get_rel_indices(16), expected)

    @pytest.mark.parametrize("strength", [1.0, 0.5, 3.0])
    @pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 8, 9, 12, 16])
    def test_local_init_has_the_bits_of_timm(self, heads, strength):
        """Heads beyond the largest square keep their weights times the strength."""
        ours, theirs = pair(dim=48 * heads, num_heads=heads, locality_strength=strength)
        ours.local_init()
        theirs.local_init()
        for name, x in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], x), name

    def test_local_init_of_four_heads(self):
        """The rows that models.md 1.3 gives."""
        module = GPSA(24, 4, use_local_init=True)
        rows = [[-1, -1, -1], [-1, 1, -1], [1, -1, -1], [1, 1, -1]]
        assert module.pos_proj.weight.tolist() == rows
        assert torch.equal(module.v.weight, torch.eye(24))

    @pytest.mark.parametrize("side", [2, 3])
    def test_a_local_head_looks_at_its_offset(self, side):
        """A stronger locality turns GPSA into a convolution: the point of the paper."""
        module = GPSA(side**2 * 2, side**2, use_local_init=True, locality_strength=30.0)
        with torch.no_grad():
            module.gating_param.fill_(50.0)
        attention = module.get_attention(torch.randn(1, 49, side**2 * 2))[0, :, 24]
        rows, cols = attention.argmax(-1) // 7 - 3, attention.argmax(-1) % 7 - 3
        offsets = set(zip(cols.tolist(), rows.tolist(), strict=True))
        # Even kernels are centred between pixels: offsets of half a pixel tie.
        if side == 3:
            assert offsets == {(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)}
        assert (attention.sum(-1) - 1).abs().max() < 1e-5
        assert all(abs(x) <= 1 and abs(y) <= 1 for x, y in offsets)

    def test_gates_start_at_one(self):
        assert torch.equal(GPSA(24, 4).gating_param, torch.ones(4))


class TestAsTimm:
    """The same arguments, parameters and keys."""

    @pytest.mark.parametrize("qkv_bias", [False, True])
    def test_keys_both_ways(self, qkv_bias):
        ours, theirs = GPSA(24, 4, qkv_bias), TimmGPSA(24, 4, qkv_bias)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(GPSA(24, 4, qkv_bias).state_dict(), strict=True)

    def test_there_is_no_buffer(self):
        module = GPSA(24, 4)
        module(torch.randn(1, 16, 24))
        module.get_rel_indices(16)
        assert not list(module.named_buffers())

    def test_positional_arguments(self):
        arguments = (24, 4, True, 0.1, 0.2, 0.5, "cpu", torch.float64)
        ours, theirs = GPSA(*arguments), TimmGPSA(*arguments)
        for module in (ours, theirs):
            assert module.num_heads == 4
            assert module.dim == 24
            assert module.qk.bias is not None
            assert module.attn_drop.p == 0.1
            assert module.proj_drop.p == 0.2
            assert module.locality_strength == 0.5
            assert module.scale == 6**-0.5
            assert module.qk.weight.dtype == torch.float64

    def test_eight_heads_by_default(self):
        assert GPSA(24).num_heads == 8


class TestFromModule:
    def test_shares_what_it_is_given(self):
        theirs = TimmGPSA(24, 4, qkv_bias=True, attn_drop=0.1, proj_drop=0.2)
        randomize(theirs)
        ours = GPSA.from_module(theirs, grid_size=(2, 8), backend="torch")
        assert isinstance(ours, GPSA)
        for name, p in theirs.named_parameters():
            assert ours.get_parameter(name) is p
        assert (ours.attn_drop.p, ours.proj_drop.p) == (0.1, 0.2)
        x = torch.randn(2, 16, 24)
        ours.eval()
        torch.testing.assert_close(ours(x), dense_module(ours, x, (2, 8)), rtol=1e-4, atol=1e-5)

    def test_numbers_are_the_same_and_the_module_keeps_working(self):
        theirs = TimmGPSA(24, 4).double().eval()
        randomize(theirs)
        x = torch.randn(2, 16, 24, dtype=torch.float64)
        before = theirs(x)
        ours = GPSA.from_module(theirs)
        torch.testing.assert_close(ours(x), before, rtol=1e-11, atol=1e-13)
        assert torch.equal(theirs(x), before)

    @pytest.mark.parametrize("training", [True, False])
    def test_keeps_the_mode(self, training):
        assert GPSA.from_module(TimmGPSA(24, 4).train(training)).training == training

    def test_keeps_the_scale(self):
        theirs = TimmGPSA(24, 4)
        theirs.scale = 0.125
        assert GPSA.from_module(theirs).scale == 0.125

    def test_of_our_own(self):
        module = GPSA(24, 4, grid_size=(2, 8))
        x = torch.randn(2, 16, 24)
        twin = GPSA.from_module(module, grid_size=(2, 8))
        assert torch.equal(twin(x), module(x))

    def test_refuses_something_else_by_name(self):
        with pytest.raises(TypeError, match=r"(?s)qk.*pos_proj") as error:
            GPSA.from_module(torch.nn.Linear(3, 3))
        assert "Linear" in str(error.value)


def test_reference_backend_is_the_reference_module():
    """The oracle of the package gives what the dense formula gives."""
    module = GPSA(24, 4, backend="reference", dtype=torch.float64)
    oracle = fastvit.reference.GPSA(24, 4, dtype=torch.float64)
    oracle.load_state_dict(module.state_dict())
    x = torch.randn(2, 16, 24, dtype=torch.float64)
    torch.testing.assert_close(module(x), oracle(x), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(oracle(x), dense_module(oracle, x, (4, 4)))

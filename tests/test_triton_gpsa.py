# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of GPSA and plain attention: on a GPU if there is one, else in Triton's
interpreter, which shows the numbers and not the speed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit import reference
from fastvit.functional import attention, attention_qkvpacked, gpsa_attention
from fastvit.layers import children
from fastvit.testing import CANCELLING, poisoned_allocations

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import configs

from fastvit.ops import gpsa_triton, trust

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Heads and their channels in ConViT tiny, small, small+, base and base+.
CONVIT = [(4, 48), (9, 48), (9, 64), (16, 48), (16, 64)]
FLOORS = {"grad of pos_weight": CANCELLING, "grad of gating_param": CANCELLING}
#: Few numbers, whose largest error is chance.
FEW = ("grad of pos_weight", "grad of gating_param")

LAUNCHERS = (
    "position_table", "position_factors", "kronecker", "forward_tile", "forward_stream",
    "backward_tile", "backward_query", "backward_key", "factor_gradient", "parameter_gradient",
)  # fmt: skip


@pytest.fixture(autouse=True)
def without_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are the proof; the check at first use would count as launches."""
    monkeypatch.setattr(trust, "needs_proof", lambda device: False)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was launched."""
    count: Counter[str] = Counter()

    def counted(name: str, launcher: Callable[..., object]) -> Callable[..., object]:
        def launch(*args: object, **kwargs: object) -> object:
            count[name] += 1
            return launcher(*args, **kwargs)

        return launch

    for name in LAUNCHERS:
        monkeypatch.setattr(gpsa_triton, name, counted(name, getattr(gpsa_triton, name)))
    return count


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``on(arch, resident=...)``: use the launch configurations of another architecture, and those
    for many heads if ``resident``. In the interpreter only: a GPU keeps its own.
    """

    def use(arch: str, resident: bool = False) -> None:
        if GPU:
            pytest.skip("the configurations of other architectures are for the interpreter")
        monkeypatch.setattr(gpsa_triton, "architecture", lambda device: arch)
        if resident:
            monkeypatch.setattr(
                configs, "_MULTIPROCESSORS", dict.fromkeys(configs.ARCHITECTURES, 0)
            )

    return use


def problem(
    B: int, H: int, N: int, d: int, dtype: torch.dtype, seed: int = 0, gated: bool = True
) -> dict[str, Tensor]:
    """Views of packed projections, as a layer makes them."""
    generator = torch.Generator().manual_seed(seed)
    qk = torch.randn(B, N, 2, H, d, generator=generator).to(dtype)
    v = torch.randn(B, N, H, d, generator=generator).to(dtype)
    q, k = qk.permute(2, 0, 3, 1, 4).unbind(0)
    found = {"q": q, "k": k, "v": v.transpose(1, 2)}
    if gated:
        pos_weight = 0.3 * torch.randn(H, 3, generator=generator)
        pos_weight[:, 2] = -pos_weight[:, 2].abs()
        found["pos_weight"] = pos_weight.to(dtype)
        found["gating_param"] = (2.0 * torch.randn(H, generator=generator)).to(dtype)
    return {name: x.to(DEVICE) for name, x in found.items()}


def gpsa(grid: tuple[int, int]) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The kernels and the oracle on a grid."""

    def kernels(**inputs: Tensor) -> Tensor:
        with poisoned_allocations():
            return gpsa_attention(**inputs, grid_size=grid, backend="triton").cpu()

    def oracle(**inputs: Tensor) -> Tensor:
        return reference.gpsa_attention(**inputs, grid_size=grid).cpu()

    return kernels, oracle


def plain(**inputs: Tensor) -> Tensor:
    with poisoned_allocations():
        return attention(**inputs, backend="triton").cpu()


def plain_oracle(**inputs: Tensor) -> Tensor:
    return reference.attention(**inputs).cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "d"), CONVIT)
def test_the_heads_of_convit(H: int, d: int, dtype: torch.dtype, launches, check_numbers) -> None:
    kernels, oracle = gpsa((14, 14))
    check_numbers(kernels, oracle, [problem(1, H, 196, d, dtype)], floors=FLOORS, rms=FEW)
    if dtype == torch.float32:
        assert launches["forward_stream"] == 1
        assert launches["backward_query"] == launches["backward_key"] == 1
    else:
        assert launches["forward_tile"] == 1
    assert launches["parameter_gradient"] == 1


@pytest.mark.parametrize(
    ("arch", "dtype"),
    # float32 takes the longest in the interpreter: one architecture must do.
    [("sm_90", torch.float32), *itertools.product(("sm_80", "sm_90"), DTYPES[1:])],
    ids=str,
)
@pytest.mark.parametrize(
    ("H", "grid", "d"),
    [
        (1, (7, 7), 16),
        (3, (5, 10), 24),
        (3, (4, 16), 40),
        (2, (7, 28), 48),
        (2, (1, 49), 64),
        (1, (16, 16), 80),
        (1, (7, 7), 128),
        (16, (3, 5), 16),
        (1, (1, 1), 16),
        (2, (2, 3), 56),
        (1, (3, 64), 112),
    ],
)
def test_grids_heads_and_channels(
    H: int, grid: tuple[int, int], d: int, dtype: torch.dtype, arch: str, on, check_numbers
) -> None:
    if not GPU:
        on(arch)
    kernels, oracle = gpsa(grid)
    problems = [problem(2, H, grid[0] * grid[1], d, dtype)]
    check_numbers(kernels, oracle, problems, floors=FLOORS, rms=FEW)


@pytest.mark.parametrize(
    ("H", "grid", "d", "dtype"),
    [
        (2, (24, 24), 48, torch.bfloat16),
        (1, (24, 24), 48, torch.float16),
        (1, (24, 24), 48, torch.float32),
        (1, (17, 33), 24, torch.bfloat16),
        (1, (17, 33), 24, torch.float32),
    ],
    ids=str,
)
def test_more_than_one_tile(
    H: int, grid: tuple[int, int], d: int, dtype: torch.dtype, launches, check_numbers
) -> None:
    kernels, oracle = gpsa(grid)
    problems = [problem(1, H, grid[0] * grid[1], d, dtype)]
    check_numbers(kernels, oracle, problems, floors=FLOORS, rms=FEW)
    # The position term of the output and that of the gradient of v.
    assert launches["kronecker"] == 2
    assert launches["forward_stream"] == launches["backward_query"] == 1
    assert launches["forward_tile"] == launches["backward_tile"] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("grid", "d"), [((14, 14), 48), ((16, 16), 64), ((7, 7), 16)])
def test_a_whole_head_in_one_program(
    grid: tuple[int, int], d: int, dtype: torch.dtype, on, launches, check_numbers
) -> None:
    on("sm_90", resident=True)
    kernels, oracle = gpsa(grid)
    problems = [problem(2, 2, grid[0] * grid[1], d, dtype)]
    check_numbers(kernels, oracle, problems, floors=FLOORS, rms=FEW)
    assert launches["forward_tile"] == launches["backward_tile"] == 1


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [("sm_90", torch.float32), *itertools.product(("sm_80", "sm_90"), DTYPES[1:])],
    ids=str,
)
@pytest.mark.parametrize(("H", "N", "d"), [(3, 50, 48), (2, 197, 64), (1, 257, 40), (2, 1, 16)])
def test_plain_attention(
    H: int, N: int, d: int, dtype: torch.dtype, arch: str, on, launches, check_numbers
) -> None:
    if not GPU:
        on(arch)
    problems = [problem(2, H, N, d, dtype, gated=False)]
    check_numbers(plain, plain_oracle, problems)
    assert launches["forward_tile"] + launches["forward_stream"] == 1
    assert launches["backward_tile"] + launches["backward_key"] == 1
    assert launches["kronecker"] == launches["position_table"] == 0


def strided(x: Tensor, how: str) -> Tensor:
    """The numbers of x (B, H, N, d) in another layout."""
    if how == "channels apart":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if how == "tokens last":
        return x.transpose(1, 2).contiguous().permute(0, 2, 1, 3)
    if how == "misaligned":
        flat = x.new_zeros(x.numel() + 1)
        return flat[1:].view(x.shape).copy_(x)
    if how == "in a wider one":
        return torch.cat((x, x), -1)[..., : x.shape[-1]]
    return x


@pytest.mark.parametrize("how", ["channels apart", "tokens last", "misaligned", "in a wider one"])
@pytest.mark.parametrize("grid", [(4, 5), (13, 20)])
def test_layouts(how: str, grid: tuple[int, int], launches, differentiate) -> None:
    """Whatever the strides, the same bits."""
    inputs = problem(1, 2, grid[0] * grid[1], 24, torch.float16)
    kernels, _ = gpsa(grid)
    expected = differentiate(kernels, inputs)
    for name in "qkv":
        inputs[name] = strided(inputs[name], how)
    # Every second of more.
    weight, gate = inputs["pos_weight"], inputs["gating_param"]
    inputs["pos_weight"] = torch.stack((weight, weight), -1)[..., 0]
    inputs["gating_param"] = torch.stack((gate, gate), -1)[..., 0]
    found = differentiate(kernels, inputs)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert launches["parameter_gradient"] == 2


@pytest.mark.parametrize("grid", [(4, 5), (13, 20)])
def test_expanded_inputs_and_gradients(grid: tuple[int, int]) -> None:
    inputs = problem(1, 2, grid[0] * grid[1], 16, torch.float16)
    inputs = {n: x.expand(2, -1, -1, -1) if x.ndim == 4 else x for n, x in inputs.items()}
    found = []
    for materialise in (False, True):
        leaves = {
            n: (x.contiguous() if materialise else x).detach().requires_grad_()
            for n, x in inputs.items()
        }
        out = gpsa_attention(**leaves, grid_size=grid, backend="triton")
        # A sum's gradient is one number with all strides zero.
        found.append([out.detach(), *torch.autograd.grad(out.sum(), list(leaves.values()))])
    for expanded, whole in zip(*found, strict=True):
        assert torch.equal(expanded, whole)


@pytest.mark.parametrize(
    ("grid", "dtype"),
    [((7, 7), torch.float32), ((7, 7), torch.bfloat16), ((17, 16), torch.bfloat16)],
    ids=str,
)
def test_the_same_bits_again(grid: tuple[int, int], dtype: torch.dtype, differentiate) -> None:
    inputs = problem(2, 2, grid[0] * grid[1], 24, dtype)
    kernels, _ = gpsa(grid)
    first, second = differentiate(kernels, inputs), differentiate(kernels, inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("shape", [(0, 2, 49, 16), (2, 0, 49, 16)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    q, k, v = (torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(3))
    H = shape[1]
    weight = torch.randn(H, 3, device=DEVICE, requires_grad=True)
    gate = torch.randn(H, device=DEVICE, requires_grad=True)
    leaves = (q, k, v, weight, gate)
    out = gpsa_attention(*leaves, (7, 7), backend="triton")
    assert out.shape == shape
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()
    assert attention(q, k, v, backend="triton").shape == shape


@pytest.mark.parametrize("grid", [(5, 5), (17, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("gate", [-200.0, 200.0])
def test_gates_open_and_shut(
    gate: float, grid: tuple[int, int], dtype: torch.dtype, check_numbers
) -> None:
    """sigmoid(±200) is 0 or 1 in every dtype: one branch is left."""
    inputs = problem(1, 2, grid[0] * grid[1], 16, dtype)
    inputs["gating_param"] = torch.full_like(inputs["gating_param"], gate)
    kernels, oracle = gpsa(grid)
    check_numbers(kernels, oracle, [inputs], floors=FLOORS, rms=FEW)


@pytest.mark.parametrize("grid", [(5, 5), (17, 16)])
def test_not_a_number_goes_where_it_does_in_the_reference(grid: tuple[int, int]) -> None:
    inputs = problem(2, 2, grid[0] * grid[1], 16, torch.float32)
    inputs["q"][0, 0, 3, 1] = float("nan")
    inputs["k"][1, 1, 2, 0] = float("inf")
    kernels, oracle = gpsa(grid)
    assert torch.equal(kernels(**inputs).isnan(), oracle(**inputs).isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("grid", [(3, 3), (17, 16)])
def test_keys_of_minus_infinity_have_no_share(
    grid: tuple[int, int], dtype: torch.dtype, differentiate
) -> None:
    """Rows of a tile beyond the tokens meet them, too, and must not spoil its sums."""
    inputs = problem(1, 1, grid[0] * grid[1], 16, dtype)
    inputs["q"].abs_()
    inputs["k"][:, :, :3] = -float("inf")
    kernels, oracle = gpsa(grid)
    found, expected = differentiate(kernels, inputs), differentiate(oracle, inputs)
    for name, value in expected.items():
        assert torch.equal(found[name].isnan(), value.isnan()), name


@pytest.mark.parametrize("grid", [(5, 5), (17, 16)])
def test_scores_of_minus_infinity(grid: tuple[int, int]) -> None:
    """A whole block of keys may be out of the question, if not all."""
    inputs = problem(1, 1, grid[0] * grid[1], 16, torch.float32)
    inputs["q"].fill_(1.0)
    inputs["k"][:, :, :-2] = -float("inf")
    kernels, oracle = gpsa(grid)
    torch.testing.assert_close(kernels(**inputs), oracle(**inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_compiled(dtype: torch.dtype, launches, differentiate_module) -> None:
    """One graph, with the op in it, and the numbers of the eager layer."""
    torch._dynamo.reset()
    layer = fastvit.GPSA(48, 3, backend="triton").to(DEVICE, dtype)
    torch.nn.init.normal_(layer.gating_param)
    x = torch.randn(2, 16, 48).to(DEVICE, dtype)
    eager = differentiate_module(layer, x)
    ran = launches["forward_tile"] + launches["forward_stream"]
    found = differentiate_module(torch.compile(layer, fullgraph=True), x)
    assert launches["forward_tile"] + launches["forward_stream"] == 2 * ran == 2
    assert launches["parameter_gradient"] == 2
    for name, value in eager.items():
        compiled = name.replace("grad of ", "grad of _orig_mod.")
        torch.testing.assert_close(found[compiled if compiled in found else name], value)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiled_for_any_size(backend: str) -> None:
    """With all sizes symbolic, the head's channels among them."""
    torch._dynamo.reset()

    def both(q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating_param: Tensor) -> Tensor:
        grid = (2, q.shape[2] // 2)
        return gpsa_attention(q, k, v, pos_weight, gating_param, grid, backend=backend)

    compiled = torch.compile(both, fullgraph=True, dynamic=True)
    for B, H, N, d in ((2, 3, 6, 16), (3, 2, 8, 24)):
        inputs = problem(B, H, N, d, torch.float32)
        torch.testing.assert_close(compiled(**inputs), both(**inputs))


def test_an_mhsa_layer(launches, differentiate_module, check_agreement) -> None:
    layers = [fastvit.MHSA(48, 3, qkv_bias=True, backend=b) for b in ("triton", "reference")]
    layers.append(fastvit.MHSA(48, 3, qkv_bias=True, backend="reference"))
    for layer in layers:
        layer.load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 17, 48)
    results = [
        differentiate_module(layer.to(DEVICE, dtype), x.to(DEVICE, dtype))
        for layer, dtype in zip(layers, (torch.float32, torch.float32, torch.float64), strict=True)
    ]
    check_agreement(*([result] for result in results))
    assert launches["forward_stream"] == launches["backward_key"] == 1


@contextmanager
def linear_widths(products: list[int]) -> Iterator[None]:
    """Note the width of what each ``F.linear`` gives."""
    linear = torch.nn.functional.linear

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        products.append(weight.shape[0])
        return linear(x, weight, bias)

    with mock.patch("torch.nn.functional.linear", noted):
        yield


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_stacked_projections(
    bias: bool, backend: str, monkeypatch: pytest.MonkeyPatch, differentiate_module
) -> None:
    """One product of the stacked weights, as on a GPU; parameters and gradients stay apart."""
    layer = fastvit.GPSA(48, 3, qkv_bias=bias, backend=backend).to(DEVICE)
    torch.nn.init.normal_(layer.gating_param)
    x = torch.randn(2, 16, 48, device=DEVICE)
    results = []
    for takes in (False, True):
        monkeypatch.setattr(children, "_takes_stacks", lambda x, takes=takes: takes)
        products = []
        with linear_widths(products):
            results.append({k: v.clone() for k, v in differentiate_module(layer, x).items()})
        assert products == ([144, 48] if takes else [96, 48, 48])
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5)


def test_packed_attention_gives_one_gradient(launches) -> None:
    qkv = torch.randn(2, 20, 3, 2, 16, device=DEVICE, requires_grad=True)
    out = attention_qkvpacked(qkv, backend="triton")
    (gradient,) = torch.autograd.grad(out.square().sum(), qkv)
    expected = reference.attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), qkv)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert launches["backward_query"] == 1


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("op", ["gpsa", "mhsa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("images", [0, 2])
def test_the_registered_ops(op: str, direction: str, dtype: torch.dtype, images: int) -> None:
    """Schema, fake and strides are those of the kernels."""
    inputs = problem(2, 2, 6, 16, dtype, gated=op == "gpsa")
    if images == 0:
        # No views, since opcheck cannot copy an empty one that begins inside its storage.
        empty = inputs["q"].new_empty(0, 2, 6, 16)
        inputs = {n: empty.clone() if x.ndim == 4 else x for n, x in inputs.items()}
    arguments: list[object] = list(inputs.values())
    if direction == "backward":
        arguments.insert(0, torch.randn(inputs["q"].shape).to(inputs["q"]))
    arguments += [2, 3] if op == "gpsa" else []
    torch.library.opcheck(
        getattr(torch.ops.fastvit, f"_{op}_{direction}").default, (*arguments, 0.25, "triton")
    )


def test_vmap_over_the_parameters() -> None:
    """Of two layers at once, as an ensemble computes them."""
    inputs = problem(1, 2, 6, 16, torch.float32)
    weights, gates = torch.randn(3, 2, 3), torch.randn(3, 2)
    weights, gates = weights.to(DEVICE), gates.to(DEVICE)

    def loss(weight: Tensor, gate: Tensor) -> Tensor:
        q, k, v = (inputs[name] for name in "qkv")
        return gpsa_attention(q, k, v, weight, gate, (2, 3), backend="triton").square().sum()

    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(weights, gates)
    for i in range(3):
        expected = torch.func.grad(loss, argnums=(0, 1))(weights[i], gates[i])
        torch.testing.assert_close([x[i] for x in found], list(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype, launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens go to the kernels in the autocast dtype, gates and position weights in float32."""
    seen = {}

    def spy(*args: Tensor) -> Tensor:
        seen.update(zip(("q", "k", "v", "pos_weight", "gating_param"), args, strict=False))
        return forward(*args)

    forward = gpsa_triton.forward
    monkeypatch.setattr(gpsa_triton, "forward", spy)
    layer = fastvit.GPSA(32, 2, backend="triton").to(DEVICE)
    with torch.autocast(DEVICE.type, dtype):
        out = layer(torch.randn(1, 9, 32, device=DEVICE))
    out.float().sum().backward()
    assert {seen[name].dtype for name in "qkv"} == {dtype}
    assert seen["pos_weight"].dtype == seen["gating_param"].dtype == torch.float32
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
    assert launches["parameter_gradient"] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"d": 20}, "steps of 8, and these have 20"),
        ({"d": 136}, "16 to 128 channels"),
        ({"grid": (1, 65)}, "up to 64 x 64, and this one is 1 x 65"),
        ({"dtype": torch.float64}, "the tokens are float64"),
    ],
)
def test_refusals_have_reasons(change: dict, words: str) -> None:
    grid, d = change.get("grid", (2, 2)), change.get("d", 16)
    inputs = problem(1, 1, grid[0] * grid[1], d, change.get("dtype", torch.float32))
    with pytest.raises(RuntimeError, match=f"'triton' was asked for, but .*{words}"):
        gpsa_attention(**inputs, grid_size=grid, backend="triton")
    # Nobody who does not ask for it is refused.
    assert gpsa_attention(**inputs, grid_size=grid).shape == inputs["q"].shape


@pytest.mark.skipif(GPU, reason="a GPU runs the kernels by default")
def test_auto_does_not_take_the_interpreter(launches) -> None:
    inputs = problem(1, 1, 4, 16, torch.float32)
    gpsa_attention(**inputs, grid_size=(2, 2))
    assert not launches

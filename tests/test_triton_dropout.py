# SPDX-License-Identifier: Apache-2.0
"""Attention dropout of GPSA in the Triton kernels: on a GPU if there is one, else interpreted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit import reference
from fastvit.functional import gpsa_attention, gpsa_attention_qkpacked, gpsa_attention_qkvpacked
from fastvit.testing import CANCELLING, poisoned_allocations

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.ops import backend, gpsa_dropout, gpsa_dropout_torch, gpsa_dropout_triton, trust

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
FLOORS = {"grad of pos_weight": CANCELLING, "grad of gating_param": CANCELLING}
#: Few numbers, whose largest error is chance.
FEW = ("grad of pos_weight", "grad of gating_param")
SEED = 0x123456789ABCDEF


@pytest.fixture(autouse=True)
def without_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are the proof."""
    monkeypatch.setattr(trust, "needs_proof", lambda device: False)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was launched."""
    count: Counter[str] = Counter()

    def counted(name: str, launcher: Callable[..., object]) -> Callable[..., object]:
        def launch(*args: object) -> object:
            count[name] += 1
            return launcher(*args)

        return launch

    for name in ("dropout_forward", "dropout_query", "dropout_key"):
        launcher = getattr(gpsa_dropout_triton, name)
        monkeypatch.setattr(gpsa_dropout_triton, name, counted(name, launcher))
    return count


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed in every call."""
    monkeypatch.setattr(
        gpsa_dropout, "new_seed", lambda like: torch.tensor([SEED], device=like.device)
    )


def problem(B: int, H: int, N: int, d: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, N, H, d, generator=generator).transpose(1, 2) for _ in range(3))
    pos_weight = 0.3 * torch.randn(H, 3, generator=generator)
    pos_weight[:, 2] = -pos_weight[:, 2].abs()
    gate = torch.randn(H, generator=generator)
    found = {"q": q, "k": k, "v": v, "pos_weight": pos_weight, "gating_param": gate}
    return {name: x.to(DEVICE, dtype) for name, x in found.items()}


def philox(counter: tuple[int, int, int, int], key: tuple[int, int], rounds: int) -> list[int]:
    """Philox4x32 in Python's integers, as in section 3.3 of Salmon et al. 2011."""
    words, (k0, k1) = list(counter), key
    for _ in range(rounds):
        a, b = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            (b >> 32) ^ words[1] ^ k0,
            b & 0xFFFFFFFF,
            (a >> 32) ^ words[3] ^ k1,
            a & 0xFFFFFFFF,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return words


def mask(B: int, H: int, N: int, p: float) -> Tensor:
    """The kernels' mask by definition, one weight at a time."""
    key = (SEED & 0xFFFFFFFF, SEED >> 32)
    kept = torch.empty(B, H, N, N, dtype=torch.bool)
    threshold = torch.tensor(p, dtype=torch.float32).item()
    for b in range(B):
        for h in range(H):
            for i in range(N):
                for fours in range(-(-N // 4)):
                    words = philox((fours, i, h * B + b, 0), key, 7)
                    for j in range(4 * fours, min(4 * fours + 4, N)):
                        kept[b, h, i, j] = (words[j % 4] >> 8) * 2.0**-24 >= threshold
    return kept


def gpsa(grid: tuple[int, int], p: float) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The kernels, and the reference whose dropout has their mask."""

    def kernels(**inputs: Tensor) -> Tensor:
        with poisoned_allocations():
            return gpsa_attention(**inputs, grid_size=grid, dropout_p=p, backend="triton").cpu()

    def oracle(**inputs: Tensor) -> Tensor:
        B, H, N, _ = inputs["q"].shape
        kept = gpsa_dropout_torch.kept(torch.tensor([SEED]), (B, H, N), p).to(DEVICE)
        return reference.gpsa_attention(**inputs, grid_size=grid, dropout_p=p, kept=kept).cpu()

    return kernels, oracle


def test_philox_has_the_published_answers() -> None:
    """The vectors of Random123, in the test's own words and in those of the package."""
    zero, ones = torch.zeros((), dtype=torch.int64), torch.tensor(0xFFFFFFFF)
    answers = {
        0: [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48],
        0xFFFFFFFF: [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662],
    }
    for word, expected in answers.items():
        assert philox((word,) * 4, (word, word), 7) == expected
        counter = ((zero if word == 0 else ones),) * 4
        # All bits of the key are those of -1.
        found = gpsa_dropout_torch._philox(counter, -torch.ones_like(zero) * min(word, 1))
        assert [int(x) for x in found] == expected


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_mask_is_what_it_is_defined_to_be(p: float) -> None:
    B, H, N = 2, 3, 7
    found = gpsa_dropout_torch.kept(torch.tensor([SEED]), (B, H, N), p)
    assert torch.equal(found, mask(B, H, N, p))


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_the_share_that_stays(p: float) -> None:
    """Of a million weights, within four standard deviations; in every image, head and row, too."""
    kept = gpsa_dropout_torch.kept(torch.tensor([SEED]), (4, 4, 256), p).double()
    sigma = math.sqrt(p * (1 - p))
    assert abs(kept.mean() - (1 - p)) < 4 * sigma / math.sqrt(kept.numel())
    assert ((kept.mean((2, 3)) - (1 - p)).abs() < 5 * sigma / 256).all()
    # Of a thousand rows the farthest is expected at 3.3 standard deviations.
    assert ((kept.mean(3) - (1 - p)).abs() < 6 * sigma / 16).all()
    # Neighbours know nothing of each other: along keys, queries, heads and images.
    centred = kept - kept.mean()
    for dim in range(4):
        together = centred.narrow(dim, 1, kept.shape[dim] - 1) * centred.narrow(
            dim, 0, kept.shape[dim] - 1
        )
        assert abs(together.mean()) < 5 * sigma**2 / math.sqrt(together.numel())


@pytest.mark.parametrize(
    ("B", "H", "grid", "d", "dtype"),
    [
        (2, 2, (5, 7), 24, torch.float32),
        (1, 3, (4, 5), 40, torch.float16),
        (2, 2, (7, 7), 48, torch.bfloat16),
        (1, 2, (14, 14), 48, torch.bfloat16),
        (1, 1, (17, 16), 64, torch.bfloat16),
        (1, 1, (3, 5), 128, torch.float16),
        (1, 1, (1, 1), 16, torch.float32),
    ],
    ids=str,
)
def test_numbers(
    B: int, H: int, grid: tuple[int, int], d: int, dtype: torch.dtype, seeded, launches,
    check_numbers,
) -> None:  # fmt: skip
    kernels, oracle = gpsa(grid, 0.3)
    problems = [problem(B, H, grid[0] * grid[1], d, dtype)]
    check_numbers(kernels, oracle, problems, floors=FLOORS, rms=FEW)
    assert launches == {"dropout_forward": 1, "dropout_query": 1, "dropout_key": 1}


@pytest.mark.skipif(GPU, reason="a GPU keeps its own configurations")
def test_numbers_in_the_tiles_of_ampere(
    seeded, launches, check_numbers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvit.ops.gpsa_triton.architecture", lambda device: "sm_80")
    kernels, oracle = gpsa((5, 9), 0.3)
    check_numbers(kernels, oracle, [problem(2, 2, 45, 24, torch.float16)], floors=FLOORS, rms=FEW)
    assert launches["dropout_key"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_composed_path_agrees(
    dtype: torch.dtype, seeded, differentiate, check_agreement
) -> None:
    """What serves where kernels are not trusted has the same mask and the same numbers."""
    grid, inputs = (4, 5), problem(2, 2, 20, 16, dtype)

    def composed(**inputs: Tensor) -> Tensor:
        seed = torch.tensor([SEED], device=DEVICE)
        # Under auto a processor takes no kernels.
        return gpsa_dropout.gpsa_dropout(*inputs.values(), seed, *grid, 0.25, 0.3, "auto").cpu()

    _, oracle = gpsa(grid, 0.3)
    with (
        mock.patch.object(trust, "needs_proof", return_value=True),
        mock.patch.object(trust, "trusts", return_value=False),
    ):
        found = differentiate(composed, inputs)
    doubles = {name: x.double() for name, x in inputs.items()}
    check_agreement(
        [found], [differentiate(oracle, inputs)], [differentiate(oracle, doubles)],
        floors=FLOORS, rms=FEW,
    )  # fmt: skip


def test_all_dropped(launches) -> None:
    inputs = {n: x.requires_grad_() for n, x in problem(1, 2, 12, 16, torch.float32).items()}
    out = gpsa_attention(**inputs, grid_size=(3, 4), dropout_p=1.0, backend="triton")
    assert not out.any()
    for gradient in torch.autograd.grad(out.sum(), list(inputs.values())):
        assert not gradient.any()
    assert launches["dropout_forward"] == 1


def run(inputs: dict[str, Tensor], **options: object) -> list[Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = gpsa_attention(**leaves, grid_size=(3, 4), dropout_p=0.4, backend="triton", **options)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), list(leaves.values()))]


def test_pytorch_generator_decides() -> None:
    """The same state gives the same bits, the next call others."""
    inputs = problem(1, 2, 12, 16, torch.float32)
    torch.manual_seed(3)
    first, second = run(inputs), run(inputs)
    torch.manual_seed(3)
    again = run(inputs)
    assert not torch.equal(first[0], second[0])
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_packed_projections_drop_the_same(launches) -> None:
    inputs = problem(1, 2, 12, 16, torch.float32)
    q, k, v, *parameters = inputs.values()
    options = {"dropout_p": 0.4, "backend": "triton"}
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    outputs = []
    for call in (
        lambda: gpsa_attention(q, k, v, *parameters, (3, 4), **options),
        lambda: gpsa_attention_qkpacked(
            torch.stack(heads[:2], 2), v, *parameters, (3, 4), **options
        ),
        lambda: gpsa_attention_qkvpacked(torch.stack(heads, 2), *parameters, (3, 4), **options),
    ):
        torch.manual_seed(1)
        outputs.append(call())
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert launches["dropout_forward"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_in_training_and_in_eval(dtype: torch.dtype, launches) -> None:
    layer = fastvit.GPSA(48, 3, attn_drop=0.2, backend="triton").to(DEVICE)
    x = torch.randn(2, 16, 48, device=DEVICE)
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        layer.train()(x).float().sum().backward()
        assert launches == {"dropout_forward": 1, "dropout_query": 1, "dropout_key": 1}
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
        layer.eval()(x)
    assert launches["dropout_forward"] == 1


@pytest.mark.parametrize("budget", [1.0, 0.9, 0.5])
def test_a_layer_compiled(budget: float) -> None:
    """One graph, another mask at every call, and in the backward the mask of the forward, however
    much the compiler would rather compute again than keep.
    """
    torch._dynamo.reset()
    layer = fastvit.GPSA(32, 2, attn_drop=0.5, backend="triton").to(DEVICE).train()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(1, 9, 32, device=DEVICE, requires_grad=True)
    outputs = []
    for _ in range(2):
        with torch._functorch.config.patch(activation_memory_budget=budget):
            out = compiled(x)
        # The output is linear in v.
        (gradient,) = torch.autograd.grad(out.sum(), layer.v.weight)
        torch.testing.assert_close((gradient * layer.v.weight).sum(), (out - layer.proj.bias).sum())
        outputs.append(out.detach())
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_the_composed_path_whatever_the_default_dtype(default: torch.dtype) -> None:
    tensors = problem(1, 2, 12, 16, torch.float32).values()
    seed = torch.tensor([SEED], device=DEVICE)
    expected = gpsa_dropout_torch.forward(*tensors, seed, (3, 4), 0.25, 0.1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = gpsa_dropout_torch.forward(*tensors, seed, (3, 4), 0.25, 0.1)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, expected)


def test_checkpointing_draws_the_same_mask() -> None:
    layer = fastvit.GPSA(32, 2, attn_drop=0.5, backend="triton").to(DEVICE).train()
    x = torch.randn(1, 9, 32, device=DEVICE, requires_grad=True)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        out = (
            torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            if checkpointed
            else layer(x)
        )
        results.append((out, *torch.autograd.grad(out.square().sum(), layer.parameters())))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("images", [0, 2])
def test_the_registered_ops(direction: str, images: int) -> None:
    tensors = list(problem(2, 2, 6, 16, torch.float32).values())
    if images == 0:
        tensors = [x.new_empty(0, 2, 6, 16) if x.ndim == 4 else x for x in tensors]
    arguments = [*tensors, torch.tensor([SEED], device=DEVICE)]
    if direction == "backward":
        arguments.insert(0, torch.randn(tensors[0].shape, device=DEVICE))
    op = getattr(torch.ops.fastvit, f"_gpsa_dropout_{direction}").default
    torch.library.opcheck(op, (*arguments, 2, 3, 0.25, 0.1, "triton"))


def test_vmap_over_the_parameters() -> None:
    """Under ``randomness="same"`` an ensemble has one mask."""
    inputs = problem(1, 2, 6, 16, torch.float32)
    q, k, v = (inputs[name] for name in "qkv")
    weights, gates = torch.randn(3, 2, 3, device=DEVICE), torch.randn(3, 2, device=DEVICE)

    def loss(weight: Tensor, gate: Tensor) -> Tensor:
        out = gpsa_attention(q, k, v, weight, gate, (2, 3), dropout_p=0.5, backend="triton")
        return out.square().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1))
    torch.manual_seed(0)
    found = torch.func.vmap(gradient, randomness="same")(weights, gates)
    for i in range(3):
        torch.manual_seed(0)
        expected = gradient(weights[i], gates[i])
        torch.testing.assert_close([x[i] for x in found], list(expected))


@pytest.mark.skipif(GPU, reason="the interpreter stands for a GPU here")
def test_a_broken_kernel_is_replaced_under_the_same_mask(
    monkeypatch: pytest.MonkeyPatch, tmp_path, seeded
) -> None:
    """The check catches it, and the composed path goes on."""
    monkeypatch.setattr(backend, "_is_slow", lambda call, name: False)
    monkeypatch.setattr(trust, "needs_proof", lambda device: True)
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path))
    trust.forget()
    inputs = problem(1, 2, 12, 16, torch.float32)
    expected = gpsa_attention(**inputs, grid_size=(3, 4), dropout_p=0.4)
    assert trust.verified_here()
    assert all(key.startswith("gpsa_dropout/forward/") for key in trust.verified_here())
    launcher = gpsa_dropout_triton.dropout_forward

    def broken(*args: object) -> None:
        launcher(*args)
        args[7].mul_(1.01)

    monkeypatch.setattr(gpsa_dropout_triton, "dropout_forward", broken)
    (tmp_path / "verdicts.json").unlink()
    trust.forget()
    with pytest.warns(RuntimeWarning, match="gpsa_dropout/forward/.* DISAGREES: error "):
        found = gpsa_attention(**inputs, grid_size=(3, 4), dropout_p=0.4)
    torch.testing.assert_close(found, expected)
    trust.forget()


def test_plain_attention_leaves_dropout_to_pytorch() -> None:
    q = torch.randn(1, 1, 16, 16, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"dropout \(0.1\) of plain attention is left"):
        fastvit.functional.attention(q, q, q, dropout_p=0.1, backend="triton")


@pytest.mark.skipif(GPU, reason="a GPU runs the kernels by default")
def test_auto_on_a_processor_is_the_reference(launches) -> None:
    """Which differentiates twice, and needs no counters."""
    inputs = problem(1, 1, 4, 16, torch.float32)
    gpsa_attention(**inputs, grid_size=(2, 2), dropout_p=0.5)
    assert not launches

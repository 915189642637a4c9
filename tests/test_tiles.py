# SPDX-License-Identifier: Apache-2.0
"""Attention a tile at a time: every way of dividing it gives the same numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastvit import reference
from fastvit.functional import (
    attention,
    attention_qkvpacked,
    gpsa_attention,
    gpsa_attention_qkpacked,
)
from fastvit.ops import content, mhsa
from fastvit.testing import CANCELLING, assert_agreement, poisoned_allocations

B, H, GRID, D = 3, 5, (5, 7), 6
N = GRID[0] * GRID[1]

#: Budgets for which a tile has one row of one map, some rows, one map, some heads, all heads of
#: one image, two images, everything.
BUDGETS = (1, 300, N * N, 3 * N * N, 5 * N * N, 10 * N * N, 1 << 20)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("large_map", [0, 1 << 19])
def test_a_tiling_covers_everything_once(
    budget: int, large_map: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "_LARGE_MAP", large_map)
    plan = content.tiling(B, H, N, D, budget)
    count = torch.zeros(B, H, N, dtype=torch.int64)
    for images, heads in plan.tiles(B, H):
        tile = count[images, heads]
        rows = torch.zeros(tile.shape[0] * tile.shape[1], N, dtype=torch.int64)
        for h, r in plan.parts(*rows.shape):
            rows[h, r] += 1
            if plan.rows < N:
                assert rows[h].shape[0] == 1
            if large_map == 0:
                assert rows[h, r].shape[0] * rows[h, r].shape[1] * N < N * N
        tile += rows.view(tile.shape)
    assert (count == 1).all()


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    """No images, heads, tokens or channels."""
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, scale=1.0)
    assert out.shape == shape
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert grad.shape == shape
    if shape[1] and shape[2]:
        weight, gate = torch.randn(3, 3)[: shape[1]], torch.randn(3)[: shape[1]]
        grid = (1, shape[2])
        assert gpsa_attention(q, k, v, weight, gate, grid, scale=1.0).shape == shape


def problem(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, H, N, D)] * 4 + [(H, 3), (H,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def with_gradients(function, grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def gpsa(q, k, v, weight, gate):
    return gpsa_attention(q, k, v, weight, gate, GRID)


def reference_gpsa(q, k, v, weight, gate):
    return reference.gpsa_attention(q, k, v, weight, gate, GRID)


def tiled_attention(q, k, v):
    """Also in the dtypes for which PyTorch's own is faster."""
    return mhsa._separate(q, k, v, q.shape[-1] ** -0.5, "torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    ("function", "plain", "count"),
    [(gpsa, reference_gpsa, 5), (tiled_attention, reference.attention, 3)],
    ids=["gpsa", "attention"],
)
def test_every_tiling_agrees(
    function, plain, count, dtype, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "_MAPS_PER_CORE", budget)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    grad, *inputs = problem(dtype)
    inputs = inputs[:count]
    with poisoned_allocations():
        actual = with_gradients(function, grad, *inputs)
    again = with_gradients(function, grad, *inputs)
    same = with_gradients(plain, grad, *inputs)
    expected = with_gradients(plain, grad.double(), *(x.double() for x in inputs))
    # In float64 the reference is the expectation.
    floors = {torch.float64: 1e-13, torch.float32: CANCELLING}
    names = ("out", "dq", "dk", "dv", "dpos_weight", "dgating")[: count + 1]
    for i, (name, a, second) in enumerate(zip(names, actual, again, strict=True)):
        floor = floors.get(dtype, 0.0) if i > 3 or dtype == torch.float64 else 0.0
        assert_agreement(a, same[i], expected[i], name=name, floor=floor)
        assert torch.equal(a, second), f"{name} is not repeatable"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_forward_of_many_tokens_agrees(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "_FUSED_TOKENS", 0)
    _, *inputs = problem(dtype)
    out = gpsa_attention(*inputs, GRID)
    wide = [x.double() for x in inputs]
    same = reference.gpsa_attention(*inputs, GRID)
    assert_agreement(out, same, reference.gpsa_attention(*wide, GRID))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_is_bitwise_the_same(dtype: torch.dtype) -> None:
    grad, q, k, v, weight, gate = problem(dtype)
    qk = torch.stack([x.transpose(1, 2) for x in (q, k)], 2)
    qkv = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2)

    separate = with_gradients(gpsa, grad, q, k, v, weight, gate)
    packed = with_gradients(lambda *x: gpsa_attention_qkpacked(*x, GRID), grad, qk, v, weight, gate)
    dqk = packed.pop(1).permute(2, 0, 3, 1, 4)
    for a, e in zip([packed[0], *dqk, *packed[1:]], separate, strict=True):
        assert torch.equal(a, e)

    separate = with_gradients(attention, grad, q, k, v)
    out, dqkv = with_gradients(attention_qkvpacked, grad, qkv)
    for a, e in zip([out, *dqkv.permute(2, 0, 3, 1, 4)], separate, strict=True):
        assert torch.equal(a, e)


def test_packed_gradients_come_in_one_contiguous_piece() -> None:
    """The projection's backward then reads them without a copy."""
    grad, *_ = problem(torch.bfloat16)
    qkv = torch.randn(B, N, 3, H, D, dtype=torch.bfloat16, requires_grad=True)
    (dqkv,) = torch.autograd.grad(attention_qkvpacked(qkv), qkv, grad)
    assert dqkv.is_contiguous()


@pytest.mark.parametrize(
    "shape", [(B, N, 2, H, D), (B, N, H, D), (B, 3, N, H, D)], ids=["two", "flat", "order"]
)
def test_a_wrong_packing_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"qkv: expected \(B, N, 3, H, d\)"):
        attention_qkvpacked(torch.randn(shape))


def test_packed_runs_on_the_reference_backend_too() -> None:
    _, q, k, v, weight, gate = problem(torch.float64)
    qk = torch.stack([x.transpose(1, 2) for x in (q, k)], 2)
    for backend, p in itertools.product(("reference", "auto"), (0.0, 0.5)):
        torch.manual_seed(1)
        a = gpsa_attention_qkpacked(qk, v, weight, gate, GRID, dropout_p=p, backend=backend)
        torch.manual_seed(1)
        e = gpsa_attention(q, k, v, weight, gate, GRID, dropout_p=p, backend=backend)
        torch.testing.assert_close(a, e)

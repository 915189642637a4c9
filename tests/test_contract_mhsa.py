# SPDX-License-Identifier: Apache-2.0
"""Plain attention against the dense formula in float64 and against timm's MHSA."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from timm.models.convit import MHSA as TimmMHSA
from torch import Tensor

import fastvit
from fastvit import MHSA
from fastvit.functional import attention
from fastvit.testing import poisoned_allocations

BACKENDS = ["reference", "torch", None]


def dense_map(q, k, scale=None):
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ((q @ k.transpose(-2, -1)).to(wide) * scale).softmax(-1)


def dense_attention(q, k, v, scale=None):
    return dense_map(q, k, scale).to(v.dtype) @ v


def problem(heads, tokens, dim, dtype=torch.float32, *, batch=2, seed=0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, dim)
    return {n: torch.randn(shape, generator=generator).to(dtype) for n in "qkv"}


def pair(*, seed: int = 0, backend: str | None = None, dtype=None, **options):
    """Our MHSA and timm's with the same random parameters."""
    theirs = TimmMHSA(**options, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in theirs.parameters():
            fan_in = parameter.shape[-1]
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    ours = MHSA(**options, dtype=dtype, backend=backend)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.fixture(params=BACKENDS, ids=str)
def op(request):
    return partial(attention, backend=request.param)


class TestOp:
    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
    )
    @pytest.mark.parametrize(
        ("heads", "tokens", "dim"),
        [
            pytest.param(9, 197, 48, id="convit_small_with_class_token"),
            pytest.param(3, 197, 64, id="deit_tiny"),
            pytest.param(16, 7, 5, id="odd_sizes"),
            pytest.param(1, 1, 16, id="one_token"),
        ],
    )
    def test_agrees_with_the_dense_formula(self, op, heads, tokens, dim, dtype, check_numbers):
        check_numbers(op, dense_attention, [problem(heads, tokens, dim, dtype)])

    @pytest.mark.parametrize("scale", [0.37, 0.0, -1.0])
    def test_scale_replaces_the_default(self, op, scale, check_numbers):
        check_numbers(op, dense_attention, [problem(2, 7, 8, torch.float64) | {"scale": scale}])

    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_batch_sizes(self, op, batch, check_numbers):
        check_numbers(op, dense_attention, [problem(2, 7, 8, torch.float64, batch=batch)])

    @pytest.mark.parametrize(
        "relayout",
        [
            pytest.param(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), id="bnhd"),
            pytest.param(lambda x: torch.stack([x, x * 7], -1)[..., 0], id="inner_stride_2"),
            pytest.param(lambda x: torch.cat([x * 7, x], 1)[:, x.shape[1] :], id="offset"),
            pytest.param(lambda x: x[:1].expand_as(x), id="expanded_batch"),
        ],
    )
    def test_any_strides(self, op, relayout, check_numbers):
        p = {name: relayout(x) for name, x in problem(2, 7, 8, torch.float64).items()}
        check_numbers(op, dense_attention, [p])

    @pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
    @pytest.mark.parametrize("name", ["q", "k", "v"])
    def test_nan_and_inf_go_through_as_in_the_formula(self, op, name, value):
        p = problem(2, 7, 8)
        p[name].view(-1)[1] = value
        expected = dense_attention(**p)
        torch.testing.assert_close(op(**p), expected, rtol=1e-4, atol=1e-5, equal_nan=True)

    def test_repeats_bit_by_bit_on_poisoned_memory(self, op, differentiate):
        p = problem(3, 20, 8)
        first = differentiate(op, p)
        with poisoned_allocations():
            again = differentiate(op, p)
        for name, x in first.items():
            assert torch.equal(x, again[name]), name

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast(self, op, dtype, differentiate):
        p = problem(2, 7, 8)
        actual = differentiate(torch.autocast("cpu", dtype=dtype)(op), p)
        with torch.autocast("cpu", dtype=dtype), torch.autocast("cpu", enabled=False):
            plain = op(**p)
        expected = differentiate(op, {n: x.to(dtype) for n, x in p.items()})
        assert torch.equal(actual["output"], expected["output"])
        assert all(actual[f"grad of {n}"].dtype == torch.float32 for n in p)
        assert torch.equal(plain, op(**p))


class TestDropout:
    @pytest.mark.parametrize("backend", ["reference", None])
    def test_acts_on_the_map(self, backend):
        p = problem(2, 12, 12, batch=3)
        p["v"] = torch.eye(12).expand_as(p["v"])
        full = attention(**p)
        dropped = attention(**p, dropout_p=0.25, backend=backend)
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], full[kept] / 0.75)
        # 864 draws: within 5 standard deviations of 0.0147.
        assert abs(kept.float().mean() - 0.75) < 0.074

    def test_seed_decides(self):
        p = problem(2, 12, 12)

        def draw(seed):
            torch.manual_seed(seed)
            return attention(**p, dropout_p=0.5)

        assert torch.equal(draw(3), draw(3))
        assert not torch.equal(draw(3), draw(4))

    def test_zero_is_none_and_one_is_all(self):
        p = problem(2, 12, 12)
        assert torch.equal(attention(**p, dropout_p=0.0), attention(**p))
        assert not attention(**p, dropout_p=1.0).any()

    def test_module_drops_in_training_only(self):
        module = MHSA(24, 4, attn_drop=0.5, proj_drop=0.5)
        plain = MHSA(24, 4)
        plain.load_state_dict(module.state_dict())
        x = torch.randn(2, 16, 24)
        assert torch.equal(module.eval()(x), plain(x))
        module.train()
        torch.manual_seed(1)
        first = module(x)
        assert not torch.equal(first, module(x))
        torch.manual_seed(1)
        assert torch.equal(first, module(x))


class TestModule:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        ("dim", "heads", "tokens", "bias"),
        [
            pytest.param(192, 4, 197, False, id="convit_tiny"),
            pytest.param(15, 3, 7, True, id="odd_head_dim_5"),
            pytest.param(24, 1, 16, True, id="one_head"),
        ],
    )
    def test_agrees_with_timm(
        self, backend, dtype, dim, heads, tokens, bias, differentiate_module, check_agreement
    ):
        ours, theirs = pair(dim=dim, num_heads=heads, qkv_bias=bias, backend=backend, dtype=dtype)
        x = torch.randn(2, tokens, dim).to(dtype)
        check_agreement(
            [differentiate_module(ours, x)],
            [differentiate_module(theirs, x)],
            [differentiate_module(copy.deepcopy(theirs).double(), x.double())],
        )

    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_batch_sizes(self, batch, differentiate_module):
        result = differentiate_module(MHSA(24, 4), torch.randn(batch, 16, 24))
        assert result["output"].shape == (batch, 16, 24)

    def test_qk_scale(self):
        ours, theirs = pair(dim=24, num_heads=4, dtype=torch.float64)
        scaled = MHSA(24, 4, qk_scale=0.25, dtype=torch.float64)
        scaled.load_state_dict(ours.state_dict())
        theirs.scale = 0.25
        x = torch.randn(2, 16, 24, dtype=torch.float64)
        torch.testing.assert_close(scaled(x), theirs(x))

    @pytest.mark.parametrize("qkv_bias", [False, True])
    def test_keys_both_ways(self, qkv_bias):
        ours, theirs = MHSA(24, 4, qkv_bias), TimmMHSA(24, 4, qkv_bias)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(MHSA(24, 4, qkv_bias).state_dict(), strict=True)

    def test_positional_arguments(self):
        for layer in (MHSA, TimmMHSA):
            module = layer(24, 4, True, 0.1, 0.2, "cpu", torch.float64)
            assert module.num_heads == 4
            assert module.qkv.bias is not None
            assert (module.attn_drop.p, module.proj_drop.p) == (0.1, 0.2)
            assert module.scale == 6**-0.5
            assert module.qkv.weight.dtype == torch.float64


class TestMaps:
    def test_attention_is_what_forward_applies(self):
        ours, _ = pair(dim=24, num_heads=4, qkv_bias=True, dtype=torch.float64)
        x = torch.randn(2, 16, 24, dtype=torch.float64)
        q, k, v = ours.qkv(x).view(2, 16, 3, 4, 6).permute(2, 0, 3, 1, 4)
        attention_map = ours.get_attention(x)
        torch.testing.assert_close(attention_map, dense_map(q, k))
        out = ours.proj((attention_map @ v).transpose(1, 2).reshape(2, 16, 24))
        torch.testing.assert_close(ours(x), out, rtol=1e-11, atol=1e-12)

    def test_attention_map_as_timm(self):
        ours, theirs = pair(dim=24, num_heads=4, dtype=torch.float64)
        x = torch.randn(3, 49, 24, dtype=torch.float64)
        distance, mean_map = theirs.get_attention_map(x, return_map=True)
        torch.testing.assert_close(ours.get_attention_map(x), distance, rtol=1e-11, atol=0)
        ours_distance, ours_map = ours.get_attention_map(x, return_map=True)
        torch.testing.assert_close(ours_distance, distance, rtol=1e-11, atol=0)
        torch.testing.assert_close(ours_map, mean_map, rtol=1e-11, atol=1e-13)

    def test_class_token_has_no_distance(self):
        """timm fails at N + 1 tokens; the patches' distances are those among the patches."""
        ours, _ = pair(dim=24, num_heads=4, dtype=torch.float64)
        x = torch.randn(3, 17, 24, dtype=torch.float64)
        distance, mean_map = ours.get_attention_map(x, return_map=True)
        assert mean_map.shape == (4, 17, 17)
        cells = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).double()
        metric = torch.cdist(cells, cells)
        expected = (metric * mean_map[:, 1:, 1:]).sum((1, 2)) / 16
        torch.testing.assert_close(distance, expected)


def test_reference_backend_is_the_reference_module():
    module = MHSA(24, 4, backend="reference", dtype=torch.float64)
    oracle = fastvit.reference.MHSA(24, 4, dtype=torch.float64)
    oracle.load_state_dict(module.state_dict())
    x = torch.randn(2, 16, 24, dtype=torch.float64)
    torch.testing.assert_close(module(x), oracle(x), rtol=1e-13, atol=1e-14)

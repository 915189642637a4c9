# SPDX-License-Identifier: Apache-2.0
"""Linear layers in inference: oneDNN's product where nothing but the numbers is asked for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastvit import MHSA
from fastvit.layers.children import project
from fastvit.models.blocks import Mlp
from fastvit.ops.linear import linear, onednn_linear, takes_onednn
from fastvit.testing import assert_agreement

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN"
)


def plain_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As the models' MLP chooses."""
    if takes_onednn(x, weight, bias):
        return onednn_linear(x, weight, bias, gelu=True)
    return plain_gelu(x, weight, bias)


def layer(dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(3, 67, 48, generator=generator),
        torch.randn(37, 48, generator=generator),
    )
    b = torch.randn(37, generator=generator).to(dtype) if bias else None
    return x.to(dtype), weight.to(dtype) / 7, b


@pytest.mark.parametrize("function", [(linear, F.linear), (linear_gelu, plain_gelu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_agreement(
    function: tuple[Callable[..., Tensor], ...], dtype: torch.dtype, bias: bool, grad: bool
) -> None:
    ours, plain = function
    x, weight, b = layer(dtype, bias)
    with torch.set_grad_enabled(grad):
        for view in (x, x[:, ::2], x.transpose(0, 1)):
            if dtype != torch.float64:
                wide = (view.double(), weight.double(), None if b is None else b.double())
                assert_agreement(ours(view, weight, b), plain(view, weight, b), plain(*wide))
            else:
                torch.testing.assert_close(ours(view, weight, b), plain(view, weight, b))


@needs_onednn
@torch.no_grad()
def test_nan_and_infinity_go_through() -> None:
    x, weight, b = layer(torch.float32)
    x[0, 3, 5], x[1, 4, 6] = float("nan"), float("inf")
    assert takes_onednn(x, weight, b)
    for ours, plain in ((linear, F.linear), (linear_gelu, plain_gelu)):
        actual, expected = ours(x, weight, b), plain(x, weight, b)
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_only_inference_on_many_rows_takes_it() -> None:
    x, weight, b = layer(torch.float32)
    assert not takes_onednn(x, weight, b)
    with torch.no_grad():
        assert takes_onednn(x, weight, b)
        assert takes_onednn(x, nn.Parameter(weight), None)
        assert not takes_onednn(x[:1], weight, b)
        assert not takes_onednn(x.double(), weight.double(), b)


def onednn_off() -> AbstractContextManager[None]:
    return torch.backends.mkldnn.flags(enabled=False)


def counting() -> FlopCounterMode:
    return FlopCounterMode(display=False)


@needs_onednn
@pytest.mark.parametrize(
    "context", [onednn_off, counting, lambda: torch.autocast("cpu"), nullcontext]
)
def test_what_must_see_a_linear_layer_sees_one(
    context: Callable[[], AbstractContextManager[None]],
) -> None:
    x, weight, b = layer(torch.float32)
    with torch.no_grad(), context():
        assert takes_onednn(x, weight, b) == (context is nullcontext)


@pytest.mark.parametrize("grad", [True, False])
def test_flops_are_counted(grad: bool) -> None:
    x = torch.randn(3, 67, 48)
    heads = torch.randn(3, 4, 67, 12)
    with torch.set_grad_enabled(grad), counting() as plain:
        # Some versions of PyTorch do not count it.
        F.scaled_dot_product_attention(heads, heads, heads)
    mlp = 2 * 2 * 3 * 67 * 48 * 96
    attention = 2 * 3 * 67 * 4 * 48 * 48 + plain.get_total_flops()
    for module, expected in ((Mlp(48, 96), mlp), (MHSA(48, 4), attention)):
        with torch.set_grad_enabled(grad), counting() as counter:
            module(x)
        assert counter.get_total_flops() == expected


@torch.no_grad()
def test_a_watched_layer_is_called() -> None:
    calls = []
    fc, x = nn.Linear(48, 8), torch.randn(3, 67, 48)
    fc.register_forward_hook(lambda *_: calls.append(1))
    project(fc, x)
    mlp = Mlp(48, 96)
    mlp.fc1.register_forward_hook(lambda *_: calls.append(2))
    mlp(x)
    mlp.fc2.register_forward_pre_hook(lambda *_: calls.append(3))
    mlp(x)
    assert calls == [1, 2, 2, 3]


@torch.no_grad()
def test_what_only_a_linear_layer_understands_goes_there() -> None:
    """Each of these oneDNN answers wrongly, or refuses in its own words."""
    x, weight, b = layer(torch.float32)
    for bias in (
        torch.tensor(2.0).expand(37),
        torch.randn(74)[::2],
        torch.randn(()),
        torch.randn(1),
        torch.randn(1, 37),
    ):
        assert not takes_onednn(x, weight, bias)
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    assert linear(torch.randn(200, 0), torch.randn(37, 0), b).shape == (200, 37)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x.bfloat16(), weight.bfloat16(), b)
    with pytest.raises(RuntimeError, match="shapes"):
        linear(x[..., :-1], weight, b)
    with pytest.raises((RuntimeError, NotImplementedError)):
        linear(x, weight, b.to("meta"))


@torch.no_grad()
def test_a_replaced_forward_runs() -> None:
    """So do libraries that keep weights elsewhere until they are needed."""
    x, fc, mlp = torch.randn(3, 67, 48), nn.Linear(48, 48), Mlp(48, 96)
    fc.forward = lambda t: t + 1
    assert torch.equal(project(fc, x), x + 1)
    mlp.act.forward = torch.zeros_like
    torch.testing.assert_close(mlp(x), mlp.fc2.bias.expand(x.shape))


@pytest.mark.parametrize("grad", [True, False])
def test_another_gelu_stays_what_it_is(grad: bool) -> None:
    mlp, x = Mlp(48, 96), torch.randn(3, 67, 48)
    mlp.act = nn.GELU(approximate="tanh")
    with torch.set_grad_enabled(grad):
        expected = mlp.fc2(mlp.act(mlp.fc1(x)))
        torch.testing.assert_close(mlp(x), expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_hooks_on_all_modules_see_the_layers() -> None:
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m))):
        Mlp(48, 96)(torch.randn(3, 67, 48))
    assert seen.count(nn.Linear) == 2

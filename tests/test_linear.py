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

from fastvit.layers.children import project
from fastvit.models.blocks import Mlp
from fastvit.ops import linear as module
from fastvit.ops.linear import linear, linear_gelu
from fastvit.testing import assert_agreement

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN"
)


def plain_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def layer(dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(3, 67, 48, generator=generator),
        torch.randn(37, 48, generator=generator),
    )
    b = torch.randn(37, generator=generator).to(dtype) if bias else None
    return x.to(dtype), weight.to(dtype) / 7, b


def uses_onednn(*args: Tensor | None) -> bool:
    return module._is_plain_inference(*args)


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
    assert uses_onednn(x, weight, b)
    for ours, plain in ((linear, F.linear), (linear_gelu, plain_gelu)):
        actual, expected = ours(x, weight, b), plain(x, weight, b)
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_only_inference_on_many_rows_takes_it() -> None:
    x, weight, b = layer(torch.float32)
    assert not uses_onednn(x, weight, b)
    with torch.no_grad():
        assert uses_onednn(x, weight, b)
        assert uses_onednn(x, nn.Parameter(weight), None)
        assert not uses_onednn(x[:1], weight, b)
        assert not uses_onednn(x.double(), weight.double(), b)


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
        assert uses_onednn(x, weight, b) == (context is nullcontext)


@torch.no_grad()
def test_flops_are_counted() -> None:
    mlp, x = Mlp(48, 96), torch.randn(3, 67, 48)
    with FlopCounterMode(display=False) as counter:
        mlp(x)
    assert counter.get_total_flops() == 2 * 2 * 3 * 67 * 48 * 96


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

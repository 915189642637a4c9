# SPDX-License-Identifier: Apache-2.0
"""Ops whose implementation is called past the dispatcher where nobody would see the difference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastvit
from fastvit.functional import patch_embed
from fastvit.ops import library


def problem(**changes: object) -> dict[str, object]:
    drawn = {"images": torch.randn(2, 3, 8, 8), "weight": torch.randn(5, 3, 4, 4)}
    return {**drawn, "bias": torch.randn(5), "backend": "torch", **changes}


@pytest.fixture
def went(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of an op went past the dispatcher."""
    unwatched, found = library._unwatched, []

    def noted(args: tuple[object, ...]) -> bool:
        found.append(unwatched(args))
        return found[-1]

    monkeypatch.setattr(library, "_unwatched", noted)
    return found


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_plain_call_goes_past_the_dispatcher(mode, went):
    p = problem()
    with mode():
        out = patch_embed(**p)
    assert went == [True]
    assert not out.requires_grad
    with Watching():
        assert torch.equal(patch_embed(**p), out)


def test_so_do_both_directions_of_a_training_step(went):
    p = problem(weight=torch.nn.Parameter(torch.randn(5, 3, 4, 4)))
    patch_embed(**p).square().sum().backward()
    assert went == [True, True]
    assert torch.is_grad_enabled()


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_op(went):
    with Watching() as mode, torch.no_grad():
        patch_embed(**problem())
    assert "fastvit._patch_embed_forward.default" in mode.seen
    assert went == [False]


def test_a_profile_names_the_op(went):
    with torch.profiler.profile() as profile, torch.no_grad():
        patch_embed(**problem())
    assert "fastvit::_patch_embed_forward" in {event.key for event in profile.key_averages()}
    assert went == [False]


def test_a_transform_sees_the_op():
    p = problem()
    images = p.pop("images")
    out = torch.func.vmap(lambda x: patch_embed(x[None], **p)[0])(images)
    torch.testing.assert_close(out, patch_embed(images, **p))


class Subclass(Tensor):
    pass


@pytest.mark.parametrize("name", ["images", "weight", "bias"])
def test_a_subclass_goes_through_the_dispatcher(name, went):
    p = problem()
    expected = patch_embed(**p)
    p[name] = p[name].as_subclass(Subclass)
    torch.testing.assert_close(patch_embed(**p).as_subclass(Tensor), expected)
    assert went == [True, False]


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_lazy_minus_is_resolved(backend, went):
    if backend == "native" and fastvit._native.reason() is not None:
        pytest.skip("needs the compiled module fastvit._C")
    images = torch.randn(2, 3, 8, 8, dtype=torch.complex64).conj().imag
    assert images.is_neg()
    p = problem(images=images, backend=backend)
    out = patch_embed(**p)
    torch.testing.assert_close(out, patch_embed(**{**p, "images": images.resolve_neg()}))
    assert went == [False, True]


def test_autocast_does_not_reach_the_implementation(went):
    """The sums of positions would be rounded twice."""
    p = problem(pos_embed=torch.randn(1, 4, 5))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = patch_embed(**p)
    assert out.dtype == torch.bfloat16
    with Watching(), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(patch_embed(**p), out)
    assert went == [True, False]


def test_meta_tensors_go_through_the_dispatcher(went):
    with torch.device("meta"):
        p = problem()
    assert patch_embed(**{**p, "backend": "auto"}).shape == (2, 4, 5)
    assert went == [False]


def test_an_error_leaves_gradients_on(monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object) -> Tensor:
        raise RuntimeError("failed")

    monkeypatch.setattr(fastvit.ops.patch_embed, "_implementation", fail)
    with pytest.raises(RuntimeError, match="failed"):
        patch_embed(**problem())
    assert torch.is_grad_enabled()

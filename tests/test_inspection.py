# SPDX-License-Identifier: Apache-2.0
"""`fastvit.attention_maps`: the maps that a model's own forward pass uses."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import fastvit


def small_convit(**kwargs) -> nn.Module:
    options = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 4}
    return fastvit.models.ConViT(**options, local_up_to_layer=2, num_classes=5, **kwargs)


def test_maps_gates_and_distances_of_every_layer() -> None:
    model, x = small_convit().eval(), torch.randn(2, 3, 32, 48)
    maps = fastvit.attention_maps(model, x)
    assert list(maps) == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    with torch.no_grad():
        tokens = model.blocks[0].norm1(model._embed(x))
    first, last = maps["blocks.0.attn"], maps["blocks.2.attn"]
    layer = model.blocks[0].attn
    torch.testing.assert_close(first.map, layer.get_attention(tokens))
    torch.testing.assert_close(first.gate, torch.sigmoid(layer.gating_param))
    torch.testing.assert_close(first.distance, layer.get_attention_map(tokens))
    # The class token has joined, and plain attention has no gate.
    assert (last.map.shape, last.gate, last.distance.shape) == ((2, 4, 25, 25), None, (4,))
    for entry in maps.values():
        torch.testing.assert_close(entry.map.sum(-1), torch.ones(entry.map.shape[:-1]))
        assert not entry.map.requires_grad


def test_a_uniform_map_has_the_mean_distance_of_the_grid() -> None:
    """Of plain attention with a class token, on a grid that is no square."""
    model = small_convit().eval()
    nn.init.zeros_(model.blocks[2].attn.qkv.weight)
    distance = fastvit.attention_maps(model, torch.randn(1, 3, 32, 48))["blocks.2.attn"].distance
    points = [(row, column) for row in range(4) for column in range(6)]
    total = sum(((a - c) ** 2 + (b - d) ** 2) ** 0.5 for a, b in points for c, d in points)
    torch.testing.assert_close(distance, torch.full((4,), total / 24 / 25))


@pytest.mark.parametrize("name", ["convit_tiny", "deit_tiny_patch16_224"])
def test_models_of_timm_have_the_maps_of_ours(name: str) -> None:
    theirs = timm.create_model(name, num_classes=3).eval()
    ours = fastvit.create_model(name.removesuffix("_patch16_224"), num_classes=3).eval()
    fastvit.models.load_checkpoint(ours, theirs.state_dict())
    x = torch.randn(1, 3, 224, 224)
    expected, actual = fastvit.attention_maps(theirs, x), fastvit.attention_maps(ours, x)
    assert list(expected) == list(actual)
    for e, a in zip(expected.values(), actual.values(), strict=True):
        torch.testing.assert_close(a.map, e.map, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(a.distance, e.distance, rtol=1e-4, atol=1e-4)
        assert (a.gate is None) == (e.gate is None)


def test_modes_hooks_and_numbers_stay_as_they_were() -> None:
    model, x = small_convit(attn_drop_rate=0.5).train(), torch.randn(1, 3, 32, 48)
    model.blocks[1].norm1.eval()
    modes = [m.training for m in model.modules()]
    first, second = (fastvit.attention_maps(model, x) for _ in range(2))
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())
    for a, b in zip(first.values(), second.values(), strict=True):
        assert torch.equal(a.map, b.map)


def test_a_failing_model_is_left_as_it_was() -> None:
    model = small_convit().train()
    with pytest.raises(ValueError, match="images"):
        fastvit.attention_maps(model, torch.randn(1, 3, 8, 8))
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model: expected attention layers .* got a Sequential"):
        fastvit.attention_maps(nn.Sequential(nn.Linear(2, 2)), torch.randn(1, 2))


def test_a_single_layer_is_a_model() -> None:
    layer, x = fastvit.GPSA(8, 2), torch.randn(2, 15, 8)

    class WithGrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn(x, grid_size=(3, 5))

    (entry,) = fastvit.attention_maps(WithGrid(), x).values()
    torch.testing.assert_close(entry.map, layer.get_attention(x, (3, 5)))
    torch.testing.assert_close(entry.distance, layer.get_attention_map(x, grid_size=(3, 5)))

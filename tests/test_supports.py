# SPDX-License-Identifier: Apache-2.0
"""``fastvit.supports``: what would run, and the reason in words for what would not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from library_models import CONVIT, HEADS, PATCH, SIZE, WIDTH, build, images, sequential_stem
from torch import nn

import fastvit
from fastvit import functional

BACKENDS = ("reference", "torch", "triton", "native")
TOKENS = torch.randn(2, 16, WIDTH)
LAYERS = {
    "GPSA": (lambda: fastvit.GPSA(WIDTH, HEADS), TOKENS),
    "MHSA": (lambda: fastvit.MHSA(WIDTH, HEADS), TOKENS),
    "ConvStem": (lambda: fastvit.ConvStem(3, (8, 12), (2, 2), WIDTH), images()),
    "PatchEmbed": (lambda: fastvit.PatchEmbed(SIZE, PATCH, 3, WIDTH), images()),
    "timm GPSA": (lambda: timm.models.convit.GPSA(WIDTH, HEADS), TOKENS),
    "timm MHSA": (lambda: timm.models.convit.MHSA(WIDTH, HEADS), TOKENS),
    "timm Attention": (lambda: timm.models.vision_transformer.Attention(WIDTH, HEADS), TOKENS),
    "timm PatchEmbed": (lambda: timm.layers.PatchEmbed(SIZE, PATCH, 3, WIDTH), images()),
    "convit GPSA": (lambda: CONVIT.GPSA(WIDTH, HEADS), TOKENS),
    "stem": (sequential_stem, images()),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    make, x = LAYERS[name]
    layer = make()
    assert fastvit.supports(layer) == (True, "")
    assert fastvit.supports(layer, x) == (True, "")
    if not name[0].isupper():
        assert fastvit.accelerate(layer)
        assert fastvit.supports(layer, x) == (True, "")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(LAYERS)[:4])
def test_the_answer_is_what_happens(name: str, backend: str) -> None:
    make, x = LAYERS[name]
    layer = make()
    possible, reason = fastvit.supports(layer, x, backend=backend)
    assert possible == (reason == "")
    with fastvit.backend(backend):
        if possible:
            layer(x)
        else:
            with pytest.raises(RuntimeError):
                layer(x)


@pytest.mark.parametrize(
    ("function", "inputs", "words"),
    [
        (functional.patch_embed, lambda: (images(), torch.randn(8, 3, 5, 5)), "divisible"),
        (functional.patch_embed, lambda: (images(), torch.randn(8, 4, 4, 4)), "channel"),
        (
            functional.gpsa_attention,
            lambda: (*torch.randn(3, 1, 2, 6, 8), torch.randn(2, 3), torch.randn(2), (2, 2)),
            "grid",
        ),
    ],
)
def test_bad_inputs_have_the_reason_of_the_call(
    function: Callable[..., object], inputs: Callable[[], tuple], words: str
) -> None:
    possible, reason = fastvit.supports(function, *inputs())
    assert not possible
    assert words in reason
    with pytest.raises((ValueError, TypeError)) as error:
        function(*inputs())
    assert str(error.value) in reason


def test_grid_of_a_layer() -> None:
    possible, reason = fastvit.supports(fastvit.GPSA(WIDTH, HEADS), torch.randn(2, 15, WIDTH))
    assert not possible
    assert "15" in reason
    assert fastvit.supports(
        fastvit.GPSA(WIDTH, HEADS, grid_size=(3, 5)), torch.randn(2, 15, WIDTH)
    )[0]


def test_nothing_is_computed_or_changed() -> None:
    stem = sequential_stem().train()
    before = {k: v.clone() for k, v in stem.state_dict().items()}
    fastvit.supports(stem, images())
    assert all(torch.equal(v, before[k]) for k, v in stem.state_dict().items())
    assert type(stem) is nn.Sequential


def test_modules_of_others() -> None:
    for module in (nn.Linear(2, 2), nn.MultiheadAttention(8, 2), build("timm-convit")):
        possible, reason = fastvit.supports(module)
        assert not possible
        assert type(module).__name__ in reason


def test_misuse() -> None:
    with pytest.raises(TypeError, match="layer_or_op"):
        fastvit.supports("gpsa")
    with pytest.raises(TypeError, match="layer_or_op"):
        fastvit.supports(torch.relu)
    with pytest.raises(ValueError, match="triton"):
        fastvit.supports(fastvit.GPSA(WIDTH, HEADS), backend="tritn")

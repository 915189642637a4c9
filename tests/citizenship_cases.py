# SPDX-License-Identifier: Apache-2.0
"""What PyTorch's tools are tried on: the public ops as modules, the layers, tiny models.

The tests take lists of cases and know nothing of what is in them, so another kind of module needs
no more than a list of its own.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastvit
from fastvit.functional import ConvStage, attention, conv_stem, gpsa_attention, patch_embed

Built = tuple[nn.Module, Tensor]

GRID = (3, 5)
HEADS, HEAD_DIM = 3, 8
WIDTH = HEADS * HEAD_DIM


class Case(NamedTuple):
    """A named way to make a module and an input whose first axis is the batch, of 2."""

    name: str
    build: Callable[[], Built]

    def make(self, training: bool = False) -> Built:
        """The same numbers each time, none of them what an initialisation gives: a head that
        starts at zero would hide everything before it.
        """
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module, x = self.build()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
            for name, buffer in module.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_(0.0, 0.3, generator=generator)
                elif name.endswith("running_var"):
                    buffer.uniform_(0.5, 2.0, generator=generator)
        return module.train(training), x


def each(*groups: Sequence[Case]) -> pytest.MarkDecorator:
    """Give a test its argument ``case`` from these lists."""
    cases = [case for group in groups for case in group]
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def batch_of(x: Tensor, size: int) -> Tensor:
    """``size`` samples that differ, of the kind of ``x``."""
    index = torch.arange(size) % x.shape[0]
    if not x.is_floating_point():
        return x[index]
    factor = 1.0 + 0.1 * torch.arange(size, dtype=torch.float32)
    return x[index] * factor.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and the gradients of every parameter, of a loss that is not linear."""
    module.zero_grad()
    out = module(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in module.parameters() if p.requires_grad)]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], rtol: float = 1e-4) -> None:
    """Equal up to the order of summation, on the scale of each tensor."""
    for a, e in zip(actual, expected, strict=True):
        scale = float(e.detach().abs().max()) + 0.1
        torch.testing.assert_close(a, e, rtol=rtol, atol=rtol * scale)


def project(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """q, k and v (B, H, N, d)."""
    qkv = nn.functional.linear(x, weight).reshape(*x.shape[:2], 3, HEADS, HEAD_DIM)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


class GPSAOp(nn.Module):
    """Projected by one weight, so that the gradients of q, k and v are those of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / WIDTH**0.5)
        self.pos_weight = nn.Parameter(torch.randn(HEADS, 3))
        self.gating_param = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = project(x, self.weight)
        return gpsa_attention(q, k, v, self.pos_weight, self.gating_param, GRID)


class MHSAOp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = project(x, self.weight)
        return attention(q, k, v)


class ConvStemOp(nn.Module):
    """Two stages, with a position and a class token, which the layer does not have."""

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 4, 6)
        for i, (before, after) in enumerate(itertools.pairwise(channels)):
            self.register_parameter(
                f"weight{i}", nn.Parameter(torch.randn(after, before, 3, 3) / (9 * before) ** 0.5)
            )
            self.register_parameter(f"gamma{i}", nn.Parameter(torch.ones(after)))
            self.register_parameter(f"beta{i}", nn.Parameter(torch.zeros(after)))
            self.register_buffer(f"{i}_running_mean", torch.zeros(after))
            self.register_buffer(f"{i}_running_var", torch.ones(after))
        self.proj_weight = nn.Parameter(torch.randn(5, channels[-1], 1, 1))
        self.proj_bias = nn.Parameter(torch.zeros(5))
        self.pos_embed = nn.Parameter(torch.randn(1, 24, 5))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        names = ("weight{}", "gamma{}", "beta{}", "{}_running_mean", "{}_running_var")
        stages = [
            ConvStage(*(getattr(self, name.format(i)) for name in names), stride)
            for i, stride in enumerate((2, 1))
        ]
        return conv_stem(
            x, stages, self.proj_weight, self.proj_bias, training=self.training,
            pos_embed=self.pos_embed, cls_token=self.cls_token,
        )  # fmt: skip


class PatchEmbedOp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 3, 4, 4) / 7)
        self.bias = nn.Parameter(torch.zeros(7))
        self.pos_embed = nn.Parameter(torch.randn(1, 7, 7))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 7))

    def forward(self, x: Tensor) -> Tensor:
        return patch_embed(
            x, self.weight, self.bias, pos_embed=self.pos_embed, cls_token=self.cls_token
        )


OPS = [
    Case("gpsa", lambda: (GPSAOp(), torch.randn(2, 15, WIDTH))),
    Case("mhsa", lambda: (MHSAOp(), torch.randn(2, 17, WIDTH))),
    Case("conv_stem", lambda: (ConvStemOp(), torch.randn(2, 3, 8, 12))),
    Case("patch_embed", lambda: (PatchEmbedOp(), torch.randn(2, 3, 8, 12))),
]

LAYERS = [
    Case(
        "GPSA",
        lambda: (
            fastvit.GPSA(WIDTH, HEADS, qkv_bias=True, grid_size=GRID),
            torch.randn(2, 15, WIDTH),
        ),
    ),
    Case("MHSA", lambda: (fastvit.MHSA(WIDTH, HEADS), torch.randn(2, 17, WIDTH))),
    Case(
        "ConvStem",
        lambda: (fastvit.ConvStem(3, (4, 6), (2, 2), 10), torch.randn(2, 3, 9, 12)),
    ),
    Case(
        "PatchEmbed",
        lambda: (fastvit.PatchEmbed((8, 12), 4, embed_dim=10), torch.randn(2, 3, 8, 12)),
    ),
]

SMALL = {
    "img_size": 16, "patch_size": 4, "embed_dim": WIDTH, "num_heads": HEADS, "depth": 2,
    "mlp_ratio": 2.0, "num_classes": 5,
}  # fmt: skip
#: Arguments of ``create_model`` for a model of two blocks on 16 patches, by its name.
SMALL_MODELS: dict[str, dict[str, object]] = {
    # A block of each kind of attention.
    "convit_tiny": {**SMALL, "local_up_to_layer": 1},
    "deit_tiny": SMALL,
    "vit_p_1gf": SMALL,
    "vit_c_1gf": {**SMALL, "stem_channels": (4, 6), "stem_strides": (2, 2)},
}


def small_model(name: str, **kwargs: object) -> Built:
    return fastvit.create_model(name, **SMALL_MODELS[name], **kwargs), torch.randn(2, 3, 16, 16)


MODELS = [Case(name, functools.partial(small_model, name)) for name in SMALL_MODELS]

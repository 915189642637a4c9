# SPDX-License-Identifier: Apache-2.0
"""Contenders of the patch embedding: each a module from images to tokens, or to less."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.functional import patch_embed
from gpu.device import Device
from gpu.patch_compare import STATISTICS, backend, kernels, number, parameters
from gpu.shapes import Embedding


class Tokens(nn.Module):
    """fastvit's: normalisation, class token and positions in the same call."""

    def __init__(self, device: Device, problem: Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        for name, drawn in parameters(device, problem, dtype).items():
            self.register_parameter(name, nn.Parameter(drawn))
        # Not made in a call: a graph takes no copies from the host.
        for name, values in STATISTICS.items():
            drawn = torch.tensor(values, device=device.device).view(1, -1, 1, 1)
            self.register_buffer(name, drawn)
        self.backend = backend(device)

    def forward(self, images: Tensor) -> Tensor:
        statistics: dict[str, Any] = STATISTICS if images.dtype == torch.uint8 else {}
        return patch_embed(images, **self._parameters, **statistics, backend=self.backend)


class Portable(Tokens):
    """The kernel for every capability, by itself; forward only."""

    def __init__(
        self, device: Device, problem: Embedding, dtype: str, *, small_tile: bool | None = None
    ) -> None:
        super().__init__(device, problem, number(dtype))
        self.kernels = kernels("mma, large tile", dtype)._replace(small_tile=small_tile)

    def forward(self, images: Tensor) -> Tensor:
        statistics = STATISTICS.values() if images.dtype == torch.uint8 else (None, None)
        drawn = (parameter.detach() for parameter in self._parameters.values())
        return self.kernels.forward(images, *drawn, *statistics)


class Chain(Tokens, ABC):
    """Operators of PyTorch, one after the other."""

    def __init__(self, device: Device, problem: Embedding, dtype: torch.dtype) -> None:
        super().__init__(device, problem, dtype)
        # Of bytes, not of fractions.
        self.register_buffer("shift", (255.0 * self.mean).to(dtype))
        self.register_buffer("scale", (255.0 * self.std).to(dtype))

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = self.normalized(images)
        x = self.project(images)
        # As timm's VisionTransformer does.
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x + self.pos_embed

    def normalized(self, images: Tensor) -> Tensor:
        """As timm's loader does it on a GPU: one tensor of the model's numbers, in place."""
        return images.to(self.weight.dtype).sub_(self.shift).div_(self.scale)

    @abstractmethod
    def project(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) as tokens (B, N, D), without class token and positions."""


class Timm(Chain):
    """timm's PatchEmbed."""

    def __init__(
        self, device: Device, problem: Embedding, dtype: torch.dtype, *, channels_last: bool = False
    ) -> None:
        super().__init__(device, problem, dtype)
        from timm.layers import PatchEmbed

        if channels_last:
            self.to(memory_format=torch.channels_last)
        self.embed = PatchEmbed(problem.size, problem.patch, 3, problem.D)
        self.embed.proj.weight, self.embed.proj.bias = self.weight, self.bias

    def project(self, images: Tensor) -> Tensor:
        return self.embed(images)


class Linear(Chain):
    """Patches as rows of a matrix."""

    def project(self, images: Tensor) -> Tensor:
        ph, pw = self.weight.shape[-2:]
        grid = images.unflatten(3, (-1, pw)).unflatten(2, (-1, ph))
        rows = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(rows, self.weight.flatten(1), self.bias)


class Conv(Tokens):
    """The convolution alone, of images that need nothing else."""

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.weight, self.bias, stride=self.weight.shape[-2:])

# SPDX-License-Identifier: Apache-2.0
"""Image geometry, and the convolutional stem as a patch embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvit.layers import ConvStem
from fastvit.layers.tracing import Leaf, fx_node
from fastvit.reference.arguments import pair, untraced


class Geometry(NamedTuple):
    """How an image divides into patches; pairs are (height, width).

    Attributes:
        img_size: pixels of the image.
        patch_size: pixels of a patch.
        grid_size: rows and columns of patches.
    """

    img_size: tuple[int, int]
    patch_size: tuple[int, int]
    grid_size: tuple[int, int]


def divide_image(img_size: int | Sequence[int], patch_size: int | Sequence[int]) -> Geometry:
    """Divide an image into whole patches.

    Raises:
        ValueError: if a size is malformed or the image is not divisible by the patch.
    """
    image, patch = pair(img_size, "img_size"), pair(patch_size, "patch_size")
    if image[0] % patch[0] or image[1] % patch[1]:
        raise ValueError(f"img_size {image} must be divisible by the patch size {patch}")
    return Geometry(image, patch, (image[0] // patch[0], image[1] // patch[1]))


class ConvStemEmbed(Leaf, nn.Module):
    """ViT_C's convolutional stem in the place of a patch embedding (arXiv 2106.14881 §3).

    The stem is the child ``backbone``, so that the keys equal those of timm's ``HybridEmbed``
    around its ``ConvStem``.

    Args:
        img_size: pixels, an int or (height, width), divisible by the product of the strides.
        in_chans: image channels.
        channels: output channels of each 3x3 convolution.
        strides: stride of each 3x3 convolution, 1 or 2.
        embed_dim: token width, made by the last 1x1 convolution.
        mean, std: per channel, for uint8 images (see ``fastvit.ConvStem``).
        backend: backend of the stem; None follows ``fastvit.set_backend``.

    Raises:
        ValueError: if the image size does not fit the strides, or a forward's images do not
            have the size built for.
    """

    def __init__(
        self,
        img_size: int | Sequence[int],
        in_chans: int,
        channels: Sequence[int],
        strides: Sequence[int],
        embed_dim: int,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size, self.grid_size = divide_image(img_size, math.prod(strides))
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.backbone = ConvStem(
            in_chans,
            tuple(channels),
            tuple(strides),
            embed_dim,
            mean=mean,
            std=std,
            backend=backend,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Embed images (B, in_chans, H, W) as tokens (B, N, embed_dim)."""
        if (node := fx_node(self, x)) is not None:
            return node
        self._check_size(x)
        return self.backbone(x)

    @untraced
    def _check_size(self, x: Tensor) -> None:
        if x.ndim != 4 or tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(
                f"images: expected (B, C, {self.img_size[0]}, {self.img_size[1]}), the size that "
                f"the model was built for, got shape {tuple(x.shape)}"
            )

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastvit import reference
from fastvit.functional import patch_embed
from fastvit.layers.children import is_plain
from fastvit.layers.documentation import with_backend
from fastvit.layers.tracing import Leaf, fx_node
from fastvit.ops.backend import checked, requested


class PatchEmbed(Leaf, reference.PatchEmbed):
    __doc__ = with_backend(reference.PatchEmbed)

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            norm_layer,
            flatten,
            output_fmt,
            bias,
            strict_img_size,
            dynamic_img_pad,
            device,
            dtype,
            mean=mean,
            std=std,
        )
        self.backend = None if backend is None else checked(backend)

    def forward(self, images: Tensor) -> Tensor:
        if (node := fx_node(self, images)) is not None:
            return node
        if requested(self.backend) == "reference" or not is_plain(self.proj, nn.Conv2d):
            return super().forward(images)
        images = self._pad(images)
        # Padding has normalised uint8 images already.
        raw = images.dtype == torch.uint8
        tokens = patch_embed(
            images,
            self.proj.weight,
            self.proj.bias,
            mean=self.mean if raw else None,
            std=self.std if raw else None,
            backend=self.backend,
        )
        return self._finish(tokens, self.dynamic_feat_size(images.shape[-2:]))

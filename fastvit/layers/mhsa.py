# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvit import reference
from fastvit.functional import attention_qkvpacked
from fastvit.layers.children import dropout_rate, is_plain, project
from fastvit.layers.documentation import with_backend
from fastvit.layers.tracing import Leaf, fx_node
from fastvit.ops.backend import checked, requested
from fastvit.reference.arguments import check_tokens


class MHSA(Leaf, reference.MHSA):
    __doc__ = with_backend(reference.MHSA)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        qk_scale: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            dim, num_heads, qkv_bias, attn_drop, proj_drop, device, dtype, qk_scale=qk_scale
        )
        self.backend = None if backend is None else checked(backend)

    def forward(self, x: Tensor) -> Tensor:
        if (node := fx_node(self, x)) is not None:
            return node
        if requested(self.backend) == "reference" or not is_fusible(self):
            return super().forward(x)
        check_tokens(x, self.dim)
        return fused_mhsa(self, x, self.scale, dropout_rate(self.attn_drop), self.backend)


def is_fusible(layer: Any) -> bool:
    """Whether nobody watches or replaced the child of an MHSA that :func:`fused_mhsa` skips."""
    return is_plain(layer.attn_drop, nn.Dropout, nn.Identity)


def fused_mhsa(
    layer: Any, x: Tensor, scale: float | None, dropout_p: float, backend: str | None
) -> Tensor:
    """The forward of an attention layer, ours or another library's, on ``x`` (B, N, dim)."""
    B, N, _ = x.shape
    qkv = project(layer.qkv, x)
    out = attention_qkvpacked(
        qkv.reshape(B, N, 3, layer.num_heads, qkv.shape[-1] // (3 * layer.num_heads)),
        scale=scale,
        dropout_p=dropout_p,
        backend=backend,
    )
    return layer.proj_drop(project(layer.proj, out.transpose(1, 2).flatten(2)))

# SPDX-License-Identifier: Apache-2.0
"""Multi-head self-attention, Vaswani et al. 2017, arXiv 1706.03762, as ViT and ConViT use it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.reference.arguments import (
    check_heads,
    check_probability,
    check_tokens,
    default_scale,
)
from fastvit.reference.gpsa import relative_positions


def attention_map(q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
    """Softmax of the scaled scores of q and k (B, H, N, d): (B, H, N, N), rows summing to one."""
    scale = default_scale(q) if scale is None else scale
    return ((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Scaled dot-product attention of q, k, v (B, H, N, d) through the N x N map."""
    attn = attention_map(q, k, scale=scale)
    # Softmax under autocast is wider than the values.
    return F.dropout(attn, dropout_p, training=dropout_p > 0.0).to(v.dtype) @ v


class MHSA(nn.Module):
    """Multi-head self-attention with timm's arguments, parameters and keys.

    Args:
        dim: width C of the tokens.
        num_heads: H; divides ``dim``.
        qkv_bias: whether ``qkv`` has a bias.
        attn_drop: dropout on the attention map, in training.
        proj_drop: dropout on the output, in training.
        qk_scale: scale of the scores instead of ``(dim / num_heads) ** -0.5``.

    Shapes: input and output (B, N, dim). Parameters: ``qkv`` (3 dim, dim), ``proj`` (dim, dim).

    Raises:
        ValueError: ``dim`` is not divisible by ``num_heads``, or a dropout is outside [0, 1]; at
            the call, ``x`` has another shape.
        TypeError: at the call, ``x`` is not floating.
    """

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
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_probability("attn_drop", attn_drop)
        check_probability("proj_drop", proj_drop)
        self.dim = dim
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **factory)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"

    def _heads_of(self, qkv: Tensor) -> Tensor:
        """The projection (B, N, 3 dim) as (B, N, 3, H, d)."""
        B, N, _ = qkv.shape
        return qkv.reshape(B, N, 3, self.num_heads, self.dim // self.num_heads)

    def _qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v (B, H, N, d) of ``x`` (B, N, dim), as views of one projection."""
        check_tokens(x, self.dim)
        return self._heads_of(self.qkv(x)).permute(2, 0, 3, 1, 4).unbind(0)

    def get_attention(self, x: Tensor) -> Tensor:
        """The exact attention map (B, H, N, N) of ``x`` (B, N, dim)."""
        q, k, _ = self._qkv(x)
        return self.attn_drop(attention_map(q, k, scale=self.scale))

    def get_attention_map(
        self, x: Tensor, return_map: bool = False, grid_size: tuple[int, int] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Mean attention distance of each head (H,), in patches, over the batch.

        A class token in front of the patches is left out of the distance (timm fails there).
        With ``return_map`` the mean map (H, N, N) of all tokens comes too.

        Raises:
            ValueError: neither N nor N - 1 fills the grid (a square when none is given).
        """
        attn = self.get_attention(x).mean(0)
        N = x.shape[1]
        rows, columns = grid_size or (math.isqrt(N), math.isqrt(N))
        prefix = N - rows * columns
        if prefix not in (0, 1):
            raise ValueError(
                f"grid_size: expected {rows} * {columns} tokens, or one more for a class token, "
                f"got N = {N}"
            )
        distance = relative_positions((rows, columns), x.device)[0, :, :, 2].sqrt()
        patches = attn[:, prefix:, prefix:]
        mean_distance = torch.einsum("nm,hnm->h", distance.to(attn.dtype), patches)
        mean_distance = mean_distance / (N - prefix)
        return (mean_distance, attn) if return_map else mean_distance

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._qkv(x)
        attn = self.attn_drop(attention_map(q, k, scale=self.scale))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).flatten(2)))

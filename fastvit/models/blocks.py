# SPDX-License-Identifier: Apache-2.0
"""Building blocks of both model families: stochastic depth, the MLP, the transformer block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvit.layers import GPSA, MHSA
from fastvit.layers.children import is_plain, project, unwatched_linear
from fastvit.ops.linear import onednn_linear

LAYER_NORM_EPS = 1e-6


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Drop probability of each block: linear from 0 at the first to ``rate`` at the last.

    Raises:
        ValueError: if ``rate`` is outside [0, 1].
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"drop_path_rate must lie in [0, 1], got {rate}")
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


class DropPath(nn.Module):
    """Stochastic depth: in training, zeroes a residual branch for whole samples.

    Kept samples are scaled by ``1 / (1 - drop_prob)``, so the expectation is unchanged.
    Source: Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382.

    Args:
        drop_prob: probability of dropping a sample's branch, in [0, 1].
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Drop samples of ``x`` (B, ...); the identity in ``eval()``."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        return x * (mask / keep_prob if keep_prob > 0.0 else mask)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between them: (B, N, dim) -> (B, N, dim).

    Args:
        dim: width of input and output.
        hidden_dim: width between the two layers.
        drop: dropout probability after each layer.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        exact = is_plain(self.act, nn.GELU) and self.act.approximate == "none"
        if exact and unwatched_linear(self.fc1, x):
            x = onednn_linear(x, self.fc1.weight, self.fc1.bias, gelu=True)
        else:
            x = self.act(self.fc1(x))
        return self.drop2(project(self.fc2, self.drop1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: ``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``.

    Args:
        dim: token width.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over ``dim``.
        qkv_bias: bias of the query, key and value projections.
        proj_drop: dropout after the attention's projection and in the MLP.
        attn_drop: dropout on the attention weights.
        drop_path: probability of dropping each residual branch.
        use_gpsa: gated positional self-attention (ConViT, arXiv 2103.10697 §3) instead of
            plain multi-head self-attention.
        locality_strength: GPSA's initial focus on a head's attention centre.
        grid_size: rows and columns of GPSA's patch grid; None takes a square.
        backend: backend of the attention layer; None follows ``fastvit.set_backend``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        use_gpsa: bool = False,
        locality_strength: float = 1.0,
        grid_size: tuple[int, int] | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        attention: dict[str, Any] = {
            "num_heads": num_heads,
            "qkv_bias": qkv_bias,
            "attn_drop": attn_drop,
            "proj_drop": proj_drop,
            "backend": backend,
            "device": device,
            "dtype": dtype,
        }
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS, device=device, dtype=dtype)
        self.attn: GPSA | MHSA
        if use_gpsa:
            self.attn = GPSA(
                dim, locality_strength=locality_strength, grid_size=grid_size, **attention
            )
        else:
            self.attn = MHSA(dim, **attention)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS, device=device, dtype=dtype)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to tokens (B, N, dim); N is that of the grid for GPSA."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

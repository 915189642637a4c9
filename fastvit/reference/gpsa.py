# SPDX-License-Identifier: Apache-2.0
"""Gated positional self-attention (GPSA) of ConViT, d'Ascoli et al. 2021, arXiv 2103.10697."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.reference.arguments import (
    check_grid,
    check_heads,
    check_probability,
    check_tokens,
    default_scale,
    untraced,
)


def relative_positions(
    grid_size: tuple[int, int],
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Relative positions of all pairs of tokens on a grid (section 3 of the paper).

    Args:
        grid_size: (rows, columns), in tokens, which are numbered row by row.

    Returns:
        (1, N, N, 3) with ``[0, i, j] = (dx, dy, dx**2 + dy**2)``, where dx and dy are the column
        and the row of key j minus those of query i.
    """
    rows, columns = grid_size
    y, x = torch.meshgrid(
        torch.arange(rows, device=device, dtype=torch.float32),
        torch.arange(columns, device=device, dtype=torch.float32),
        indexing="ij",
    )
    x, y = x.flatten(), y.flatten()
    dx = x[None, :] - x[:, None]
    dy = y[None, :] - y[:, None]
    return torch.stack((dx, dy, dx**2 + dy**2), dim=-1)[None].to(dtype)


def mixed_attention_map(
    q: Tensor, k: Tensor, position: Tensor, gating_param: Tensor, *, scale: float
) -> Tensor:
    """The gated mixture of content and position attention, equation 7 of the paper.

    Args:
        q, k: (B, H, N, d).
        position: (B, N, N, H), positional scores before the softmax over the keys.
        gating_param: (H,), before the sigmoid.
        scale: of the content scores.

    Returns:
        (B, H, N, N), rows summing to one.
    """
    position = position.permute(0, 3, 1, 2).softmax(dim=-1)
    content = ((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1)
    gate = torch.sigmoid(gating_param).view(1, -1, 1, 1)
    mixed = (1.0 - gate) * content + gate * position
    # Both maps have rows that sum to one, so this changes rounding only; the authors do it.
    return mixed / mixed.sum(dim=-1, keepdim=True)


def gpsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gating_param: Tensor,
    grid_size: tuple[int, int],
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    kept: Tensor | None = None,
) -> Tensor:
    """GPSA of given queries, keys and values, through the N x N maps.

    Takes what :func:`fastvit.functional.gpsa_attention` takes, and with dropout the weights that
    are ``kept``, (B, H, N, N) of bool, instead of drawing them. Returns (B, H, N, d).
    """
    scale = default_scale(q) if scale is None else scale
    positions = relative_positions(grid_size, q.device, pos_weight.dtype)
    # The projection is evaluated for every image of the batch, as the authors and timm do.
    position = F.linear(positions.expand(q.shape[0], -1, -1, -1), pos_weight)
    attn = mixed_attention_map(q, k, position, gating_param, scale=scale)
    if kept is None:
        attn = F.dropout(attn, dropout_p, training=dropout_p > 0.0)
    else:
        # Where all are dropped nothing is left to be amplified.
        attn = torch.where(kept, attn, 0.0) / (1.0 - dropout_p if dropout_p < 1.0 else 1.0)
    # The position parameters, and softmax under autocast, may be wider than the values.
    return attn.to(v.dtype) @ v


def _whole(parameter: Any) -> Tensor:
    """A copy of a parameter, which FSDP may have sharded."""
    whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole.clone()


def _assign(parameter: Any, value: Tensor) -> None:
    """Give a parameter, which FSDP may have sharded, a value that is the same on every rank."""
    if hasattr(parameter, "full_tensor"):
        # Only here, since importing it takes time.
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


class GPSA(nn.Module):
    """Gated positional self-attention, with timm's arguments, parameters and keys.

    Args:
        dim: width C of the tokens.
        num_heads: H; divides ``dim``.
        qkv_bias: whether ``qk`` and ``v`` have a bias.
        attn_drop: dropout on the mixed attention map, in training.
        proj_drop: dropout on the output, in training.
        locality_strength: alpha of the paper's section 3, used by :meth:`local_init`.
        qk_scale: scale of the content scores instead of ``(dim / num_heads) ** -0.5``.
        use_local_init: call :meth:`local_init`.
        grid_size: (rows, columns) of the tokens; None takes a square.

    Shapes: input and output (B, N, dim). Parameters: ``qk`` (2 dim, dim), ``v`` and ``proj``
    (dim, dim), ``pos_proj`` (H, 3), ``gating_param`` (H,).

    Raises:
        ValueError: ``dim`` is not divisible by ``num_heads``, a dropout is outside [0, 1], or
            ``grid_size`` is no pair of positive ints; at the call, ``x`` has another shape or
            does not fill the grid.
        TypeError: at the call, ``x`` is not floating.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        locality_strength: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        qk_scale: float | None = None,
        use_local_init: bool = False,
        grid_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_probability("attn_drop", attn_drop)
        check_probability("proj_drop", proj_drop)
        self.dim = dim
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.locality_strength = locality_strength
        self.grid_size = None if grid_size is None else check_grid(grid_size)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qk = nn.Linear(dim, dim * 2, bias=qkv_bias, **factory)
        self.v = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **factory)
        self.pos_proj = nn.Linear(3, num_heads, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.gating_param = nn.Parameter(torch.ones(num_heads, **factory))
        if use_local_init:
            self.local_init()

    def reset_parameters(self) -> None:
        """Initialise the one parameter that is no child's, as PyTorch's own layers do."""
        nn.init.ones_(self.gating_param)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, grid_size={self.grid_size}"

    @torch.no_grad()
    def local_init(self) -> None:
        """Initialise the heads as a convolution (section 3 of the paper).

        ``v`` becomes the identity and head ``h1 + k * h2`` attends around the offset
        ``(h2 - c, h1 - c)`` with k = int(sqrt(H)); heads beyond k * k keep their weights, scaled
        by ``locality_strength`` as all are.
        """
        v, weight = self.v.weight, _whole(self.pos_proj.weight)
        _assign(v, torch.eye(self.dim, device=v.device, dtype=v.dtype))
        kernel_size = math.isqrt(self.num_heads)
        center = (kernel_size - 1) / 2 if kernel_size % 2 == 0 else kernel_size // 2
        for row in range(kernel_size):
            for column in range(kernel_size):
                offset = (2 * (column - center), 2 * (row - center), -1.0)
                weight[row + kernel_size * column] = weight.new_tensor(offset)
        _assign(self.pos_proj.weight, weight.mul_(self.locality_strength))

    @untraced
    def resolve_grid_size(
        self, num_patches: int, grid_size: tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """The grid to use for ``num_patches`` tokens: the argument, the module's, or a square.

        Raises:
            ValueError: the grid does not hold ``num_patches`` tokens, or none is given and
                ``num_patches`` is no square.
        """
        given = self.grid_size if grid_size is None else grid_size
        if given is not None:
            rows, columns = check_grid(given)
            if rows * columns != num_patches:
                raise ValueError(
                    f"grid_size: expected rows * columns == N = {num_patches}, "
                    f"got {rows} * {columns} = {rows * columns}"
                )
            return rows, columns
        # Not math.isqrt, which torch.compile cannot trace for a symbolic number of patches.
        side = int(num_patches**0.5)
        if side * side != num_patches:
            raise ValueError(
                f"grid_size: N = {num_patches} is no square, so the grid must be given as "
                "(rows, columns); got None"
            )
        return side, side

    def get_rel_indices(self, num_patches: int, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Relative positions (1, N, N, 3), made on demand in the dtype of the parameters."""
        grid = self.resolve_grid_size(num_patches, grid_size)
        # Of this parameter, since a Linear may be wrapped by an adapter.
        return relative_positions(grid, self.gating_param.device, self.gating_param.dtype)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, n * dim) to (n, B, H, N, d), or to (B, H, N, d) for n = 1, without a copy."""
        B, N, _ = x.shape
        heads, count = (self.num_heads, self.dim // self.num_heads), self._count(x)
        if count == 1:
            return x.reshape(B, N, *heads).transpose(1, 2)
        return x.reshape(B, N, count, *heads).permute(2, 0, 3, 1, 4)

    @untraced
    def _count(self, x: Tensor) -> int:
        return x.shape[-1] // self.dim

    def get_attention(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """The exact mixed attention map (B, H, N, N) of ``x`` (B, N, dim)."""
        check_tokens(x, self.dim)
        q, k = self._heads(self.qk(x)).unbind(0)
        positions = self.get_rel_indices(x.shape[1], grid_size).expand(x.shape[0], -1, -1, -1)
        position = self.pos_proj(positions)
        attn = mixed_attention_map(q, k, position, self.gating_param, scale=self.scale)
        return self.attn_drop(attn)

    def get_attention_map(
        self, x: Tensor, return_map: bool = False, grid_size: tuple[int, int] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Mean attention distance of each head (H,), in patches, over the batch.

        The paper calls it non-locality (section 4). With ``return_map`` the mean map (H, N, N)
        comes too.
        """
        attn = self.get_attention(x, grid_size).mean(0)
        distance = self.get_rel_indices(x.shape[1], grid_size)[0, :, :, 2].sqrt()
        mean_distance = torch.einsum("nm,hnm->h", distance.to(attn.dtype), attn) / x.shape[1]
        return (mean_distance, attn) if return_map else mean_distance

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        attn = self.get_attention(x, grid_size)
        out = attn @ self._heads(self.v(x))
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

# SPDX-License-Identifier: Apache-2.0
"""What the ops share: layouts of tokens, the dtype of sums, gradients of embedded tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def assemble(x: Tensor, pos_embed: Tensor | None, cls_token: Tensor | None) -> Tensor:
    """Positions added to tokens (B, N, D) and the class token put before them, as
    :func:`fastvit.reference.assemble_tokens` does, with one pass; may overwrite ``x``.
    """
    pos_embed = None if pos_embed is None else pos_embed.to(x.dtype)
    if cls_token is None:
        return x if pos_embed is None else x.add_(pos_embed)
    B, N, D = x.shape
    out = x.new_empty(B, N + 1, D)
    out[:, :1] = cls_token
    if pos_embed is None:
        out[:, 1:] = x
        return out
    if pos_embed.shape[1] > N:
        out[:, :1] += pos_embed[:, :1]
    torch.add(x, pos_embed[:, -N:], out=out[:, 1:])
    return out


def token_gradients(
    grad: Tensor, pos_embed: Tensor | None, cls_token: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the patch tokens (a view of ``grad``), of ``pos_embed`` and ``cls_token``."""
    dpos = dcls = None
    if pos_embed is not None or cls_token is not None:
        total = grad.sum(0, keepdim=True, dtype=wide(grad.dtype))
        if pos_embed is not None:
            dpos = gradient_of(pos_embed, total[:, total.shape[1] - pos_embed.shape[1] :])
        if cls_token is not None:
            dcls = gradient_of(cls_token, total[:, :1])
    prefix = 0 if cls_token is None else 1
    return grad[:, prefix:], dpos, dcls


def gradient_of(parameter: Tensor, part: Tensor) -> Tensor:
    """A part of a larger sum as a gradient of its own. With the strides of its shape, even along
    axes of one element: DistributedDataParallel and the fused optimisers compare them.
    """
    return part.to(parameter.dtype).clone(memory_format=torch.contiguous_format)


def like_heads(q: Tensor) -> Tensor:
    """An empty (B, H, N, d) whose memory is (B, N, H, d), so that merging heads is a view."""
    B, H, N, d = q.shape
    # Not a transposed view, which the caller could not modify in place.
    return q.new_empty_strided((B, H, N, d), (N * H * d, d, H * d, 1))


def like_packed(q: Tensor, count: int) -> Tensor:
    """An empty (B, N, count, H, d) for q (B, H, N, d), packed as one projection gives it."""
    B, H, N, d = q.shape
    return q.new_empty(B, N, count, H, d)


def unpack_heads(packed: Tensor) -> tuple[Tensor, ...]:
    """The (B, H, N, d) of a packed (B, N, count, H, d), views."""
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


def gradients_like(q: Tensor, v: Tensor, packed: bool) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Empty gradients of q, k and v (B, H, N, d): first as one (B, N, 3, H, d) if ``packed``, else
    as (B, N, 2, H, d) of q and k and (B, H, N, d) of v; then all three as views (B, H, N, d).
    """
    if packed:
        dqkv = like_packed(q, 3)
        return (dqkv,), list(unpack_heads(dqkv))
    dqk, dv = like_packed(q, 2), like_heads(v)
    return (dqk, dv), [*unpack_heads(dqk), dv]

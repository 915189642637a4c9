# SPDX-License-Identifier: Apache-2.0
"""PyTorch's attention, and its gradients for use inside an op."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import reference
from fastvit.ops.tokens import wide

_aten = torch.ops.aten

#: With fewer tokens PyTorch's CPU kernel takes a NaN in the scores for a masked row and gives
#: zeros (torch 2.11 and 2.15: its vectors are 16 wide).
_FEWEST_TOKENS = 16

#: Queries and map elements that :func:`_by_rows` holds at a time: what a core's cache holds.
_ROWS = 128
_CPU_ELEMENTS = 1 << 18
_ELEMENTS = 1 << 26


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float = 0.0) -> Tensor:
    """Scaled dot-product attention of q, k, v (B, H, N, d) without maps in memory."""
    if q.shape[2] < _FEWEST_TOKENS:
        return reference.attention(q, k, v, scale=scale, dropout_p=dropout_p)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)


class AttentionGradients(NamedTuple):
    """``inner`` (H,) is Σ grad · output over images, queries and channels, in float32."""

    inner: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def attention_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, share: Tensor
) -> AttentionGradients:
    """Gradients of ``share * attention(q, k, v, scale)``, recomputed from its inputs.

    Inside an op there is no autograd to ask (under a dispatch mode it is off for good), so
    PyTorch's own forward and backward operators are called by name.

    Args:
        grad: gradient of the output, (B, H, N, d).
        q, k, v: (B, H, N, d), of one floating dtype.
        scale: of the scores.
        share: (H,), in float32 or float64. ``inner`` is without it.
    """
    if q.numel() == 0:
        return AttentionGradients(torch.zeros_like(share), *map(torch.zeros_like, (q, k, v)))
    # The fused kernels read rows of d consecutive elements.
    q, k, v, grad = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, grad))
    if q.shape[2] >= _FEWEST_TOKENS:
        # In half precision PyTorch's CPU backward takes twice as long as matrix products do.
        if q.device.type == "cpu" and q.dtype == wide(q.dtype):
            return _flash_cpu(grad, q, k, v, scale, share)
        if q.device.type == "cuda" and _memory_efficient_fits(q):
            return _memory_efficient(grad, q, k, v, scale, share)
    return _by_rows(grad, q, k, v, scale, share)


def _shared(grad: Tensor, share: Tensor) -> Tensor:
    return grad * share.to(grad.dtype)[:, None, None]


def _inner(grad: Tensor, out: Tensor) -> Tensor:
    """Σ grad · out per head; float16 would overflow."""
    dtype = wide(grad.dtype)
    product = grad.to(dtype) * out if grad.dtype == torch.float16 else grad * out
    return product.sum((0, 2, 3), dtype=dtype)


def _flash_cpu(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, share: Tensor
) -> AttentionGradients:
    out, logsumexp = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _shared(grad, share), q, k, v, out, logsumexp, 0.0, False, scale=scale
    )
    return AttentionGradients(_inner(grad, out), *gradients)


def _memory_efficient_fits(q: Tensor) -> bool:
    # Its backward adds with atomics.
    repeatable = torch.are_deterministic_algorithms_enabled()
    return not repeatable and q.dtype != torch.float64 and q.shape[-1] % 8 == 0


def _memory_efficient(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, share: Tensor
) -> AttentionGradients:
    out, logsumexp, seed, offset = _aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, scale=scale
    )
    wanted = [True, True, True, False]
    *gradients, _ = _aten._scaled_dot_product_efficient_attention_backward(
        _shared(grad, share), q, k, v, None, out, logsumexp, seed, offset, 0.0, wanted, scale=scale
    )
    return AttentionGradients(_inner(grad, out), *gradients)


def _by_rows(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, share: Tensor
) -> AttentionGradients:
    """By matrix products over some rows of the maps of some images at a time.

    With G = dO Vᵀ: dS = A ∘ (G - Σ A ∘ G), dq = s dS k, dk = s dSᵀ q, dv = Aᵀ dO.
    """
    B, H, N, _ = q.shape
    blocks = -(-N // _ROWS)
    rows = -(-N // blocks)
    budget = _CPU_ELEMENTS if q.device.type == "cpu" else _ELEMENTS
    images = max(1, budget // (H * rows * N))

    dtype = share.dtype
    share_map = share[:, None, None]
    weight = (scale * share_map).to(q.dtype)
    inner = torch.zeros_like(share)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for b in range(0, B, images):
        i = slice(b, b + images)
        key, value = k[i], v[i]
        dkey, dvalue = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (key, value))
        for row in range(0, N, rows):
            r = (i, slice(None), slice(row, row + rows))
            attn = (q[r] @ key.mT).mul_(scale).softmax(-1)
            dscores = grad[r] @ value.mT
            delta = (attn * dscores).sum(-1, keepdim=True, dtype=dtype)
            inner += delta.sum((0, 2, 3))
            dvalue += attn.mT @ grad[r]
            dscores = dscores.sub_(delta).mul_(attn).mul_(weight)
            dq[r] = dscores @ key
            dkey += dscores.mT @ q[r]
        dk[i] = dkey
        dv[i] = dvalue.mul_(share_map)
    return AttentionGradients(inner, dq, dk, dv)

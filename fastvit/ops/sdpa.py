# SPDX-License-Identifier: Apache-2.0
"""PyTorch's attention, and the same together with its gradients for use inside an op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import reference

_aten = torch.ops.aten

#: Elements of the maps that :func:`_by_formula` holds at a time, 64 MiB in float32.
_MAP_ELEMENTS = 1 << 24


#: With fewer tokens PyTorch's CPU kernel takes a NaN in the scores for a masked row and gives
#: zeros (torch 2.11 and 2.15: its vectors are 16 wide).
_FEWEST_TOKENS = 16


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float = 0.0) -> Tensor:
    """Scaled dot-product attention of q, k, v (B, H, N, d) without maps in memory."""
    if q.shape[2] < _FEWEST_TOKENS:
        return reference.attention(q, k, v, scale=scale, dropout_p=dropout_p)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)


def attention_with_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients of :func:`attention` without dropout, recomputed from its inputs.

    Inside an op there is no autograd to ask (under a dispatch mode it is off for good), so
    PyTorch's own forward and backward operators are called by name.

    Args:
        grad: gradient of the output, (B, H, N, d).
        q, k, v: (B, H, N, d), of one floating dtype.
        scale: of the scores.

    Returns:
        The output and the gradients of q, k and v.
    """
    # The fused kernels read rows of d consecutive elements and refuse empty inputs.
    if q.numel() == 0:
        return tuple(torch.zeros_like(x) for x in (q, q, k, v))  # type: ignore[return-value]
    q, k, v, grad = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, grad))
    if q.shape[2] < _FEWEST_TOKENS:
        return _by_formula(grad, q, k, v, scale)
    if q.device.type == "cpu":
        return _flash_cpu(grad, q, k, v, scale)
    if q.device.type == "cuda" and _memory_efficient_fits(q):
        return _memory_efficient(grad, q, k, v, scale)
    return _by_formula(grad, q, k, v, scale)


def _flash_cpu(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, logsumexp = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, logsumexp, 0.0, False, scale=scale
    )
    return out, *gradients


def _memory_efficient_fits(q: Tensor) -> bool:
    # Its backward adds with atomics.
    repeatable = torch.are_deterministic_algorithms_enabled()
    return not repeatable and q.dtype != torch.float64 and q.shape[-1] % 8 == 0


def _memory_efficient(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, logsumexp, seed, offset = _aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, scale=scale
    )
    wanted = [True, True, True, False]
    *gradients, _ = _aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, logsumexp, seed, offset, 0.0, wanted, scale=scale
    )
    return out, *gradients


def _by_formula(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Through the maps of a few images at a time, where no kernel of PyTorch's fits."""
    at_once = max(1, _MAP_ELEMENTS // (q.shape[1] * q.shape[2] ** 2))
    parts = []
    for g, q_part, k_part, v_part in zip(*(x.split(at_once) for x in (grad, q, k, v)), strict=True):
        attn = ((q_part @ k_part.mT) * scale).softmax(-1)
        inner = attn * (g @ v_part.mT)
        dscores = (inner - attn * inner.sum(-1, keepdim=True)) * scale
        parts.append((attn @ v_part, dscores @ k_part, dscores.mT @ q_part, attn.mT @ g))
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))  # type: ignore[return-value]

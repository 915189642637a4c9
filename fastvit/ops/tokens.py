# SPDX-License-Identifier: Apache-2.0
"""What patch embedding and convolutional stem share: images in, tokens and their gradients out."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def token_gradients(
    grad: Tensor, pos_embed: Tensor | None, cls_token: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the patch tokens (a view of ``grad``), of ``pos_embed`` and ``cls_token``."""
    dpos = dcls = None
    if pos_embed is not None or cls_token is not None:
        total = grad.sum(0, keepdim=True, dtype=wide(grad.dtype))
        if pos_embed is not None:
            dpos = total[:, total.shape[1] - pos_embed.shape[1] :].to(pos_embed.dtype, copy=True)
        if cls_token is not None:
            dcls = total[:, :1].to(cls_token.dtype, copy=True)
    prefix = 0 if cls_token is None else 1
    return grad[:, prefix:], dpos, dcls

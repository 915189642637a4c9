# SPDX-License-Identifier: Apache-2.0
"""Linear layers in inference on a processor, by the faster of PyTorch's two libraries."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.ops.library import autocast_enabled, in_transform, plain_ops_wanted

#: Rows from which oneDNN's product is worth the reordering of the weights.
_FEWEST_ROWS = 128


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``. Without gradients in oneDNN: in float32 8 % faster than MKL on AMD's Zen 4, in
    bfloat16 without a pass for the bias.
    """
    if takes_onednn(x, weight, bias):
        return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """``F.linear`` and perhaps its exact GELU in one pass, of what :func:`takes_onednn` takes."""
    activation, algorithm = ("gelu", "none") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)


@functools.cache
def _takes_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def takes_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN's product may stand for ``F.linear``: plain tensors of which nothing but the
    numbers is asked, with no gradient, trace, transform or mode to see another operator.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or plain_ops_wanted():
        return False
    tensors = [x, weight] if bias is None else [x, weight, bias]
    return (
        all(_is_plain(t, x.dtype) for t in tensors)
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _takes_bfloat16()))
        and weight.ndim == 2
        and x.ndim > 1
        and x.shape[-1] == weight.shape[1] > 0
        and x.numel() >= _FEWEST_ROWS * weight.shape[1]
        # It reads as many consecutive numbers as there are, whatever the strides.
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and bool(torch.backends.mkldnn.enabled)
        and torch.backends.mkldnn.is_available()
        and not autocast_enabled("cpu")
        and not in_transform()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
    )


def _is_plain(x: Tensor, dtype: torch.dtype) -> bool:
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype == dtype
        and x.layout == torch.strided
    )

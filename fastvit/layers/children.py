# SPDX-License-Identifier: Apache-2.0
"""Children whose parameters a fused forward uses without calling them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.ops.linear import onednn_linear, takes_onednn


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is exactly of one of these classes, with nobody watching it.

    If it is not, its own forward must run: an attention map is commonly read by a hook on
    ``attn_drop``, and an adapter or a parametrisation puts another class in a layer's place. A
    fused forward would leave both silently out.
    """
    return type(module) in kinds and not (
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def dropout_rate(dropout: nn.Module) -> float:
    """The probability that a plain ``nn.Dropout`` or ``nn.Identity`` applies now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; a plain ``nn.Linear`` that nobody watches in oneDNN where that is faster."""
    if unwatched_linear(layer, x):
        return onednn_linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
    return layer(x)


def unwatched_linear(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer is a linear one whose call nobody would miss, in inference on ``x``."""
    return (
        is_plain(layer, nn.Linear)
        and not nn.modules.module._has_any_global_hook()
        and takes_onednn(x, layer.weight, layer.bias)  # type: ignore[arg-type]
    )


def stacked_projection(layers: Sequence[nn.Module], x: Tensor) -> Tensor | None:
    """The outputs of several linear layers side by side, by one product with their weights stacked,
    on a GPU; None elsewhere, and where somebody would miss a layer's own call.

    One launch then reads ``x`` once, which has not been measured on a GPU. On a processor it gained
    nothing over the copy of the weights.
    """
    stack = stacked_parameters(layers) if _takes_stacks(x) else None
    return None if stack is None else F.linear(x, *stack)


def stacked_parameters(layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None] | None:
    """Weights and biases of plain linear layers, one below the other; None if somebody would miss a
    layer's own call, or only some have a bias.
    """
    first, *others = layers
    if not all(is_plain(layer, nn.Linear) for layer in layers):
        return None
    if nn.modules.module._has_any_global_hook():
        return None
    if any((layer.bias is None) != (first.bias is None) for layer in others):
        return None
    weight = torch.cat([layer.weight for layer in layers])  # type: ignore[misc]
    bias = None
    if first.bias is not None:
        bias = torch.cat([layer.bias for layer in layers])  # type: ignore[misc]
    return weight, bias


def _takes_stacks(x: Tensor) -> bool:
    return x.is_cuda

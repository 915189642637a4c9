# SPDX-License-Identifier: Apache-2.0
"""Children whose parameters a fused forward uses without calling them."""

from __future__ import annotations

from torch import Tensor, nn

from fastvit.ops.linear import linear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is exactly of one of these classes, with nobody watching it.

    If it is not, its own forward must run: an attention map is commonly read by a hook on
    ``attn_drop``, and an adapter or a parametrisation puts another class in a layer's place. A
    fused forward would leave both silently out.
    """
    return type(module) in kinds and not any(getattr(module, name) for name in _HOOKS)


def dropout_rate(dropout: nn.Module) -> float:
    """The probability that a plain ``nn.Dropout`` or ``nn.Identity`` applies now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, for a plain ``nn.Linear`` by the faster library."""
    if isinstance(layer, nn.Linear) and is_plain(layer, nn.Linear):
        return linear(x, layer.weight, layer.bias)
    return layer(x)

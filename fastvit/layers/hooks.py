# SPDX-License-Identifier: Apache-2.0
"""Hooks on children that a fused forward does not call."""

from __future__ import annotations

from torch import nn

_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(*modules: nn.Module) -> bool:
    """Whether somebody watches one of the modules, so that its own forward must run.

    An attention map is commonly read by a hook on ``attn_drop``, a feature map by one on a
    convolution; a fused forward would leave both silently unanswered.
    """
    return any(getattr(module, kind) for module in modules for kind in _KINDS)

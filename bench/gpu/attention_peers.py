# SPDX-License-Identifier: Apache-2.0
"""Attention and GPSA as others have them: PyTorch's backends, FlexAttention, timm's layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit
from fastvit.reference import relative_positions
from gpu.device import Device
from gpu.shapes import Shape


def sdpa(backend: str) -> Callable[..., Tensor]:
    """PyTorch's attention by one backend; it raises where that one takes no such call."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }[backend]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def flex(device: Device) -> Callable[..., Tensor]:
    """FlexAttention, compiled: plain attention."""
    from torch.nn.attention.flex_attention import flex_attention

    return device.compile(flex_attention, dynamic=False)


def flex_with_positions(
    device: Device, shape: Shape, pos_weight: Tensor, gating_param: Tensor
) -> Callable[..., Tensor]:
    """FlexAttention and the position pass in one compiled function, as a user would write it: the
    maps are mixed behind their softmax, where no change of scores reaches, so that the content
    part comes from FlexAttention and the position map, one for all images, is multiplied with the
    values. The map is made in every call, since its parameters are learned.
    """
    from torch.nn.attention.flex_attention import flex_attention

    assert shape.grid is not None
    # Made once, as timm keeps them.
    positions = relative_positions(shape.grid, device.device, pos_weight.dtype)[0]

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        content = flex_attention(q, k, v)
        position = F.linear(positions, pos_weight).permute(2, 0, 1).softmax(dim=-1)
        gate = torch.sigmoid(gating_param).view(1, -1, 1, 1)
        return (1.0 - gate) * content + gate * (position @ v)

    return device.compile(core, dynamic=False, fullgraph=True)


def timm_layer(device: Device, shape: Shape, dtype: torch.dtype) -> nn.Module:
    """timm's GPSA with gates that differ, as trained ones do."""
    from timm.models.convit import GPSA

    torch.manual_seed(0)
    layer = GPSA(shape.H * shape.d, num_heads=shape.H).to(device.device, dtype)
    with torch.no_grad():
        layer.gating_param.uniform_(-2.0, 2.0)
    return with_positions(layer, shape.N)


def with_positions(module: nn.Module, tokens: int) -> nn.Module:
    """timm's layers with the positions that they else make in their first forward: made in
    inference they could not take part in training, and older versions make them in float32.
    """
    for layer in module.modules():
        if hasattr(layer, "get_rel_indices"):
            weight = layer.qk.weight
            layer.rel_indices = layer.get_rel_indices(tokens).to(weight.device, weight.dtype)
    return module


def our_layer(theirs: nn.Module) -> nn.Module:
    return fastvit.GPSA.from_module(theirs, backend="triton")

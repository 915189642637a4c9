# SPDX-License-Identifier: Apache-2.0
"""The stem as cuDNN does it in inference: batch norm in the weights, bias and ReLU fused."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import reference
from gpu.device import Device


class Folded(nn.Module):
    """cuDNN's convolution, bias and ReLU of each stage, in channels_last.

    The weights are folded and laid out beforehand, which only a model that no longer trains can
    have; ours makes what derives from the parameters in every call.
    """

    #: How it takes its images.
    channels_last = True

    def __init__(self, device: Device, plain: reference.ConvStem) -> None:
        super().__init__()
        self.device = device
        self.strides = [stage.conv.stride for stage in plain.stages]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for stage in plain.stages:
            norm, weight = stage.bn, stage.conv.weight
            # In float32, so that rounding comes once.
            scale = norm.weight.float() * (norm.running_var.float() + norm.eps).rsqrt()
            bias = norm.bias.float() - norm.running_mean.float() * scale
            folded = (weight.float() * scale.view(-1, 1, 1, 1)).to(weight.dtype)
            self.weights.append(_frozen(folded.contiguous(memory_format=torch.channels_last)))
            self.biases.append(_frozen(bias.to(weight.dtype)))
        last = plain.projection.conv
        self.weight = _frozen(last.weight.contiguous(memory_format=torch.channels_last))
        self.bias = _frozen(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        for weight, bias, stride in zip(self.weights, self.biases, self.strides, strict=True):
            x = self.device.convolution_relu(x, weight, bias, stride)
        x = F.conv2d(x, self.weight, self.bias)
        return x.flatten(2).transpose(1, 2)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)

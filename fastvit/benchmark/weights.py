# SPDX-License-Identifier: Apache-2.0
"""The same random weights in both models of a row.

Models are laid out on the meta device and filled once: the libraries' own initialisations take
longer than a timed step, and a fresh model hides faults (ConViT's gates are all equal,
torchvision's head is zero, so that no gradient flows).
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastvit.benchmark.library import build_fastvit, build_library
from fastvit.benchmark.rows import Row

# Distance of a BatchNorm's output from 0 in standard deviations. Where the input of a ReLU is
# within rounding of 0, its gradient is decided by that rounding: two right implementations then
# differ by whole elements. Three deviations make that rare, and keep some inputs on either side.
_RELU_OFFSET = 3.0

# Deviations of the positional weights of GPSA on (dx, dy, dx²+dy²). The squared distance reaches
# 338 on a 14x14 grid; larger weights would leave one key per query.
_POSITION_SCALES = (0.5, 0.5, 0.05)


def library_model(
    row: Row, *, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> nn.Module:
    """The row's library model as :func:`filled` leaves it."""
    with torch.device("meta"):
        model = build_library(row)
    return filled(model, device=device, dtype=dtype, seed=seed)


def filled(
    model: nn.Module, *, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> nn.Module:
    """A model laid out on the meta device, with random weights that depend on ``seed`` only, in
    training mode.

    Raises:
        RuntimeError: the model has a buffer that nothing here can give a value.
    """
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        _fill_parameters(model, generator)
        _fill_buffers(model, generator)
    return model.train()


def fastvit_model(row: Row, library: nn.Module) -> nn.Module:
    """fastvit's model of the row with the weights of ``library``, on its device, in its dtype.

    Raises:
        ValueError: the row is a convolutional network.
        RuntimeError: the weights do not fit, or the model has a buffer outside its state dict.
    """
    from fastvit.models import load_checkpoint

    sample = next(library.parameters())
    with torch.device("meta"):
        model = build_fastvit(row)
    loose = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    if loose:
        raise RuntimeError(f"{row.name}: buffers {sorted(loose)} have no value in a state dict")
    model = model.to(sample.dtype).to_empty(device=sample.device)
    load_checkpoint(model, library.state_dict())
    return model.train(library.training)


def _fill_parameters(model: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        noise = parameter.normal_(generator=generator)
        if name.endswith("pos_proj.weight"):
            noise.mul_(noise.new_tensor(_POSITION_SCALES))
        elif parameter.ndim == 3:
            # Class token and position embedding, added to tokens of order 1.
            noise.mul_(0.5)
        elif parameter.ndim > 1:
            noise.mul_(prod(parameter.shape[1:]) ** -0.5)
        elif kind == "weight":
            noise.mul_(0.1).add_(1.0)
        elif kind != "gating_param":
            noise.mul_(0.1)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine:
            signs = _uniform_like(module.bias, generator).sub_(0.5).sign_()
            module.bias.add_(signs, alpha=_RELU_OFFSET)


def _fill_buffers(model: nn.Module, generator: torch.Generator) -> None:
    for path, module in model.named_modules():
        own = dict(module.named_buffers(recurse=False))
        if not own:
            continue
        if isinstance(module, _BatchNorm):
            own["running_mean"].normal_(generator=generator).mul_(0.1)
            own["running_var"].copy_(_uniform_like(own["running_var"], generator)).add_(0.5)
            own["num_batches_tracked"].zero_()
        elif hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
        else:
            raise RuntimeError(f"{path}: nothing here gives the buffers {sorted(own)} a value")


def _uniform_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(
        tensor.shape, generator=generator, device=tensor.device, dtype=torch.float32
    ).to(tensor.dtype)

# SPDX-License-Identifier: Apache-2.0
"""Optimisers with the papers' exemptions from weight decay, the schedule, the moving average."""

from __future__ import annotations

import math

import torch
from torch import nn

from training.config import Config


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step: linear warm-up, then half a cosine down to ``min_lr``."""
    peak = config.lr * (config.batch_size / config.lr_batch if config.lr_batch else 1.0)
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return peak * (config.warmup_start + (1 - config.warmup_start) * step / warmup)
    done = (step - warmup) / max(config.epochs * steps_per_epoch - warmup, 1)
    return peak * (config.min_lr + (1 - config.min_lr) * (1 + math.cos(math.pi * done)) / 2)


def decays(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay acts on a parameter: on matrices and kernels that are not exempt."""
    return parameter.ndim > 1 and not name.endswith(".bias") and name not in model.no_weight_decay()


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a config over the trainable parameters of a model."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if decays(model, n, p)]},
        {"params": [p for n, p in trained if not decays(model, n, p)], "weight_decay": 0.0},
    ]
    shared = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, **shared)
    return torch.optim.AdamW(groups, betas=(0.9, config.beta2), **shared)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a sharded tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged parameters a little towards the model's; copy the buffers."""
    for a, p in zip(average.parameters(), model.parameters(), strict=True):
        _local(a).lerp_(_local(p), 1 - decay)
    for a, b in zip(average.buffers(), model.buffers(), strict=True):
        a.copy_(b)

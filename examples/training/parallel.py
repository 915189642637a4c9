# SPDX-License-Identifier: Apache-2.0
"""One process or many: ranks, wrapping, and states that look the same however they are spread."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.nn.parallel import DistributedDataParallel

from training.config import Config, ConfigError


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those of ``torchrun``."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def total(self, value: Tensor) -> Tensor:
        """The sum over all ranks."""
        value = value.detach().clone()
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def from_first(self, value: Any) -> Any:
        """What the first rank has."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def start(config: Config) -> Ranks:
    """Join the other ranks if ``torchrun`` started this process."""
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if config.batch_size % (world * config.accumulate):
        raise ConfigError(
            f"batch_size: expected a multiple of ranks x accumulate = {world} x "
            f"{config.accumulate}, got {config.batch_size}"
        )
    if config.parallel == "fsdp" and config.precision == "float16" and world > 1:
        raise ConfigError("precision: float16 is not offered with fsdp, take bfloat16")
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return Ranks(rank, world, device)


def stop() -> None:
    """Leave the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model: nn.Module, config: Config, ranks: Ranks) -> None:
    """Spread the parameters over the ranks if the config says fsdp."""
    if ranks.world == 1 or config.parallel != "fsdp":
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    # By default the outermost parameters stay gathered after a forward pass without a backward one,
    # and the moving average would meet the parts of one model and the whole of another.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def replicate(model: nn.Module, config: Config, ranks: Ranks) -> nn.Module:
    """What the loop calls: the model, in DistributedDataParallel if the config says ddp."""
    if ranks.world == 1 or config.parallel != "ddp":
        return model
    devices = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices)


@contextlib.contextmanager
def gradients_of(model: nn.Module, *, last: bool):
    """Around a backward pass: gradients go over the ranks with the last one of a step only."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    yield


def share_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Give every rank the first one's running statistics of batch norms."""
    if ranks.world > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def full_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    """States of model and optimiser on the first rank, whole and by names of parameters."""
    options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return states.get_state_dict(model, optimizer, options=options)


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """State of a model on the first rank, whole."""
    options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return states.get_model_state_dict(model, options=options)


def restore(
    model: nn.Module,
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    optimizer_state: dict | None = None,
) -> None:
    """Put whole states, the same on every rank, into a model and an optimiser spread anyhow."""
    options = states.StateDictOptions(full_state_dict=True)
    if optimizer is None:
        states.set_model_state_dict(model, weights, options=options)
        return
    states.set_state_dict(
        model,
        optimizer,
        model_state_dict=weights,
        optim_state_dict=optimizer_state,
        options=options,
    )

# SPDX-License-Identifier: Apache-2.0
"""What is timed of a model: inference, by itself and in a CUDA graph, and a step of training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.benchmark.agreement import confirm
from fastvit.testing import Agreement, agreement
from gpu.device import Call, Device
from gpu.model_contenders import COMPARED, Contender, Side, random_images
from gpu.model_plan import Contest
from gpu.patch_compare import TF32

# Batches on which a gradient must disagree before it counts.
_ATTEMPTS = 3
# Seconds of replays in one sample.
_LONG = 2e-3


class Disagreement(Exception):
    """What a contender computes is not what the library's model computes in float64."""


def check_training(device: Device, side: Side, contest: Contest) -> list[Agreement]:
    """Output and gradients of a step on two images, by root mean squares."""
    few = contest._replace(batch=COMPARED)
    batches = (random_images(device, few, seed=seed)[0] for seed in range(_ATTEMPTS))
    floor = TF32 if contest.dtype == "tf32" else 0.0
    return confirm(side.row, side.theirs, side.ours, batches, rms=True, floor=floor)


def inference(
    device: Device, contest: Contest, contender: Contender, forward: Callable[[Tensor], Tensor],
    images: list[Tensor], *, graph: bool, checks: list[Agreement],
) -> list[Call]:  # fmt: skip
    """The calls that are timed, whose first output has been compared.

    Args:
        graph: whether they replay a CUDA graph of one batch.
        checks: where the comparison is noted.

    Raises:
        Disagreement: the output is not what it should be.
    """
    contender.model.eval()

    def infer(x: Tensor) -> Tensor:
        with torch.no_grad(), pinned_to(contender.pinned):
            return forward(x)

    calls: list[Call] = [lambda x=x: infer(x) for x in images]
    if graph:
        calls = [_replay(device, calls[0])]
    name = f"{contender.name} graph" if graph else contender.name
    given, theirs = calls[0]()[:COMPARED], contender.side
    floor = TF32 if contest.dtype == "tf32" else 0.0
    found = agreement(given, theirs.reference, theirs.expected, name=name, rms=True, floor=floor)
    checks.append(found)
    if not found.ok:
        raise Disagreement(str(found))
    return calls * _repeats(device, calls[0]) if graph else calls


def _replay(device: Device, call: Call) -> Call:
    replay, out = device.capture(call)
    with torch.no_grad():
        # Else a graph that writes nothing would show what its capture left.
        out.fill_(float("nan"))

    def replayed() -> Tensor:
        replay()
        return out

    return replayed


def _repeats(device: Device, call: Call) -> int:
    """How many replays take long against the launch of one, which stands before the first."""
    device.synchronize()
    start = time.perf_counter()
    call()
    device.synchronize()
    return max(1, min(16, math.ceil(_LONG / (time.perf_counter() - start))))


class Training:
    """Forward, cross-entropy, backward and a step of AdamW, as in the papers. Contenders that share
    a model share its optimizer.
    """

    def __init__(self, device: Device, images: list[Tensor]) -> None:
        self.images = images
        self.labels = torch.zeros(len(images[0]), dtype=torch.long, device=device.device)
        self._optimizers: dict[nn.Module, torch.optim.Optimizer] = {}

    def calls(self, contender: Contender, forward: Callable[[Tensor], Tensor]) -> list[Call]:
        model = contender.model.train()
        optimizer = self._optimizers.get(model)
        if optimizer is None:
            # Slow enough to leave the weights about where they were compared.
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
            self._optimizers[model] = optimizer

        def step(x: Tensor) -> Any:
            with pinned_to(contender.pinned):
                F.cross_entropy(forward(x).float(), self.labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return [lambda x=x: step(x) for x in self.images]


def pinned_to(backend: str | None) -> AbstractContextManager[Any]:
    """Leaves PyTorch's attention one backend, which raises where it takes no such call."""
    if backend is None:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, f"{backend.upper()}_ATTENTION"))

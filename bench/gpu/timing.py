# SPDX-License-Identifier: Apache-2.0
"""Contests: several implementations of one thing, timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gpu.device import Call, Device

#: Seconds after which a contest ends, if it had this many rounds.
_LONG, _LEAST_ROUNDS = 4.0, 5


def quantiles(samples: Sequence[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile in seconds, and all samples."""
    if len(samples) > 1:
        cuts = statistics.quantiles(samples, n=5, method="inclusive")
    else:
        cuts = [samples[0]] * 4
    return {
        "median": statistics.median(samples),
        "q20": cuts[0],
        "q80": cuts[3],
        "samples": list(samples),
    }


def compete(
    device: Device,
    contenders: Mapping[str, Callable[[], Sequence[Call]]],
    *,
    graphs: bool = True,
) -> dict[str, dict[str, Any]]:
    """Times of every contender, round after round, so that all meet the same clocks.

    Args:
        contenders: by name, what makes the calls over copies of the inputs. One that raises has
            an "error" in the place of times.
        graphs: whether short calls are replayed from a CUDA graph, which leaves launches out.
    """
    found: dict[str, dict[str, Any]] = {}
    samplers = {}
    for name, make in contenders.items():
        start = time.perf_counter()
        try:
            samplers[name], how = device.sampler(make(), graphs=graphs)
        # Recorded as this contender's error; the others are still timed.
        except Exception as error:
            found[name] = {"error": first_line(error)}
            # Its frames hold memory.
            del error
            device.release()
            continue
        found[name] = {"how": how, "warm_up": time.perf_counter() - start, "samples": []}
    start = time.perf_counter()
    for done in range(device.plan.rounds):
        if done >= _LEAST_ROUNDS and time.perf_counter() - start > _LONG:
            break
        for name, sample in samplers.items():
            found[name]["samples"].append(sample())
    samplers.clear()
    device.release()
    return {
        name: {**times, **quantiles(times["samples"])} if "samples" in times else times
        for name, times in found.items()
    }


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def draws(device: Device, *shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(device.device).manual_seed(seed)
    wide = torch.randn(shape, generator=generator, device=device.device, dtype=torch.float32)
    return wide.to(dtype)


def calls(
    function: Callable[..., Tensor],
    sets: Sequence[Sequence[Tensor]],
    *,
    backward: bool,
    parameters: Sequence[Tensor] = (),
    frozen: bool = False,
) -> list[Call]:
    """One call for each set of inputs: the function alone, or with every gradient, except those of
    the inputs if they are ``frozen``, as images are.
    """
    if not backward:
        return [_inference(function, inputs) for inputs in sets]
    return [_training(function, inputs, parameters, frozen) for inputs in sets]


def _inference(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return call


def _training(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    frozen: bool,
) -> Call:
    inputs = [x.detach().requires_grad_(not frozen) for x in inputs]
    leaves = [*([] if frozen else inputs), *parameters]
    cotangents: list[Tensor] = []

    def call() -> tuple[Tensor, ...]:
        out = function(*inputs)
        if not cotangents:
            # In the layout of the output, as a layer's next operation gives it.
            cotangents.append(torch.randn_like(out))
        return torch.autograd.grad(out, leaves, cotangents[0], allow_unused=True)

    return call


def host_seconds(device: Device, call: Call, count: int = 50) -> float:
    """Seconds that the host needs to issue one call, the device's queue being empty before."""
    call()
    samples = []
    for _ in range(min(count, 10 * device.plan.rounds)):
        device.synchronize()
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    device.synchronize()
    return statistics.median(samples)

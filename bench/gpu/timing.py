# SPDX-License-Identifier: Apache-2.0
"""Contests: several implementations of one thing, timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from gpu.clocks import around
from gpu.device import Call, Device, Sample

#: Seconds after which a contest ends, if it had this many rounds.
_LONG, _LEAST_ROUNDS = 4.0, 5


class Found(dict[str, dict[str, Any]]):
    """Times by contender."""

    #: Readings around the contest, see :mod:`gpu.clocks`; empty where nothing could be read.
    clocks: dict[str, Any]


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
    warm: bool = False,
) -> Found:
    """Times of every contender, round after round, so that all meet the same clocks.

    Args:
        contenders: by name, what makes the calls over copies of the inputs. One that raises, or
            whose results are no numbers or nothing but zeros, has an "error" in the place of times.
        graphs: whether short calls are replayed from a CUDA graph, which leaves launches out.
        warm: whether each is also timed over one copy again and again, which the cache then holds:
            times within the times, named "warm". No floor of the memory applies to those.

    Raises:
        RuntimeError: after one contender's error the device answers nobody.
    """
    found = Found()
    samplers: list[tuple[list[float], Sample]] = []
    for name, make in contenders.items():
        start = time.perf_counter()
        try:
            calls = make()
            with device.stream() if graphs else nullcontext():
                refuse(calls[0]())
            sample, how = device.sampler(calls, graphs=graphs)
            found[name] = {"how": how, "sets": len(calls), "samples": []}
            mine = [(found[name]["samples"], sample)]
            if warm:
                sample, how = device.warm_sampler(calls[0], graphs=graphs)
                found[name]["warm"] = {"how": how, "samples": []}
                mine.append((found[name]["warm"]["samples"], sample))
        # Recorded as this contender's error; the others are still timed.
        except Exception as error:
            found[name] = {"error": first_line(error)}
            # Its frames hold memory.
            del error
            if not device.answers():
                raise RuntimeError(
                    f"{name} took the device along: {found[name]['error']}"
                ) from None
            device.release()
            continue
        samplers += mine
        found[name]["warm_up"] = time.perf_counter() - start
    found.clocks = _rounds(device, samplers)
    samplers.clear()
    device.release()
    for times in found.values():
        for part in (times, times.get("warm", {})):
            if "samples" in part:
                part.update(quantiles(part["samples"]))
    return found


def _rounds(device: Device, samplers: Sequence[tuple[list[float], Sample]]) -> dict[str, Any]:
    """All samples, in turns; the clocks after the first and after the last of them."""
    first: dict[str, float] = {}
    start = time.perf_counter()
    for done in range(device.plan.rounds if samplers else 0):
        if done >= _LEAST_ROUNDS and time.perf_counter() - start > _LONG:
            break
        for samples, sample in samplers:
            samples.append(sample())
        if not done:
            # Work has just ended: the clocks are still those of the work.
            first = device.clocks()
    return around(first, device.clocks()) if first else {}


def refuse(result: Any) -> None:
    """Nobody's time counts whose result is missing.

    Raises:
        RuntimeError: a tensor of the result is not finite everywhere, or a matrix of it is zero
            everywhere.
    """
    for index, tensor in enumerate(tensors(result)):
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if not torch.isfinite(tensor).all():
            raise RuntimeError(f"not timed: result {index} is not finite everywhere")
        # Of one dimension are gradients of biases, which a softmax behind them takes away.
        if tensor.ndim > 1 and not tensor.any():
            raise RuntimeError(f"not timed: result {index} is nothing but zeros")


def tensors(result: Any) -> Iterator[Tensor]:
    """Those in a result and in the sequences in it."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (list, tuple)):
        for part in result:
            yield from tensors(part)


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


def host_seconds(device: Device, call: Call) -> float:
    """Seconds that the host needs to issue one call, the device's queue being empty before."""
    call()
    samples = []
    for _ in range(device.plan.hosted):
        device.synchronize()
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    device.synchronize()
    return statistics.median(samples)

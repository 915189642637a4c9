# SPDX-License-Identifier: Apache-2.0
"""Runs and times the launches of a problem, as they were recorded, on tensors of their own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvit.kernels.ahead.compiler import KERNELS, launches
from fastvit.kernels.ahead.launch import Fake, Launch, kernel_object
from fastvit.kernels.ahead.posed import case_of
from fastvit.kernels.tuned import Kernels, Posed

#: Relative differences of root mean squares beyond which results are another's.
TOLERANCE = {"half": 2.0**-6, "tf32": 2.0**-8, "ieee": 1e-4}
#: Seconds that a sample lasts at least: events resolve about a microsecond.
_SAMPLE = 5e-4
#: Sets of inputs at most.
_COPIES = 64
#: Their parts are means of tiles, whose sum says nothing where tiles are others.
_MEANS = ("stem_first", "stem_conv")

Sample = Callable[[], float]
_Key = tuple[Any, ...]


class Problem:
    """A problem's tensors and launches.

    Args:
        posed: the problem.
        precision: as cases have it, "bfloat16" for example.
        arch: whose configurations are taken.
        device: where it runs; times mean nothing on a processor.
    """

    def __init__(self, posed: Posed, precision: str, arch: str, device: torch.device) -> None:
        self.posed, self.precision, self.arch, self.device = posed, precision, arch, device
        self._sets: list[dict[_Key, Tensor]] = []
        self._outputs: set[str] = set()
        self._expected: dict[str, Tensor] = {}

    def launches(self, kernels: Kernels) -> list[Launch]:
        """In their order."""
        case = case_of(self.posed, kernels, self.precision)
        return list(launches(self.arch, case).values())

    def expect(self, kernels: Kernels) -> None:
        """Take what these kernels give as right.

        Raises:
            RuntimeError: they give nothing.
        """
        before = self._run(kernels, poison=False, keep=True)
        self._outputs = {name for name, (old, new) in before.items() if not _same(old, new)}
        found = self._run(kernels, poison=True)
        self._expected = {name: new for name, (_, new) in found.items() if name in self._outputs}
        if not any(x.isfinite().any() for x in self._expected.values()):
            raise RuntimeError(f"{self.posed.name}: the built-in kernels wrote nothing")

    def disagreement(self, kernels: Kernels) -> str:
        """How the results differ from what is expected, in words, or empty. What is written of
        another shape, as sums in parts are, is compared in sum.
        """
        found = {name: new for name, (_, new) in self._run(kernels, poison=True).items()}
        compared = 0
        for name, expected in self._expected.items():
            actual = found.get(name)
            if actual is None:
                # Between kernels that the other way of doing it does not have.
                continue
            if self.posed.op in _MEANS and actual.shape != expected.shape:
                continue
            difference = _difference(actual, expected)
            if difference is None:
                continue
            compared += 1
            # Written so that NaN is a disagreement.
            if not difference <= TOLERANCE[self.posed.arithmetic]:
                return f"{name} differs by {difference:.1e} of its size"
        return "" if compared else "nothing could be compared"

    def sampler(self, kernels: Kernels) -> Sample:
        """What times one pass over copies of the inputs; microseconds a call."""
        recorded = self.launches(kernels)
        calls = [self._call(recorded, tensors) for tensors in self._copies(recorded)]
        if self.device.type != "cuda":
            return lambda: _passed(calls)
        return _graph_sampler(calls)

    def _copies(self, recorded: list[Launch]) -> list[dict[_Key, Tensor]]:
        """Sets of tensors that have what these launches need."""
        fakes = _fakes(recorded)
        size = sum(math.prod(fake.shape) * _dtype(fake).itemsize for _, fake in fakes)
        count = 2
        if self.device.type == "cuda":
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            count = max(2, min(_COPIES, 1 + math.ceil(2 * cache / max(size, 1))))
        while len(self._sets) < count:
            self._sets.append({})
        for tensors in self._sets[:count]:
            for key, fake in fakes:
                if key not in tensors:
                    tensors[key] = self._drawn(key, fake)
        return self._sets[:count]

    def _run(
        self, kernels: Kernels, *, poison: bool, keep: bool = False
    ) -> dict[str, tuple[Tensor | None, Tensor]]:
        """What every tensor holds before and after, by name."""
        recorded = self.launches(kernels)
        keys = _fakes(recorded)
        tensors = {key: self._drawn(key, fake) for key, fake in keys}
        for key, fake in keys:
            if poison and key[0] in self._outputs and not fake.zero:
                x = tensors[key]
                if x.is_floating_point():
                    x.fill_(float("nan"))
        old = {key: tensors[key].clone() if keep else None for key, _ in keys}
        self._call(recorded, tensors)()
        return {key[0]: (old[key], tensors[key]) for key, _ in keys}

    def _call(self, recorded: list[Launch], tensors: dict[_Key, Tensor]) -> Callable[[], None]:
        keys = {id(fake): key for key, fake in _fakes(recorded)}
        launched = []
        for launch in recorded:
            arguments = {
                name: tensors[keys[id(x)]] if isinstance(x, Fake) else x
                for name, x in launch.arguments.items()
            }
            kernel = kernel_object(launch.kernel, KERNELS[launch.kernel])
            launched.append((kernel[launch.grid], arguments))

        def call() -> None:
            for run, arguments in launched:
                run(**arguments)

        return call

    def _drawn(self, key: _Key, fake: Fake) -> Tensor:
        """The same numbers for the same name."""
        dtype = _dtype(fake)
        out = torch.empty_strided(fake.shape, fake.stride(), dtype=dtype, device=self.device)
        if fake.zero:
            return out.zero_()
        generator = torch.Generator(self.device).manual_seed(hash_of(key[0]))
        if not dtype.is_floating_point:
            return out.random_(0, 256, generator=generator)
        # Norms and gates: no variance is negative.
        if out.ndim == 1:
            return out.uniform_(0.5, 1.5, generator=generator)
        return out.normal_(0.0, 0.5, generator=generator)


def hash_of(name: str) -> int:
    """The same in every process."""
    return int.from_bytes(name.encode()[-7:], "little")


def _fakes(recorded: list[Launch]) -> list[tuple[_Key, Fake]]:
    """Every tensor once: name, shape, strides, dtype, and whether it begins as zeros. The name is
    the last that a kernel gives it, by which different ways to the same result are compared.
    """
    last = {
        id(x): (name, x)
        for launch in recorded
        for name, x in launch.arguments.items()
        if isinstance(x, Fake)
    }
    return [((name, x.shape, x.stride(), x.dtype, x.zero), x) for name, x in last.values()]


def _dtype(fake: Fake) -> torch.dtype:
    return getattr(torch, fake.dtype)


def _same(old: Tensor | None, new: Tensor) -> bool:
    return old is not None and torch.equal(old, new)


def _difference(actual: Tensor, expected: Tensor) -> float | None:
    """Relative to the expected, of what was written there; None if that cannot be compared."""
    a, b = actual.double(), expected.double()
    if a.shape != b.shape:
        different = [i for i, (x, y) in enumerate(zip(a.shape, b.shape, strict=False)) if x != y]
        if a.ndim != b.ndim or len(different) != 1:
            return None
        a, b = a.nansum(different[0]), b.nansum(different[0])
    written = ~b.isnan()
    if not written.any():
        return None
    a, b = a[written], b[written]
    size = b.square().mean().sqrt().item()
    return (a - b).square().mean().sqrt().item() / (size or 1.0)


def _passed(calls: list[Callable[[], None]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) * 1e6 / len(calls)


def _graph_sampler(calls: list[Callable[[], None]]) -> Sample:
    """Replays of a graph, which leaves the launches' own time out."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in (calls[0], *calls):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    # The first replay takes the graph to the device, too.
    graph.replay()
    single = _elapsed(graph.replay) / 1e6
    passes = max(1, math.ceil(_SAMPLE / max(single, 1e-7)))

    def replays() -> None:
        for _ in range(passes):
            graph.replay()

    return lambda: _elapsed(replays) / passes / len(calls)


def _elapsed(work: Callable[[], Any]) -> float:
    """Microseconds."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3

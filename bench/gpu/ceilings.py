# SPDX-License-Identifier: Apache-2.0
"""Stage: the rates that floors are computed from, measured on random data."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch

from gpu.device import Device, tf32
from gpu.exponentials import COUNT, exponentials
from gpu.origin import trusted
from gpu.record import Record
from gpu.timing import compete, draws

_DTYPES = {
    "bfloat16": torch.bfloat16, "float16": torch.float16,
    "tf32": torch.float32, "float32": torch.float32,
}  # fmt: skip


def read(record: Record) -> dict[str, Any] | None:
    """What this stage measured of the same sources on the same machine, in this run or an earlier
    one into the same folder; None without a rate of every dtype. What failed beside them costs no
    other stage its floors.
    """
    found = (trusted(record, "ceilings") or {}).get("ceilings")
    return found if found and all(found["rates"].get(name) for name in _DTYPES) else None


def run(device: Device, record: Record) -> None:
    bandwidth = _bandwidth(device, record)
    rates: dict[str, float] = {}
    for sizes in device.plan.products:
        for name, dtype in _DTYPES.items():
            case = f"{name} {' x '.join(map(str, sizes))}"
            # One of each dtype in any case: without it no stage would have a floor.
            if record.left() < 0 and name in rates:
                record.miss(case)
                continue
            rate = _product(device, record, case, name, dtype, sizes)
            # The best of all: a floor must lie under all that is possible.
            rates[name] = max(rates.get(name, 0.0), rate)
    record.data["ceilings"] = {"bandwidth": bandwidth, "rates": rates}
    _launches(device, record)
    _exponentials(device, record)


def _bandwidth(device: Device, record: Record) -> float:
    source = draws(device, device.plan.copied, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    times = compete(device, {"copy": lambda: [lambda: target.copy_(source)]})["copy"]
    moved = 2 * source.numel() * source.element_size()
    # The best, as for every ceiling: a floor must lie under all that is possible.
    value = moved / min(times["samples"])
    record.add(name="copy, read and write", bytes=moved, value=value, unit="B/s", **times)
    return value


def _product(
    device: Device, record: Record, case: str, name: str, dtype: torch.dtype,
    sizes: tuple[int, ...],
) -> float:  # fmt: skip
    """FLOP/s of a product (rows, in, out), or of a batch of them."""
    *batch, M, K, N = sizes
    a = draws(device, *batch, M, K, dtype=dtype)
    # As a linear layer has it.
    b = draws(device, *batch, N, K, dtype=dtype, seed=1).mT
    with tf32(name == "tf32"):
        times = compete(device, {case: lambda: [lambda: a @ b]})[case]
    if "error" in times:
        record.add(name=case, **times)
        record.fail(f"{case}: {times['error']}")
        return 0.0
    value = 2 * math.prod(sizes) / min(times["samples"])
    record.add(name=case, value=value, unit="FLOP/s", **times)
    return value


def _launches(device: Device, record: Record) -> None:
    """A kernel that does nothing to speak of, each waiting for the one before: what a launch costs
    in a graph, in a stream, and the host.
    """
    # Never zero, which would be taken for a missing result.
    x = torch.ones(1, device=device.device)
    kernels = [lambda: x.add_(1.0)] * 50
    for where, graphs in (("as a node of a graph", True), ("in a stream", False)):
        times = compete(device, {where: lambda: kernels}, graphs=graphs)[where]
        record.add(name=f"launch {where}", value=times["median"], unit="s", **times)
    replay, kept = device.capture(kernels[0])
    times = compete(device, {"graph": lambda: [replay] * 20}, graphs=False)["graph"]
    assert kept is not None  # the graph writes into what it holds
    record.add(name="launch of a graph of one node", value=times["median"], unit="s", **times)
    samples = []
    for _ in range(device.plan.rounds):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            x.add_(1.0)
        samples.append((time.perf_counter() - start) / 100)
        device.synchronize()
    record.add(name="launch, host", value=statistics.median(samples), unit="s", samples=samples)


def _exponentials(device: Device, record: Record) -> None:
    x = draws(device, device.plan.exponents, dtype=torch.float32)
    times = compete(device, {"exp2": lambda: [lambda: exponentials(x)]})["exp2"]
    value = COUNT * x.numel() / min(times["samples"])
    record.add(name="exp2 in float32", value=value, unit="1/s", **times)

# SPDX-License-Identifier: Apache-2.0
"""Stage: the rates that floors are computed from, measured on random data."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from gpu.device import Device, tf32
from gpu.exponentials import COUNT, exponentials
from gpu.record import Record, read_all
from gpu.timing import compete, draws

_DTYPES = {
    "bfloat16": torch.bfloat16, "float16": torch.float16,
    "tf32": torch.float32, "float32": torch.float32,
}  # fmt: skip


def read(record: Record) -> dict[str, Any] | None:
    """What this stage measured, in this run or an earlier one into the same folder."""
    found = read_all(record.folder).get("ceilings", {})
    return found.get("ceilings") if found.get("status") == "ok" else None


def run(device: Device, record: Record) -> None:
    bandwidth = _bandwidth(device, record)
    rates: dict[str, float] = {}
    for M, K, N in device.plan.products:
        for name, dtype in _DTYPES.items():
            case = f"{name} {M} x {K} x {N}"
            if record.left() < 0:
                record.miss(case)
                continue
            rate = _product(device, record, case, name, dtype, (M, K, N))
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
    sizes: tuple[int, int, int],
) -> float:  # fmt: skip
    M, K, N = sizes
    a = draws(device, M, K, dtype=dtype)
    # As a linear layer has it.
    b = draws(device, N, K, dtype=dtype, seed=1).t()
    with tf32(name == "tf32"):
        times = compete(device, {case: lambda: [lambda: a @ b]})[case]
    value = 2 * M * K * N / min(times["samples"])
    record.add(name=case, value=value, unit="FLOP/s", **times)
    return value


def _launches(device: Device, record: Record) -> None:
    """A kernel that does nothing to speak of: what a launch costs device and host."""
    x = draws(device, 1, dtype=torch.float32)
    times = compete(device, {"launch": lambda: [lambda: x.add_(1.0)] * 50})["launch"]
    record.add(name="launch, device", value=times["median"], unit="s", **times)
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

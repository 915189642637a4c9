# SPDX-License-Identifier: Apache-2.0
"""One contest of attention, from contenders to a case of the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpu import floors
from gpu.attention import Contender, Problem
from gpu.attention_names import SDPA
from gpu.contests import MODES, WARM, judge
from gpu.device import Device
from gpu.record import Record
from gpu.timing import compete, host_seconds


def contest(
    device: Device,
    record: Record,
    rates: dict[str, Any] | None,
    problem: Problem,
    what: str,
    mode: str,
    contenders: Mapping[str, Contender],
) -> None:
    """Times of all contenders in turns, and the host's time of ours.

    Args:
        what: "core" or "module".
    """
    shape = problem.shape
    found = compete(device, problem.makers(contenders, mode), warm=shape.B <= WARM)
    label = f"{shape.name} {problem.dtype} {what} {mode}"
    work = getattr(floors, what)(*shape.problem, problem.number.itemsize, backward=MODES[mode])
    judge(record, rates, work, problem.dtype, label, found)
    more: dict[str, Any] = {"fastest": fastest_sdpa(found)} if what == "core" else {}
    for name, contender in contenders.items():
        if not contender.ours:
            continue
        if "error" in found[name]:
            record.fail(f"{label}, {name}: {found[name]['error']}")
        elif not contender.compiled:
            more["host"] = host_seconds(device, problem.calls(contender, mode, 1)[0])
    record.add(
        shape=shape._asdict(), dtype=problem.dtype, what=what, mode=mode, contenders=found,
        checks=problem.checks, **more,
    )  # fmt: skip


def fastest_sdpa(found: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The backend with the least median among timed contenders."""
    timed = {n: found[n]["median"] for n in SDPA if "median" in found.get(n, {})}
    return min(timed, key=timed.__getitem__) if timed else None

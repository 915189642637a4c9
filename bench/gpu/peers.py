# SPDX-License-Identifier: Apache-2.0
"""Stage: what others reach at our shapes: plain attention of PyTorch, and timm's layer."""

from __future__ import annotations

import torch

from gpu import ceilings, contests
from gpu.contests import MODES, SDPA, Problem, judge, timm_layer
from gpu.device import Device
from gpu.record import Record
from gpu.shapes import Shape
from gpu.timing import compete, first_line

_AUTOTUNE = "max-autotune-no-cudagraphs"
# Seconds that have to be left for a compilation to be begun.
_COMPILATION = {None: 5.0, _AUTOTUNE: 30.0}


def run(device: Device, record: Record) -> None:
    # Every shape is a compilation of its own.
    torch._dynamo.config.recompile_limit = 256
    rates = ceilings.read(record)
    # Compilation takes long: a good part of the time is kept for it.
    reserve = 0.5 * record.left()
    for shape in device.plan.shapes:
        if record.left() < reserve:
            record.miss(shape.name)
            continue
        _core(device, record, rates, shape)
        if shape.grid is not None:
            _layer(device, record, rates, shape)
    first, *others = device.plan.compiled
    order = [(first, None), *((s, _AUTOTUNE) for s in device.plan.autotuned)]
    order += [(shape, None) for shape in others]
    for shape, tuning in order:
        for mode in MODES:
            _compiled(device, record, rates, shape, mode, tuning)


def _core(device: Device, record: Record, rates: dict | None, shape: Shape) -> None:
    problem = Problem(device, shape)
    checks = []
    for backend in SDPA:
        try:
            check = contests.check_core(problem, contests.sdpa(backend), backend)
            checks.append(check._asdict())
            if not check.ok:
                record.fail(f"{shape.name}: {check}")
        # A backend that refuses a shape is a finding about that backend.
        except Exception as error:
            checks.append({"name": backend, "error": first_line(error)})
    for mode, backward in MODES.items():
        found = compete(device, {name: problem.sdpa(name, backward) for name in SDPA})
        found = judge(record, rates, shape, "core", mode, found)
        record.add(
            shape=shape._asdict(), what="core", mode=mode, contenders=found, checks=checks,
            fastest=contests.fastest_sdpa(found),
        )  # fmt: skip


def _layer(device: Device, record: Record, rates: dict | None, shape: Shape) -> None:
    problem = Problem(device, shape)
    layer = timm_layer(device, shape)
    for mode in MODES:
        found = compete(device, {"timm eager": problem.layer(layer, MODES[mode])})
        found = judge(record, rates, shape, "module", mode, found)
        record.add(shape=shape._asdict(), what="module", mode=mode, contenders=found)


def _compiled(
    device: Device, record: Record, rates: dict | None, shape: Shape, mode: str, tuning: str | None
) -> None:
    """timm's layer and FlexAttention compiled; the latter is plain attention."""
    name = f"timm compiled{f', {tuning}' if tuning else ''}"
    if record.left() < _COMPILATION[tuning]:
        record.miss(f"{shape.name} {mode} {name}")
        return
    # Else an earlier compilation in another mode could serve.
    torch._dynamo.reset()
    problem = Problem(device, shape)
    eager = timm_layer(device, shape)
    compiled = device.compile(eager, dynamic=False, mode=tuning)
    makers = {
        n: problem.layer(m, MODES[mode]) for n, m in (("timm eager", eager), (name, compiled))
    }
    found = judge(record, rates, shape, "module", mode, compete(device, makers))
    record.add(shape=shape._asdict(), what="module", mode=mode, contenders=found)
    if tuning or record.left() < 0:
        return
    makers = {"flex": problem.flex(MODES[mode])}
    found = judge(record, rates, shape, "core", mode, compete(device, makers))
    record.add(shape=shape._asdict(), what="core", mode=mode, contenders=found, fastest=None)

# SPDX-License-Identifier: Apache-2.0
"""Stage: fastvit at the shapes of the stage peers, in turns with the fastest of those."""

from __future__ import annotations

from typing import Any

import torch

from fastvit.testing import Agreement
from gpu import ceilings, contests
from gpu.contests import MODES, SDPA, Problem, judge, our_layer, timm_layer
from gpu.device import Device
from gpu.record import Record, read_all
from gpu.shapes import Shape
from gpu.timing import compete, host_seconds


def run(device: Device, record: Record) -> None:
    rates = ceilings.read(record)
    fastest = _fastest(record)
    for shape in device.plan.shapes:
        if record.left() < 0:
            record.miss(shape.name)
            continue
        problem = Problem(device, shape)
        _core(device, record, rates, problem, fastest)
        if shape.grid is not None:
            _layer(device, record, rates, problem)
        device.release()


def _fastest(record: Record) -> dict[tuple[str, str], str]:
    """The backend of PyTorch's attention that peers found the fastest, by shape and mode."""
    cases = read_all(record.folder).get("peers", {}).get("cases", [])
    return {
        (Shape(**c["shape"]).name, c["mode"]): c["fastest"]
        for c in cases
        if c["what"] == "core" and c["fastest"]
    }


def _core(
    device: Device, record: Record, rates: dict | None, problem: Problem,
    fastest: dict[tuple[str, str], str],
) -> None:  # fmt: skip
    shape = problem.shape
    check = contests.check_core(problem, _core_function(problem), "fastvit")
    if not _passed(record, shape, check):
        return
    for mode, backward in MODES.items():
        known = fastest.get((shape.name, mode))
        peers = [known] if known else SDPA
        makers = {"fastvit": problem.ours(backward)}
        makers |= {name: problem.sdpa(name, backward) for name in peers}
        found = judge(record, rates, shape, "core", mode, compete(device, makers))
        _add(record, shape, "core", mode, found, check=check._asdict(),
             host=host_seconds(device, problem.ours(backward)()[0]))  # fmt: skip


def _core_function(problem: Problem) -> Any:
    """The same call as timed, on fewer images."""
    shape = problem.shape
    if shape.grid is None:
        return lambda *qkv: contests.attention(*qkv, backend="triton")
    return lambda *qkv: contests.gpsa_attention(
        *qkv, *problem.position, shape.grid, backend="triton"
    )


def _layer(device: Device, record: Record, rates: dict | None, problem: Problem) -> None:
    shape = problem.shape
    theirs = timm_layer(device, shape)
    ours = our_layer(theirs)
    check = contests.check_layer(problem, theirs, ours)
    if not _passed(record, shape, check):
        return
    for mode, backward in MODES.items():
        makers = {
            "fastvit": problem.layer(ours, backward),
            "timm eager": problem.layer(theirs, backward),
        }
        found = judge(record, rates, shape, "module", mode, compete(device, makers))
        _add(record, shape, "module", mode, found, check=check._asdict(),
             host=host_seconds(device, problem.layer(ours, backward)()[0]))  # fmt: skip
    x = problem.tokens[0][0].detach().requires_grad_()
    memory = {}
    for name, layer in (("fastvit", ours), ("timm eager", theirs)):
        try:
            memory[name] = device.memory(
                lambda layer=layer: layer(x), [x, *layer.parameters()], torch.ones_like(x)
            )
        except torch.OutOfMemoryError as error:
            memory[name] = {"error": str(error).splitlines()[0]}
    record.add(shape=shape._asdict(), what="memory", mode="forward+backward", memory=memory)


def _passed(record: Record, shape: Shape, check: Agreement) -> bool:
    if not check.ok:
        record.fail(f"{shape.name}, not timed: {check}")
    return check.ok


def _add(
    record: Record, shape: Shape, what: str, mode: str, found: dict[str, dict[str, Any]],
    **more: Any,
) -> None:  # fmt: skip
    record.add(shape=shape._asdict(), what=what, mode=mode, contenders=found, **more)
    if "error" in found["fastvit"]:
        record.fail(f"{shape.name} {what} {mode}: {found['fastvit']['error']}")

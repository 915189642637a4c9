# SPDX-License-Identifier: Apache-2.0
"""Stage: fastvit's attention in turns with PyTorch's and with timm's layer, all of them eager."""

from __future__ import annotations

import torch

from gpu import ceilings
from gpu.attention import Problem
from gpu.attention_contests import contest
from gpu.attention_names import SDPA
from gpu.attention_peers import our_layer
from gpu.contests import MODES
from gpu.device import Device, tf32
from gpu.record import Record


def run(device: Device, record: Record) -> None:
    rates = ceilings.read(record)
    for shape, dtype in device.plan.timed:
        if record.left() < 0:
            record.miss(f"{shape.name} {dtype}")
            continue
        with tf32(dtype == "tf32"):
            problem = Problem(device, shape, dtype)
            for mode in MODES:
                contenders = {"fastvit": problem.ours()}
                contenders |= {name: problem.sdpa(name) for name in SDPA}
                contest(device, record, rates, problem, "core", mode, contenders)
            if shape.grid is not None:
                _layer(device, record, rates, problem)
        device.release()


def _layer(device: Device, record: Record, rates: dict | None, problem: Problem) -> None:
    theirs = problem.timm
    ours = our_layer(theirs)
    for mode in MODES:
        contenders = {
            "fastvit": problem.layer(ours, ours=True),
            "timm eager": problem.layer(theirs),
        }
        contest(device, record, rates, problem, "module", mode, contenders)
    x = problem.tokens[0][0].detach().requires_grad_()
    memory = {}
    for name, layer in (("fastvit", ours), ("timm eager", theirs)):
        try:
            memory[name] = device.memory(
                lambda layer=layer: layer(x), [x, *layer.parameters()], torch.ones_like(x)
            )
        except torch.OutOfMemoryError as error:
            memory[name] = {"error": str(error).splitlines()[0]}
    record.add(
        shape=problem.shape._asdict(), dtype=problem.dtype, what="memory", mode="forward+backward",
        memory=memory,
    )  # fmt: skip

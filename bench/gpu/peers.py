# SPDX-License-Identifier: Apache-2.0
"""Stage: fastvit's attention in turns with what torch.compile makes: FlexAttention alone and with
the position pass, timm's layer, and our own layer in one graph.
"""

from __future__ import annotations

import torch

from gpu import ceilings
from gpu.attention import Contender, Problem
from gpu.attention_contests import contest
from gpu.attention_names import SDPA
from gpu.attention_peers import our_layer
from gpu.contests import MODES
from gpu.device import Device
from gpu.origin import trusted
from gpu.record import Record
from gpu.shapes import Shape

_DTYPE = "bfloat16"
#: Its own CUDA graphs would be captured once more by ours.
AUTOTUNE = "max-autotune-no-cudagraphs"
# Seconds that have to be left for the compilations of a contest to be begun.
_COMPILATION = {"core": 12.0, "module": 12.0, AUTOTUNE: 30.0}


def run(device: Device, record: Record) -> None:
    # Every shape is a compilation of its own.
    torch._dynamo.config.recompile_limit = 256
    rates = ceilings.read(record)
    known = _known(record)
    first, *others = device.plan.compiled
    order = [(first, what, mode) for mode in MODES for what in ("module", "core")]
    order += [(shape, AUTOTUNE, mode) for shape in device.plan.autotuned for mode in MODES]
    order += [(s, what, mode) for s in others for what in ("module", "core") for mode in MODES]
    for shape, what, mode in order:
        if record.left() < _COMPILATION[what]:
            record.miss(f"{shape.name} {what} {mode}")
            continue
        # Else an earlier compilation in another mode could serve.
        torch._dynamo.reset()
        problem = Problem(device, shape, _DTYPE)
        if what == "core":
            contenders = _core(problem, known.get((shape.name, "core", mode)))
        else:
            contenders = _module(problem, AUTOTUNE if what == AUTOTUNE else None)
        what = "core" if what == "core" else "module"
        if "fastvit" in known.get((shape.name, what, mode), {}).get("failed", ()):
            # It may have taken the device along; the others are still wanted.
            contenders = {n: c for n, c in contenders.items() if not c.ours}
        contest(device, record, rates, problem, what, mode, contenders)
        device.release()


def _known(record: Record) -> dict[tuple[str, str, str], dict]:
    """What the stage kernels found in this run, by shape, what and mode: the fastest backend of
    PyTorch's attention, and who failed.
    """
    cases = (trusted(record, "kernels") or {}).get("cases", [])
    return {
        (Shape(**case["shape"]).name, case["what"], case["mode"]): {
            "fastest": case.get("fastest"),
            "failed": [n for n, times in case["contenders"].items() if "error" in times],
        }
        for case in cases
        if case["dtype"] == _DTYPE and "contenders" in case
    }


def _core(problem: Problem, known: dict | None) -> dict[str, Contender]:
    plain = [known["fastest"]] if known and known["fastest"] else SDPA
    contenders = {"fastvit": problem.ours(), "flex": problem.flex()}
    if problem.shape.grid is not None:
        contenders["flex + position"] = problem.flex_with_positions()
    return {**contenders, **{name: problem.sdpa(name) for name in plain}}


def _module(problem: Problem, tuning: str | None) -> dict[str, Contender]:
    device, theirs = problem.device, problem.timm
    ours = our_layer(theirs)
    contenders = {"fastvit": problem.layer(ours, ours=True), "timm eager": problem.layer(theirs)}
    if tuning:
        tuned = device.compile(theirs, dynamic=False, mode=tuning)
        return {**contenders, "timm max-autotune": problem.layer(tuned, compiled=True)}
    whole = device.compile(ours, dynamic=False, fullgraph=True)
    plain = device.compile(theirs, dynamic=False)
    return {
        **contenders,
        "fastvit compiled": problem.layer(whole, ours=True, compiled=True),
        "timm compiled": problem.layer(plain, compiled=True),
    }

# SPDX-License-Identifier: Apache-2.0
"""Stage: where cuDNN or the torch backend does the stem faster than our kernels.

Whole calls are timed in turns, with one convolution after the other given to cuDNN, so that what
an exchange costs its neighbours is in the time. The run's ``stem_choices.json`` has what was faster
beyond the spread; copied into ``fastvit/`` it is what the dispatcher goes by, and
``python -m gpu.stem_choices FOLDER [FOLDER ...]`` merges those of several cards for that.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu.device import Call, Device, tf32
from gpu.record import Record
from gpu.shapes import Stem
from gpu.stem_layers import plain_layer, stem_images
from gpu.timing import compete

FILE = "stem_choices.json"
KERNELS, TORCH = "kernels", "torch"
ARITHMETICS = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
MODES = ("infer", "train", "backward")


def run(device: Device, record: Record) -> None:
    for arithmetic in ARITHMETICS:
        for problem in device.plan.stems:
            for mode in MODES:
                if record.left() < 0:
                    record.miss(f"{problem.name} {arithmetic} {mode}")
                    continue
                with tf32(arithmetic == "tf32"):
                    record.add(**_contest(device, problem, arithmetic, mode))
                device.release()
    path = record.folder / FILE
    path.write_text(json.dumps(table(record.data), indent=1) + "\n", "utf-8")


def table(stage: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The table of ``fastvit.ops.stem_choices`` that a stage's results make."""
    faster: dict[str, dict[str, bool]] = {"cudnn": {}, "torch": {}}
    for case in stage["cases"]:
        ours = case["contenders"][KERNELS]
        for name, times in case["contenders"].items():
            if name == KERNELS or "q80" not in times or "q20" not in ours:
                continue
            of, key = ("torch", case["call"]) if name == TORCH else ("cudnn", name)
            # Two stems may have a layer in common: in both.
            faster[of][key] = faster[of].get(key, True) and times["q80"] < ours["q20"]
    if not stage["cases"]:
        return {}
    machine = stage["machine"]
    measured = {
        "date": stage["date"],
        "gpu": machine.get("gpu") or "none",
        "torch": torch.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "dry": stage["dry"],
    }
    lists = {of: sorted(key for key, won in keys.items() if won) for of, keys in faster.items()}
    return {stage["cases"][0]["arch"]: {"measured": measured, **lists}}


def _contest(device: Device, stem: Stem, arithmetic: str, mode: str) -> dict[str, Any]:
    from fastvit.kernels import stem_configs

    from fastvit.ops import conv_stem_torch, conv_stem_triton, conv_stem_triton_backward
    from fastvit.ops import stem_choices as package

    dtype = ARITHMETICS[arithmetic]
    layer = plain_layer(device, stem, dtype)
    norms = [stage.bn for stage in layer.stages]
    stages = conv_stem_torch.Stages(
        [stage.conv.weight.detach() for stage in layer.stages],
        [bn.weight.detach() for bn in norms],
        [bn.bias.detach() for bn in norms],
        [bn.running_mean for bn in norms],
        [bn.running_var for bn in norms],
        stem.strides,
    )
    learned = [p.detach() for p in layer.projection.parameters()]
    keeps = mode != "infer"
    pixels = stem.B * 3 * stem.size[0] * stem.size[1] * dtype.itemsize
    sets = [stem_images(device, stem, dtype, seed=i) for i in range(device.copies(pixels))]
    problem = conv_stem_triton.problem(sets[0], learned[0], stages, keeps)
    call = package.call_key(
        arithmetic, mode, problem.widths, stem.strides, stem.B * stem.size[0] * stem.size[1]
    )
    contenders: dict[str, Callable[[Tensor], Any]] = {}
    if mode == "backward":
        kept = conv_stem_torch.forward(
            sets[0], *learned, None, None, stages, True, 1e-5, None, None, True
        )
        used = stages._replace(means=kept.means, variances=kept.variances)
        grad = torch.ones_like(kept.tokens)
        wanted = [False, True, True, False, False, *[True] * (3 * len(norms))]

        def back(op: Callable[..., Any], x: Tensor) -> Any:
            rest = (None, None, kept.raw, used, True, 1e-5, None, None, wanted)
            return op(grad, x, *learned, *rest)

        contenders[KERNELS] = partial(back, conv_stem_triton_backward.backward)
        contenders[TORCH] = partial(back, conv_stem_torch.backward)
    else:

        def forward(op: Callable[..., Any], x: Tensor) -> Any:
            return op(x, *learned, None, None, stages, keeps, 1e-5, None, None, keeps)

        kernels = stem_configs.forward(problem)
        plan = conv_stem_triton.Plan(problem.arch, arithmetic_of(arithmetic), kernels)
        plans = {KERNELS: plan}
        for place, key in package.exchangeable(kernels, problem, stem.strides).items():
            plans[key] = plan._replace(kernels=package.exchanged(kernels, [place]))
        for name, each in plans.items():
            contenders[name] = partial(forward, partial(conv_stem_triton.forward, each))
        contenders[TORCH] = partial(forward, conv_stem_torch.forward)
    torch.backends.cudnn.benchmark = True
    makers = {name: partial(_calls, timed, sets) for name, timed in contenders.items()}
    found = compete(device, makers)
    torch.backends.cudnn.benchmark = False
    return {
        "what": "choice",
        "shape": stem._asdict(),
        "arch": problem.arch,
        "call": call,
        "contenders": found,
    }


def arithmetic_of(arithmetic: str) -> str:
    """How a plan's kernels multiply float32."""
    return "tf32" if arithmetic == "tf32" else "ieee"


def _calls(timed: Callable[[Tensor], Any], sets: Sequence[Tensor]) -> list[Call]:
    def call(x: Tensor) -> Any:
        with torch.no_grad():
            return timed(x)

    return [partial(call, x) for x in sets]


def merged(folders: Iterable[Path]) -> dict[str, Any]:
    """The tables of runs, of which a later one replaces an earlier for its architecture."""
    found: dict[str, Any] = {}
    for folder in folders:
        found |= json.loads((folder / FILE).read_text("utf-8"))
    return found


if __name__ == "__main__":
    print(json.dumps(merged(map(Path, sys.argv[1:])), indent=1))

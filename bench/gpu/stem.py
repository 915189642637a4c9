# SPDX-License-Identifier: Apache-2.0
"""Stage: the convolutional stem: against float64, then in turns with other ways."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvit.testing import agreement
from gpu import ceilings, floors
from gpu.agreement import Task, compare_all
from gpu.contests import MODES, add_share
from gpu.device import Call, Device
from gpu.record import Record
from gpu.shapes import Stem
from gpu.stem_compare import cases
from gpu.stem_layers import ChannelsLast, our_layer, plain_layer, stem_images
from gpu.timing import calls, compete, first_line, host_seconds
from gpu.verify import write_verified

_DTYPE = torch.bfloat16
_AUTOTUNE = "max-autotune-no-cudagraphs"
# Seconds that have to be left for a compilation to be begun.
_COMPILATION = {None: 10.0, _AUTOTUNE: 30.0}


def run(device: Device, record: Record) -> None:
    torch._dynamo.config.recompile_limit = 256
    _agreement(device, record)
    rates = ceilings.read(record)
    # Compilation takes long: a part of the time is kept for it.
    reserve = 0.4 * record.left()
    for problem in device.plan.stems:
        for mode in MODES:
            if record.left() < reserve:
                record.miss(f"{problem.name} {mode}")
                continue
            contest = Contest(device, record, problem, mode)
            contest.run(rates, "eager", contest.eager())
            device.release()
    order = [(problem, None) for problem in device.plan.stems_compiled]
    order += [(problem, _AUTOTUNE) for problem in device.plan.stems_compiled[:1]]
    for problem, tuning in order:
        for mode in MODES:
            if record.left() < _COMPILATION[tuning]:
                record.miss(f"{problem.name} {mode}, compiled {tuning or ''}".strip())
                continue
            # Else an earlier compilation for another shape could serve.
            torch._dynamo.reset()
            contest = Contest(device, record, problem, mode)
            contest.run(rates, tuning or "compiled", contest.compiled(tuning))
            device.release()


def _agreement(device: Device, record: Record) -> None:
    # Kernels are checked anew: only a process that made a check has its verdict to report.
    cache = {"FASTVIT_CACHE": str(Path(os.environ["FASTVIT_CACHE"]) / "stem")}
    tasks = [
        Task(problem.name, ("gpu.stem_compare", str(i)), len(cases(device, i)), cache)
        for i, (problem, _) in enumerate(device.plan.stems_checked)
    ]
    verdicts = compare_all(device, record, tasks, keep=0.5 * record.left())
    # What disagrees at these sizes is not to be shipped as verified, whatever its own check says.
    if not record.data["problems"]:
        write_verified(record.folder, verdicts, add=True)


class Contest:
    """The contenders of one stem in one mode: in eval forward, in training with the backward."""

    def __init__(self, device: Device, record: Record, problem: Stem, mode: str) -> None:
        self.device, self.record, self.problem, self.mode = device, record, problem, mode
        self.plain = plain_layer(device, problem, _DTYPE).train(MODES[mode])
        self.ours = our_layer(self.plain, "triton")
        pixels = problem.B * 3 * problem.size[0] * problem.size[1]
        count = device.copies(pixels * _DTYPE.itemsize)
        self.sets = [[stem_images(device, problem, _DTYPE, seed=i)] for i in range(count)]

    def eager(self) -> dict[str, nn.Module]:
        return {
            "fastvit": self.ours,
            "eager": self.plain,
            "eager channels_last": ChannelsLast(self.plain),
        }

    def compiled(self, tuning: str | None) -> dict[str, nn.Module]:
        options: dict[str, Any] = {"dynamic": False, **({"mode": tuning} if tuning else {})}
        peer = self.device.compile(ChannelsLast(self.plain), **options)
        return {"fastvit": self.ours, "compiled channels_last": peer}

    def run(self, rates: dict | None, what: str, modules: dict[str, nn.Module]) -> None:
        refused = {"fastvit": self._refusal()}
        # The fastest of cuDNN's algorithms.
        torch.backends.cudnn.benchmark = True
        makers = {name: self._maker(module, refused.get(name)) for name, module in modules.items()}
        found = compete(self.device, makers)
        torch.backends.cudnn.benchmark = False
        backward = MODES[self.mode]
        work = floors.stem(self.problem, _DTYPE.itemsize, backward=backward)
        for name, times in found.items():
            label = f"{self.problem.name} {self.mode}, {name}"
            add_share(self.record, rates, work, "bfloat16", label, times)
        more: dict[str, Any] = {}
        if what == "eager" and "error" not in found["fastvit"]:
            more["host"] = host_seconds(self.device, self._calls(self.ours, 1)[0])
            if backward:
                more["memory"] = self._memory(modules)
        self.record.add(
            what=what, shape=self.problem._asdict(), mode=self.mode, contenders=found, **more
        )
        if "error" in found["fastvit"]:
            self.record.fail(f"{self.problem.name} {self.mode}: {found['fastvit']['error']}")

    def _memory(self, modules: dict[str, nn.Module]) -> dict[str, dict[str, Any]]:
        """What a training step keeps and needs at its peak."""
        found: dict[str, dict[str, Any]] = {}
        (x,) = self.sets[0]
        for name, module in modules.items():
            try:
                out = module(x)
                found[name] = self.device.memory(
                    lambda module=module: module(x),
                    list(module.parameters()),
                    torch.ones_like(out),
                )
            except torch.OutOfMemoryError as error:
                found[name] = {"error": str(error).splitlines()[0]}
        return found

    def _maker(self, module: nn.Module, refusal: str | None) -> Callable[[], Sequence[Call]]:
        def make() -> Sequence[Call]:
            if refusal:
                raise RuntimeError(f"not timed: {refusal}")
            return self._calls(module, len(self.sets))

        return make

    def _calls(self, module: nn.Module, count: int) -> list[Call]:
        parameters = list(module.parameters())
        return calls(
            module, self.sets[:count], backward=MODES[self.mode], parameters=parameters, frozen=True
        )

    def _refusal(self) -> str | None:
        """Why ours is not timed, if it computes something else or crashes."""
        x = self.sets[0][0][:2]
        try:
            with torch.no_grad():
                # Copies, whose statistics may change.
                theirs, ours = (copy.deepcopy(layer)(x) for layer in (self.plain, self.ours))
                expected = copy.deepcopy(self.plain).double()(x.double())
        # A finding about this contender; the others are still timed.
        except Exception as error:
            return first_line(error)
        check = agreement(ours, theirs, expected, name="fastvit", rms=True)
        return None if check.ok else str(check)

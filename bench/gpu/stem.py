# SPDX-License-Identifier: Apache-2.0
"""Stage: the convolutional stem: against float64, then in turns with other ways."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.testing import agreement
from gpu import ceilings, floors
from gpu.agreement import Task, compare_all
from gpu.contests import MODES, ROUNDED, WARM, judge
from gpu.device import Call, Device, tf32
from gpu.patch_compare import TF32, number
from gpu.record import Record
from gpu.shapes import Stem
from gpu.stem_compare import cases
from gpu.stem_layers import ChannelsLast, our_layer, plain_layer, stem_images
from gpu.stem_peers import Folded
from gpu.timing import calls, compete, first_line, host_seconds
from gpu.verify import write_verified

_COMPILED_IN = "bfloat16"
_AUTOTUNE = "max-autotune-no-cudagraphs"
# Seconds that have to be left for a compilation to be begun.
_COMPILATION = {None: 10.0, _AUTOTUNE: 30.0}


def run(device: Device, record: Record) -> None:
    torch._dynamo.config.recompile_limit = 256
    _agreement(device, record)
    rates = ceilings.read(record)
    # Compilation takes long: a part of the time is kept for it.
    reserve = 0.4 * record.left()
    for problem, dtype in device.plan.stems_timed:
        for mode in MODES:
            if record.left() < reserve:
                record.miss(f"{problem.name} {dtype} {mode}")
                continue
            contest = Contest(device, record, problem, dtype, mode)
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
            contest = Contest(device, record, problem, _COMPILED_IN, mode)
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

    def __init__(
        self, device: Device, record: Record, problem: Stem, dtype: str, mode: str
    ) -> None:
        self.device, self.record, self.problem = device, record, problem
        self.dtype, self.mode = dtype, mode
        self.number = number(dtype)
        self.plain = plain_layer(device, problem, self.number).train(MODES[mode])
        self.ours = our_layer(self.plain, "triton")
        height, width = problem.size
        pixels = problem.B * 3 * height * width
        shrunk = math.prod(problem.strides) ** 2
        tokens = problem.B * height * width * problem.D // shrunk
        count = device.copies((pixels + tokens) * self.number.itemsize)
        self.sets = [[stem_images(device, problem, self.number, seed=i)] for i in range(count)]

    def eager(self) -> dict[str, nn.Module]:
        found = {
            "fastvit": self.ours,
            "eager": self.plain,
            "eager channels_last": ChannelsLast(self.plain),
        }
        if not MODES[self.mode]:
            found["cuDNN conv-bias-relu"] = Folded(self.device, self.plain)
        return found

    def compiled(self, tuning: str | None) -> dict[str, nn.Module]:
        options: dict[str, Any] = {"dynamic": False, **({"mode": tuning} if tuning else {})}
        peer = self.device.compile(ChannelsLast(self.plain), **options)
        return {"fastvit": self.ours, "compiled channels_last": peer}

    def run(self, rates: dict | None, what: str, modules: dict[str, nn.Module]) -> None:
        with tf32(self.dtype == "tf32"):
            self._run(rates, what, modules)

    def _run(self, rates: dict | None, what: str, modules: dict[str, nn.Module]) -> None:
        refused = {name: self._refusal(name, module) for name, module in modules.items()}
        # The fastest of cuDNN's algorithms.
        torch.backends.cudnn.benchmark = True
        makers = {name: self._maker(module, refused[name]) for name, module in modules.items()}
        warm = what == "eager" and self.problem.B <= WARM
        found = compete(self.device, makers, warm=warm)
        torch.backends.cudnn.benchmark = False
        backward = MODES[self.mode]
        work = floors.stem(self.problem, self.number.itemsize, backward=backward)
        label = f"{self.problem.name} {self.dtype} {self.mode}"
        judge(self.record, rates, work, self.dtype, label, found)
        more: dict[str, Any] = {}
        if what == "eager" and "error" not in found["fastvit"]:
            more["host"] = host_seconds(self.device, self._calls(self.ours, 1)[0])
            if backward:
                more["memory"] = self._memory(modules)
        self.record.add(
            what=what, shape=self.problem._asdict(), dtype=self.dtype, mode=self.mode,
            contenders=found, **more,
        )  # fmt: skip
        if "error" in found["fastvit"]:
            self.record.fail(f"{label}: {found['fastvit']['error']}")

    def _memory(self, modules: dict[str, nn.Module]) -> dict[str, dict[str, Any]]:
        """What a training step keeps and needs at its peak."""
        found: dict[str, dict[str, Any]] = {}
        for name, module in modules.items():
            x = _laid_out(module, self.sets[0][0])
            try:
                out = module(x)
                found[name] = self.device.memory(
                    lambda module=module, x=x: module(x),
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
        sets = [[_laid_out(module, x)] for (x,) in self.sets[:count]]
        return calls(module, sets, backward=MODES[self.mode], parameters=parameters, frozen=True)

    def _refusal(self, name: str, module: nn.Module) -> str | None:
        """Why a contender is not timed, if it computes something else or crashes."""
        # In eval the call that is timed; in training images depend on each other, and float64 takes
        # long: two of them, eager.
        whole = not MODES[self.mode]
        x = self.sets[0][0]
        few = x[[0, -1]]
        try:
            with torch.no_grad():
                # Copies, whose statistics may change.
                expected = copy.deepcopy(self.plain).double()(few.double())
                theirs = copy.deepcopy(self.plain)(few)
                if whole:
                    actual = module(_laid_out(module, x))[[0, -1]]
                else:
                    actual = copy.deepcopy(getattr(module, "_orig_mod", module))(few)
        # A finding about this contender; the others are still timed.
        except Exception as error:
            return first_line(error)
        floor = TF32 if self.dtype == "tf32" else 0.0
        if name != "fastvit":
            floor = max(floor, ROUNDED[self.dtype])
        check = agreement(actual, theirs, expected, name=name, rms=True, floor=floor)
        return None if check.ok else str(check)


def _laid_out(module: nn.Module, x: Tensor) -> Tensor:
    """Images as a contender takes them, which costs it no time; ours are always planar."""
    if getattr(module, "channels_last", False):
        return x.contiguous(memory_format=torch.channels_last)
    return x

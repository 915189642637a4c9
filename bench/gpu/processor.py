# SPDX-License-Identifier: Apache-2.0
"""The twin of a GPU on a processor, for dry runs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.calls import Call, Sample, keeping
from gpu.dry_plan import DRY


class Processor:
    """The same calls without a GPU: its times mean nothing, that they come back does."""

    note = "dry run on a processor: not a measurement"
    plan = DRY
    workers = 1
    device = torch.device("cpu")
    # Optimised code would take twice as long to make.
    build_environment: dict[str, str] = {  # noqa: RUF012
        "FASTVIT_CUDA": "0",
        "CMAKE_ARGS": "-DCMAKE_BUILD_TYPE=Debug",
    }
    cmake_options = ("-DCMAKE_BUILD_TYPE=Debug",)

    def others(self) -> list[torch.device]:
        return []

    def synchronize(self) -> None:
        pass

    def answers(self) -> bool:
        return True

    def state(self) -> dict[str, str]:
        return {}

    def copies(self, size: int) -> int:
        return 2

    def fits(self, size: int) -> bool:
        return size < 2**28

    def release(self) -> None:
        gc.collect()

    def stream(self) -> Any:
        return nullcontext()

    def capture(self, call: Call) -> tuple[Call, Any]:
        out = call()

        def replay() -> None:
            for old, new in zip(_flat(out), _flat(call()), strict=True):
                old.data.copy_(new)

        return replay, out

    def clocks(self) -> dict[str, float]:
        return {}

    def sampler(self, calls: Sequence[Call], *, graphs: bool) -> tuple[Sample, str]:
        calls[0]()
        return self._sampler(keeping(calls), len(calls))

    def warm_sampler(self, call: Call, *, graphs: bool) -> tuple[Sample, str]:
        return self._sampler(call, 1)

    def _sampler(self, work: Call, count: int) -> tuple[Sample, str]:
        def sample() -> float:
            start = time.perf_counter()
            work()
            return (time.perf_counter() - start) / count

        return sample, "perf_counter"

    def memory(
        self, forward: Callable[[], Tensor], leaves: Sequence[Tensor], cotangent: Tensor
    ) -> dict[str, int]:
        torch.autograd.grad(forward(), leaves, cotangent, allow_unused=True)
        return {}

    def compile(self, target: Any, **options: Any) -> Any:
        options.pop("mode", None)
        # Traced as on a GPU; code for this processor would prove nothing.
        return torch.compile(target, **options, backend="aot_eager")

    def convolution_relu(
        self, x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int]
    ) -> Tensor:
        return F.relu(F.conv2d(x, weight, bias, stride, 1))

    def kernels(self, call: Call) -> list[str]:
        call()
        return []

    def sanitizer(self, tool: str) -> list[str] | str:
        return "dry run"


def _flat(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [x for part in out for x in _flat(part)]

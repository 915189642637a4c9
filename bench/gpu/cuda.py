# SPDX-License-Identifier: Apache-2.0
"""The GPU as the stages see it."""

from __future__ import annotations

import gc
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from gpu.calls import REPEATS, Call, Sample, keeping, repeating
from gpu.clocks import Clocks
from gpu.full_plan import FULL

#: Calls shorter than this are timed as replays of a graph: launches would hide them.
_SMALL = 2e-3
#: A sample lasts at least this long: events resolve about a microsecond.
_SAMPLE = 5e-4
#: At most. The smallest set is of 0.15 MB, one image of ConViT-tiny, and twice a cache 250 MB.
_SETS = 1024
_QUERIES = (
    "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw", "power.limit",
    "utilization.gpu", "memory.used",
)  # fmt: skip


class GPU:
    """The first CUDA device."""

    note = ""
    plan = FULL
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        torch.cuda.set_device(self.device)
        self.properties = torch.cuda.get_device_properties(self.device)
        self._clocks: Clocks | None = None

    @property
    def build_environment(self) -> dict[str, str]:
        major, minor = self.properties.major, self.properties.minor
        # The letter gives access to instructions of this one architecture.
        return {"FASTVIT_CUDA_ARCHS": f"{major}{minor}{'a' if major in (9, 10) else ''}"}

    @property
    def cmake_options(self) -> list[str]:
        """The same for CMake without setup.py."""
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        archs = self.build_environment["FASTVIT_CUDA_ARCHS"]
        options = {"FASTVIT_CUDA": "ON", "FASTVIT_CUDA_ARCHS": archs, "CMAKE_CUDA_COMPILER": nvcc}
        return [f"-D{name}={value}" for name, value in options.items()]

    def others(self) -> list[torch.device]:
        return [torch.device("cuda", i) for i in range(1, torch.cuda.device_count())]

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def answers(self) -> bool:
        """Whether this process can still use the device: a bad access ends that."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def state(self) -> dict[str, str]:
        """Clocks, temperature and power at this moment."""
        command = ["nvidia-smi", "--id=0", "--format=csv,noheader"]
        try:
            done = subprocess.run(
                [*command, f"--query-gpu={','.join(_QUERIES)}"],
                capture_output=True, text=True, timeout=20, check=True,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            return {"unknown": str(error)}
        return dict(zip(_QUERIES, done.stdout.strip().split(", "), strict=False))

    def copies(self, size: int) -> int:
        """How many sets of ``size`` bytes, inputs and results together, keep the L2 cache from
        serving the next call: twice what it holds.
        """
        return max(2, min(_SETS, 1 + math.ceil(2 * self.properties.L2_cache_size / max(size, 1))))

    def fits(self, size: int) -> bool:
        return size < 0.8 * torch.cuda.mem_get_info()[0]

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def stream(self) -> Any:
        """Work on a stream that waits for the current one and is waited for."""
        return _side_stream()

    def capture(self, call: Call) -> tuple[Call, Any]:
        """A graph's replay, and the memory that it fills."""
        with self.stream():
            for _ in range(2):
                call()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                out = call()
        except Exception:
            _leave_capture(stream)
            raise
        return graph.replay, out

    def clocks(self) -> dict[str, float]:
        """Clocks, temperature and power, fast enough to be asked around every contest; nothing
        where the driver's library is not there, which :meth:`state` does without.
        """
        try:
            if self._clocks is None:
                self._clocks = Clocks(str(self.properties.uuid))
            return self._clocks.read()
        # Times stand without them.
        except Exception:
            return {}

    def sampler(self, calls: Sequence[Call], *, graphs: bool) -> tuple[Sample, str]:
        """What times one pass over ``calls``, after warming up, and in a word how.

        Args:
            calls: one for each set of inputs.
            graphs: whether short calls may be replayed from a graph.
        """
        # As a capture wants it; elsewhere it would fill a second pool of memory.
        with self.stream() if graphs else nullcontext():
            for call in (calls[0], *calls):
                call()
        return self._sampler(keeping(calls), len(calls), graphs=graphs)

    def warm_sampler(self, call: Call, *, graphs: bool) -> tuple[Sample, str]:
        """The same for one call again and again, whose data lie in the L2 cache if they fit."""
        work = repeating(call)
        with self.stream() if graphs else nullcontext():
            work()
        sample, how = self._sampler(work, REPEATS, graphs=graphs)

        def warmed() -> float:
            # Brings the data, which another contender's calls have driven out.
            call()
            return sample()

        return warmed, how

    def _sampler(self, work: Call, count: int, *, graphs: bool) -> tuple[Sample, str]:
        single = self._elapsed(work) / count
        if single > _SMALL or not graphs:
            return lambda: self._elapsed(work) / count, "events"
        passes = max(1, math.ceil(_SAMPLE / (single * count)))
        try:
            replay, kept = self.capture(work)
        # Not everything can be captured; how it was timed is recorded.
        except Exception as error:
            torch.cuda.synchronize()
            reason = f"events, since no graph took it: {type(error).__name__}"
            return lambda: self._elapsed(work) / count, reason

        def sample() -> float:
            assert kept is not None  # the graph writes into what it holds
            return self._elapsed(lambda: [replay() for _ in range(passes)]) / passes / count

        return sample, "graph"

    def memory(
        self, forward: Callable[[], Tensor], leaves: Sequence[Tensor], cotangent: Tensor
    ) -> dict[str, int]:
        """Bytes of a training step beyond what was there: kept for the backward, and at most."""
        self.release()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = forward()
        kept = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
        torch.autograd.grad(out, leaves, cotangent, allow_unused=True)
        torch.cuda.synchronize()
        return {"kept": kept, "peak": torch.cuda.max_memory_allocated() - before}

    def compile(self, target: Any, **options: Any) -> Any:
        return torch.compile(target, **options)

    def convolution_relu(
        self, x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int]
    ) -> Tensor:
        """A 3 x 3 convolution with bias and ReLU in one call of cuDNN."""
        return torch.cudnn_convolution_relu(x, weight, bias, stride, (1, 1), (1, 1), 1)

    def kernels(self, call: Call) -> list[str]:
        """Names of the kernels that a call launches."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as found:
            call()
            torch.cuda.synchronize()
        return [event.key for event in found.key_averages()]

    def sanitizer(self, tool: str) -> list[str] | str:
        """How a command begins that a tool of compute-sanitizer watches, or why none does."""
        found = shutil.which("compute-sanitizer") or shutil.which(
            "compute-sanitizer", path="/usr/local/cuda/bin"
        )
        if found is None:
            return "compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin"
        return [
            found,
            "--tool",
            tool,
            "--error-exitcode",
            "99",
            "--target-processes",
            "application-only",
        ]

    def _elapsed(self, work: Call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def _leave_capture(stream: torch.cuda.Stream) -> None:
    """What a capture that failed leaves undone: PyTorch stays on the capture's stream, and its
    generator in the state of a capture, in which every later random number is an error.
    """
    torch.cuda.set_stream(stream)
    # The error of the capture is the one to report.
    with suppress(RuntimeError):
        torch.cuda.synchronize()
        # The end of a capture that succeeds puts the generator back.
        x = torch.zeros(1, device="cuda")
        x.add_(1.0)  # loaded before the capture
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.add_(1.0)


@contextmanager
def _side_stream() -> Iterator[None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()

# SPDX-License-Identifier: Apache-2.0
"""One row, from construction to figures: count, compare, then time."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastvit.benchmark.agreement import confirm
from fastvit.benchmark.counter import count
from fastvit.benchmark.result import Result
from fastvit.benchmark.rows import Row
from fastvit.benchmark.steps import Bench, make_optimizer, synthetic_batch
from fastvit.benchmark.weights import fastvit_model, library_model

#: ``repeat(target, setup, rounds)`` calls ``setup()`` and then ``target()``, ``rounds`` times.
Repeat = Callable[[Callable[[], None], Callable[[], None] | None, int], object]

# On a CPU a step at batch 1 saturates the cores from here on, and takes seconds.
_LARGE_FLOPS = 15e9

# The gate compares at most this many images: enough for sums over images to count.
_COMPARED_IMAGES = 2

# Batches on which a tensor must disagree before its row fails.
_ATTEMPTS = 3


@dataclass(frozen=True)
class Settings:
    """How rows are measured.

    ``batch`` None: on a GPU the paper's batch per GPU, halved until it fits; on a CPU 1 for
    models from 15 GF up, 2 below. ``steps`` None: 3 on a CPU, 20 on a GPU, fewer where they would
    take longer than ``seconds`` (per row, training and inference each), but at least one; a
    number is taken literally. ``timed`` False is the smoke test: one step of each kind.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    batch: int | None = None
    steps: int | None = None
    seconds: float = 20.0
    timed: bool = True

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def batch_for(self, row: Row) -> int:
        """Images per step to start with."""
        if self.batch is not None:
            return self.batch
        if self.on_cpu:
            return 1 if row.verified.flops >= _LARGE_FLOPS else 2
        return row.batch_per_gpu

    def steps_within(self, step_seconds: float) -> int:
        """Steps to time when one (of both models) takes ``step_seconds``."""
        if not self.timed:
            return 1
        if self.steps is not None:
            return self.steps
        wanted = 3 if self.on_cpu else 20
        return max(1, min(wanted, int(self.seconds / max(step_seconds, 1e-9))))


def repeat_plainly(
    target: Callable[[], None], setup: Callable[[], None] | None, rounds: int
) -> None:
    """The ``repeat`` of a run without pytest-benchmark."""
    for _ in range(rounds):
        if setup is not None:
            setup()
        target()


def measure_row(
    row: Row,
    settings: Settings,
    *,
    repeat: Repeat = repeat_plainly,
    progress: Callable[[str], None] = lambda text: None,
) -> Result:
    """Build both models of ``row``, count them, compare them and time them in turns.

    A row without a fastvit model is counted and timed alone. Nothing is timed if the counts or
    the numbers disagree. Both models are freed on return, whatever happened.

    Args:
        repeat: runs the timed training rounds: the library's step is the set-up of a round,
            fastvit's its target, so that both meet the same state of the machine.
        progress: is told in a few words what comes next.

    Returns:
        The result; an exception becomes its ``status`` "error", so that one row cannot take
        the figures of the others along. ``KeyboardInterrupt`` goes through.
    """
    result = Result(row, settings.batch_for(row), settings.dtype_name)
    try:
        _measure(result, settings, repeat, progress)
    except Exception as error:
        result.status = "error"
        result.reason = f"{type(error).__name__}: {error}".strip()
        # As text: the exception itself would keep the frames and with them both models.
        result.traceback = traceback.format_exc()
    finally:
        gc.collect()
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
    return result


def _measure(
    result: Result, settings: Settings, repeat: Repeat, progress: Callable[[str], None]
) -> None:
    row = result.row
    progress("building")
    library = library_model(row, device=settings.device, dtype=settings.dtype)
    models = [library]
    if row.fastvit is not None:
        models.append(fastvit_model(row, library))
    counts = [count(model, row.image_size) for model in models]
    result.counted = counts[0]
    for whose, counted in zip(("library", "fastvit"), counts, strict=False):
        if counted != row.verified:
            return result.fail(f"the {whose} model counts {counted}, expected {row.verified}")
    if row.fastvit is not None:
        progress("comparing")
        result.agreements = confirm(row, library, models[1], _batches(result, settings))
        wrong = [str(a) for a in result.agreements if not a.ok]
        if wrong:
            return result.fail("; ".join(wrong))
    progress("timing")
    _time(result, models, settings, repeat)


def _batches(result: Result, settings: Settings) -> Iterator[Tensor]:
    """Images for the gate, made as they are asked for."""
    size = min(result.batch, _COMPARED_IMAGES)
    for seed in range(_ATTEMPTS):
        images, _ = synthetic_batch(
            result.row, size, device=settings.device, dtype=settings.dtype, seed=seed
        )
        yield images


def _time(result: Result, models: list[nn.Module], settings: Settings, repeat: Repeat) -> None:
    """Warm up, then time training rounds through ``repeat``, then inference rounds."""
    row = result.row
    optimizers = [make_optimizer(row, model) for model in models]
    while True:
        images, labels = synthetic_batch(
            row, result.batch, device=settings.device, dtype=settings.dtype
        )
        benches = [Bench(m, o, images, labels) for m, o in zip(models, optimizers, strict=True)]
        try:
            training = _warm_up(benches, settings, Bench.train_step)
            inference = _warm_up(benches, settings, Bench.inference_step)
            break
        except torch.OutOfMemoryError:
            if settings.batch is not None or result.batch == 1:
                raise
        # Outside the handler, where the exception no longer holds the activations.
        for bench in benches:
            bench.forget()
        del images, labels, benches, bench
        gc.collect()
        torch.cuda.empty_cache()
        result.batch //= 2
    for bench in benches:
        bench.forget()
    result.reference = benches[0].samples
    target, setup = benches[-1].train_step, None
    if len(benches) == 2:
        setup = benches[0].train_step
        result.fastvit = benches[1].samples
    repeat(target, setup, settings.steps_within(training))
    for _ in range(settings.steps_within(inference)):
        for bench in benches:
            bench.inference_step()


def _warm_up(benches: list[Bench], settings: Settings, step: Callable[[Bench], None]) -> float:
    """Run what is not to be measured; return the seconds of the last step of all models."""
    rounds = 3 if settings.timed and not settings.on_cpu else 1 if settings.timed else 0
    seconds = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        for bench in benches:
            step(bench)
        seconds = time.perf_counter() - start
    return seconds

# SPDX-License-Identifier: Apache-2.0
"""Compiles candidates ahead of time, in processes of their own, while others are measured.

What they compile lies in Triton's cache, from which the measuring process takes it. This module
imports neither Triton nor torch: a process decides whether it interprets when it imports Triton.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from fastvit.kernels.ahead import model
from fastvit.kernels.ahead.posed import case_of
from fastvit.kernels.tuned import Kernels, Posed

#: Seconds that a verdict is waited for at least, if there are as many.
_PATIENCE = 10.0


class Verdict(NamedTuple):
    """What is known of a kernel's configuration without a GPU."""

    #: Why it is not tried, in words, or empty.
    reason: str
    #: Microseconds, predicted, not measured.
    predicted: float = 0.0


class Job(NamedTuple):
    """A kernel of a problem with the configuration that it has among others."""

    arch: str
    capability: int
    problem: Posed
    precision: str
    kernels: Kernels
    name: str


#: Compiles one job.
Compile = Callable[[Job], Verdict]


def judged(arch: str, arithmetic: str, taken: dict[str, Any] | str, launch: Any) -> Verdict:
    """What the compiler made of a launch, as ``kernels/ahead/compiler.py`` tells it."""
    if isinstance(taken, str):
        return Verdict(f"does not compile: {taken}")
    if taken["stack"] or taken["spills"]:
        return Verdict(f"spills: {taken['stack']} bytes, {taken['spills']} instructions")
    limit = model.LIMITS[arch].shared_block * 1024
    if taken["shared"] > limit:
        return Verdict(f"{taken['shared']} bytes of shared memory, a block may have {limit}")
    blocks = model.blocks_per_multiprocessor(
        arch, taken["registers"], taken["shared"], launch.arguments["num_warps"],
        taken["tensor_columns"],
    )  # fmt: skip
    if blocks == 0:
        return Verdict("more registers than a multiprocessor has")
    done = model.work(launch.kernel, launch.arguments)
    predicted = model.predict(arch, arithmetic, taken["instruction"], blocks, done)
    return Verdict("", max(predicted, _busy(arch, launch.grid, blocks) * predicted))


def _busy(arch: str, grid: tuple[int, ...], blocks: int) -> float:
    """By how much the last wave of blocks, not full, lengthens a launch."""
    programs = 1
    for side in grid:
        programs *= side
    places = blocks * model.LIMITS[arch].multiprocessors
    return -(-programs // places) * places / max(1, programs)


#: Cards of an architecture may be more than twice as fast as that of the model, and what kernels of
#: a call hand to each other, counted with each, may stay in the L2 cache.
_FASTER = 3.0


def floor(arch: str, arithmetic: str, launches: Iterator[Any] | list[Any]) -> float:
    """Microseconds below which no launch can come: a third of what bytes, products or exponentials
    alone take at the model's rates of the fastest instructions. Predicted, not measured.
    """
    taken = sum(
        model.predict(arch, arithmetic, "", 2, model.work(launch.kernel, launch.arguments))
        for launch in launches
    )
    return taken / _FASTER


#: In the processes that compile: the number of the problem whose turn it is.
_turn: Any = None


def compile_job(job: Job, number: int) -> Verdict:
    """In a process whose Triton compiles."""
    if number < _turn.value:
        return Verdict("the turn of its problem is over")
    from fastvit.kernels.ahead.compiler import Pair, attempt

    case = case_of(job.problem, job.kernels, job.precision)
    pair = Pair(job.arch, case, job.name, job.capability)
    _, taken = attempt(pair)
    return judged(job.arch, job.problem.arithmetic, taken, pair.launch)


def _begin(turn: Any) -> None:
    """In a new process, before it imports Triton."""
    global _turn
    _turn = turn
    os.environ.pop("TRITON_INTERPRET", None)
    # Ctrl-C is for the process that measures; it ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # If it cannot be, each verdict says so.
    with contextlib.suppress(ImportError):
        from fastvit.kernels.ahead import compiler  # noqa: F401


def _nothing() -> None:
    pass


class Ahead:
    """Verdicts on jobs, in the order of their being asked for.

    Args:
        workers: processes.
    """

    def __init__(self, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._turn = context.Value("i", 0)
        self._pool = context.Pool(workers, _begin, (self._turn,))
        self._found: dict[Job, Any] = {}
        #: In the order in which they were asked for first.
        self._numbers: dict[Posed, int] = {}

    def wait(self, seconds: float) -> None:
        """Until a process can compile, for so long at most."""
        with contextlib.suppress(multiprocessing.TimeoutError):
            self._pool.apply_async(_nothing).get(max(0.0, seconds))

    def ask(self, job: Job) -> None:
        """Let it be compiled, once."""
        if job not in self._found:
            number = self._numbers.setdefault(job.problem, len(self._numbers))
            self._found[job] = self._pool.apply_async(compile_job, (job, number))

    def over(self, problem: Posed) -> None:
        """Compile no more for it, nor for those that were asked for before it: others wait."""
        self._turn.value = max(self._turn.value, 1 + self._numbers.get(problem, -1))

    def verdict(self, job: Job, seconds: float) -> Verdict | None:
        """None if it is not there in time: ``seconds``, of which one compiler that hangs or was
        killed does not take all.
        """
        self.ask(job)
        try:
            patience = max(_PATIENCE, min(seconds / 4, 6 * _PATIENCE))
            return self._found[job].get(max(0.0, min(seconds, patience)))
        except multiprocessing.TimeoutError:
            return None
        # A compiler that dies is this configuration's fault, not the search's.
        except Exception as error:
            return Verdict(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """End the processes, whatever they do."""
        self._pool.terminate()
        self._pool.join()


@contextlib.contextmanager
def opened(workers: int) -> Iterator[Ahead]:
    ahead = Ahead(workers)
    try:
        yield ahead
    finally:
        ahead.close()


def clock(seconds: float) -> Callable[[], float]:
    """What tells the seconds that are left."""
    end = time.monotonic() + seconds
    return lambda: end - time.monotonic()

# SPDX-License-Identifier: Apache-2.0
"""Tunes one problem after the other within a budget, and keeps what was found after each."""

from __future__ import annotations

import datetime
import functools
import itertools
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastvit import _native
from fastvit._version import __version__
from fastvit.kernels import configs
from fastvit.kernels import tuned as tables
from fastvit.kernels.tuned import Kernels, Posed
from fastvit.ops.trust import _gpu_is_lost
from fastvit.ops.tuned import triton_version
from fastvit.tuning import device as devices
from fastvit.tuning.ahead import Ahead, Job, Verdict, clock, floor, opened
from fastvit.tuning.search import Floor, Outcome, asked, tune

#: Seconds that a problem may take beside its share of what is left.
_LEAST = 20.0
#: Seconds that the processes that compile may take to start.
_START = 60.0
#: Problems whose candidates are compiled before their turn.
_AHEAD = 4

Say = Callable[[str], None]


class Target(NamedTuple):
    """What is tuned for."""

    arch: str
    #: As 103 for 10.3.
    capability: int
    device: torch.device
    #: Of the inputs, as cases have it: "bfloat16", "float16", "tf32" or "ieee".
    precision: str

    @property
    def gpu(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "none"


def target(device: torch.device, precision: str) -> Target:
    """A device's; a processor interprets Hopper's configurations.

    Raises:
        ValueError: the kernels do not run on it.
    """
    if device.type != "cuda":
        return Target("sm_90", 90, device, precision)
    major, minor = torch.cuda.get_device_capability(device)
    arch = configs.architecture((major, minor))
    if arch is None:
        raise ValueError(
            f"the kernels need compute capability 8.0, {torch.cuda.get_device_name(device)} has "
            f"{major}.{minor}"
        )
    return Target(arch, 10 * major + minor, device, precision)


def workers() -> int:
    """Processes that compile: one a core, but for the one that measures."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


def run(
    problems: Sequence[Posed],
    target: Target,
    seconds: float,
    say: Say,
    *,
    processes: int,
    variants: int | None = None,
    late: Callable[[Posed], None] = lambda problem: None,
) -> Generator[Outcome, None, None]:
    """The outcomes, each as soon as it is there; ends with the time.

    Args:
        problems: the most valuable first.
        target: what is tuned for.
        seconds: in all.
        say: told what goes wrong.
        processes: that compile.
        variants: of a kernel that are tried at most, all by default.
        late: told of each problem that is not reached.
    """
    left = clock(seconds)
    waiting = iter(problems)
    with opened(processes) as ahead:
        # Or the first problem's share would go by while processes start.
        ahead.wait(min(_START, left()))
        for problem in itertools.islice(waiting, _AHEAD):
            _ask(problem, target, ahead, variants)
        for number, problem in enumerate(problems):
            if left() <= 0:
                late(problem)
                continue
            for later in itertools.islice(waiting, 1):
                _ask(later, target, ahead, variants)
            share = max(_LEAST, 2 * left() / (len(problems) - number))
            failed = False
            try:
                found = _tuned(problem, target, ahead, min(share, left()), variants)
            # Its fault, which is told; the others are still tuned, if the GPU is.
            except Exception as error:
                say(f"{problem.name}: {type(error).__name__}: {error}".splitlines()[0])
                failed = True
            finally:
                ahead.over(problem)
            if _gpu_is_lost():
                # Since when is not known: nor is whether what was not beaten would have been.
                say(f"{problem.name}: the GPU refuses all that follows in this process")
                return
            if target.device.type == "cuda":
                torch.cuda.empty_cache()
            if failed:
                continue
            if found is None:
                late(problem)
            else:
                yield found


def _ask(problem: Posed, target: Target, ahead: Ahead, variants: int | None) -> None:
    runner = devices.Problem(problem, target.precision, target.arch, target.device)
    for kernels, name in asked(problem, target.arch, _floor(runner, target), variants):
        ahead.ask(_job(problem, target, kernels, name))


def _floor(runner: devices.Problem, target: Target) -> Floor:
    """A processor interprets: no floor is a time of its."""
    if target.device.type != "cuda":
        return lambda kernels: 0.0
    arithmetic = runner.posed.arithmetic
    return functools.cache(lambda k: floor(target.arch, arithmetic, runner.launches(k)))


def _job(problem: Posed, target: Target, kernels: Kernels, name: str) -> Job:
    return Job(target.arch, target.capability, problem, target.precision, kernels, name)


def _tuned(
    problem: Posed, target: Target, ahead: Ahead, seconds: float, variants: int | None
) -> Outcome | None:
    arch, left = target.arch, clock(seconds)
    runner = devices.Problem(problem, target.precision, arch, target.device)

    def judge(kernels: Kernels, name: str) -> Verdict | None:
        return ahead.verdict(_job(problem, target, kernels, name), left())

    return tune(problem, arch, runner, judge, _floor(runner, target), left, variants)


class Prediction(NamedTuple):
    """Of a kernel of a problem, predicted, not measured."""

    problem: Posed
    name: str
    #: Microseconds of what is built in; None if it was not compiled in time or spills.
    built_in: float | None
    #: The best of what was compiled.
    best: float | None
    kernels: Kernels
    compiled: int
    #: Why others are not to be had, by what is said first of the reason, with their number.
    discarded: dict[str, int]


def predict(
    problems: Sequence[Posed],
    target: Target,
    seconds: float,
    *,
    processes: int,
    variants: int | None = None,
) -> Iterator[Prediction]:
    """What is known of the candidates without a GPU, kernel by kernel; ends with the time."""
    from fastvit.tuning import candidates

    left = clock(seconds)
    with opened(processes) as ahead:
        for problem in problems:
            for path, name in _kernels(problem, target.arch):
                options = candidates.variants(problem, target.arch, path, name)
                jobs = [_job(problem, target, path, name)]
                for kernels in itertools.islice(options, variants):
                    jobs.append(_job(problem, target, kernels, name))
                for job in jobs:
                    ahead.ask(job)
                if left() <= 0:
                    return
                verdicts = [(job, ahead.verdict(job, left())) for job in jobs]
                yield _prediction(problem, name, verdicts)


def _kernels(problem: Posed, arch: str) -> Iterator[tuple[Kernels, str]]:
    from fastvit.tuning import candidates

    path = candidates.built_in(problem, arch)
    for name in candidates.tunable(path):
        yield path, name


def _prediction(
    problem: Posed, name: str, verdicts: Sequence[tuple[Job, Verdict | None]]
) -> Prediction:
    there = [(job, verdict) for job, verdict in verdicts if verdict is not None]
    sound = [(verdict.predicted, job) for job, verdict in there if not verdict.reason]
    first = verdicts[0][1]
    best = min(sound, key=lambda pair: pair[0], default=None)
    discarded: dict[str, int] = {}
    for _, verdict in there:
        if verdict.reason:
            word = verdict.reason.partition(":")[0]
            discarded[word] = discarded.get(word, 0) + 1
    return Prediction(
        problem,
        name,
        first.predicted if first is not None and not first.reason else None,
        None if best is None else best[0],
        () if best is None else best[1].kernels,
        len(there),
        discarded,
    )


def measured(target: Target) -> dict[str, str]:
    """What a table says of its measurements."""
    import triton

    commit = "" if _native.reason() else str(_native.load().build_info()["commit"] or "")
    return {
        "gpu": target.gpu,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fastvit": __version__,
        "commit": commit,
    }


def entries(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """As a table has them: none of a search that found nothing in too little time."""
    return [
        tables.plain(
            found.problem,
            () if found.chosen == found.built_in else found.chosen,
            {"tuned": _rounded(found.after), "built-in": _rounded(found.before)},
        )
        for found in outcomes
        if found.complete or found.chosen != found.built_in
    ]


def _rounded(times: Any) -> dict[str, float]:
    return {name: round(value, 3) for name, value in times._asdict().items()}


def keep(file: Path, target: Target, outcomes: Sequence[Outcome]) -> None:
    """Write a table with these outcomes, beside what it has, if there are any to be kept.

    Raises:
        OSError: it cannot be written.
        ValueError: it is no table.
    """
    new = entries(outcomes)
    if not new:
        return
    # Another search may be writing, too.
    with tables.locked(file):
        table = tables.read_all(file)
        table = tables.merged(table, target.arch, triton_version(), measured(target), new)
        tables.write(file, table)

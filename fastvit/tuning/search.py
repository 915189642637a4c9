# SPDX-License-Identifier: Apache-2.0
"""Decides which configurations serve a problem.

One kernel of a call after the other: its neighbours with the lowest floors are compiled; those that
do not spill, the best predicted first, and whose results agree with those of the built-in kernels,
are timed in turns within the whole call. One is taken only if it is faster beyond the spread of
both, here and once more in the end against what is built in.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from fastvit.kernels.tuned import Kernels, Posed
from fastvit.tuning import candidates
from fastvit.tuning.ahead import Verdict

#: Rounds in which all are timed, and those in which only the best are.
_SCREEN, _ROUNDS = 3, 15
#: Kept after the screening, and measured and compiled at most of a kernel's neighbours.
_FINALISTS, _MOST, _COMPILED = 4, 16, 48
#: Of a kernel's share of the time, what may pass until its neighbours are compiled.
_COMPILING = 2 / 3
#: Samples that a spread takes: of fewer, all of one are below all of another by chance too often.
_FEW = 5


class Times(NamedTuple):
    """Microseconds."""

    median: float
    q20: float
    q80: float


class Outcome(NamedTuple):
    """What was found for a problem."""

    problem: Posed
    built_in: Kernels
    #: The same where nothing was faster beyond the spread.
    chosen: Kernels
    before: Times
    after: Times
    measured: int
    #: Candidates that are discarded unmeasured: spills and the like, too slow by their floor, not
    #: compiled in time.
    spilled: int
    slow: int
    late: int
    #: What disagreed or raised, in words.
    refused: tuple[str, ...]
    #: Whether all was tried before the time was over.
    complete: bool = True


class Runner(Protocol):
    """Runs a problem's kernels; :class:`fastvit.tuning.device.Problem`."""

    def expect(self, kernels: Kernels) -> None:
        """Take what these give as right."""

    def disagreement(self, kernels: Kernels) -> str:
        """How what these give differs from that, or empty."""

    def sampler(self, kernels: Kernels) -> Callable[[], float]:
        """What times a call; microseconds."""


#: Of a kernel of a call, by name; None if it is not there in time.
Judge = Callable[[Kernels, str], Verdict | None]
#: Microseconds below which kernels cannot come.
Floor = Callable[[Kernels], float]


class _Search:
    """The search for one problem."""

    def __init__(
        self,
        problem: Posed,
        arch: str,
        runner: Runner,
        judge: Judge,
        floor: Floor,
        left: Callable[[], float],
        variants: int | None,
    ) -> None:
        self.problem, self.arch, self.runner = problem, arch, runner
        self.variants = variants
        self.judge, self.floor, self.left = judge, floor, left
        self.measured = self.spilled = self.slow = self.late = 0
        #: Kernels of all paths whose turn is to come, and whether neighbours of one were left out.
        self.kernels, self.cut = 1, False
        self.refused: list[str] = []

    def run(self) -> Outcome | None:
        if self.left() <= 0:
            return None
        paths = candidates.paths(self.problem, self.arch)
        self.kernels = sum(len(candidates.tunable(path)) for path in paths)
        first, *others = paths
        self.runner.expect(first)
        before = self._timed([first], _ROUNDS)[first]
        best = self._improved(first, first, before.median)
        for path in others:
            if self.left() > 0 and self._sound(path):
                found = self._improved(path, path, before.median)
                best = self._winner(best, [found])
        after = before
        if best != first:
            # As fast as it seemed among many, some by chance?
            times = self._timed([first, best], 2 * _ROUNDS)
            before, after = times[first], times.get(best, times[first])
            if not after.q80 < before.q20:
                best, after = first, before
        return Outcome(
            self.problem, first, best, before, after, self.measured, self.spilled, self.slow,
            self.late, tuple(self.refused), self.left() > 0 and not self.cut,
        )  # fmt: skip

    def _sound(self, path: Kernels) -> bool:
        """Whether the kernels of another way of doing it compile and agree."""
        for name in candidates.tunable(path):
            if not self._compiles(path, name):
                return False
        return self._agrees(path)

    def _compiles(self, kernels: Kernels, name: str) -> Verdict | None:
        verdict = self.judge(kernels, name)
        if verdict is None:
            self.late += 1
            return None
        if verdict.reason:
            self.spilled += 1
            return None
        return verdict

    def _agrees(self, kernels: Kernels) -> bool:
        try:
            differs = self.runner.disagreement(kernels)
        # Its fault, which is told; the others are still measured.
        except Exception as error:
            differs = f"{type(error).__name__}: {error}".splitlines()[0]
        if differs:
            self.refused.append(differs)
        return not differs

    def _improved(self, path: Kernels, current: Kernels, fastest: float) -> Kernels:
        """The kernels of a path with the best configuration found for each."""
        for name in candidates.tunable(path):
            options: list[tuple[float, Kernels]] = []
            # Of a kernel's share of the time, what is left serves to measure what was compiled.
            end = self.left() * (1 - _COMPILING / max(1, self.kernels))
            self.kernels -= 1
            for variant in _ranked(self.problem, self.arch, path, name, self.floor, self.variants):
                if self.left() <= max(0.0, end):
                    self.cut = True
                    break
                verdict = self._compiles(variant, name)
                if verdict is None:
                    continue
                changed = dict(variant)[name]
                option = tuple((n, changed if n == name else c) for n, c in current)
                if self.floor(option) > fastest:
                    self.slow += 1
                    continue
                options.append((verdict.predicted, option))
            options.sort(key=lambda option: option[0])
            agreeing = self._agreeing([option for _, option in options])
            current = self._winner(current, agreeing)
        return current

    def _agreeing(self, options: Iterable[Kernels]) -> list[Kernels]:
        found: list[Kernels] = []
        for option in options:
            if len(found) == _MOST or self.left() <= 0:
                break
            if self._agrees(option):
                found.append(option)
        return found

    def _winner(self, current: Kernels, options: Sequence[Kernels]) -> Kernels:
        """What is faster than the current beyond the spread of both, else the current."""
        options = [option for option in options if option != current]
        if not options or self.left() <= 0:
            return current
        screened = self._timed([current, *options], _SCREEN)
        finalists = sorted(options, key=lambda o: screened[o].median if o in screened else 1e30)
        times = self._timed([current, *finalists[:_FINALISTS]], _ROUNDS)
        best = min(times, key=lambda kernels: times[kernels].median)
        faster = current in times and times[best].q80 < times[current].q20
        return best if faster else current

    def _timed(self, contenders: Sequence[Kernels], rounds: int) -> dict[Kernels, Times]:
        """Round after round, so that all meet the same clocks; once at least whatever the time."""
        samplers = {}
        for kernels in contenders:
            try:
                samplers[kernels] = self.runner.sampler(kernels)
            # Its fault, which is told; the others are still measured.
            except Exception as error:
                if kernels == contenders[0]:
                    raise
                self.refused.append(f"{type(error).__name__}: {error}".splitlines()[0])
        samples: dict[Kernels, list[float]] = {kernels: [] for kernels in samplers}
        for done in range(rounds):
            if done and self.left() <= 0:
                break
            for kernels, sample in samplers.items():
                samples[kernels].append(sample())
        self.measured += len(samples)
        return {kernels: quantiles(found) for kernels, found in samples.items()}


def quantiles(samples: Sequence[float]) -> Times:
    """Median, 20th and 80th percentile. Of few samples no spread is known: they beat nothing."""
    if len(samples) < _FEW:
        return Times(statistics.median(samples), 0.0, float("inf"))
    cuts = statistics.quantiles(samples, n=5, method="inclusive")
    return Times(statistics.median(samples), cuts[0], cuts[3])


def tune(
    problem: Posed,
    arch: str,
    runner: Runner,
    judge: Judge,
    floor: Floor,
    left: Callable[[], float],
    variants: int | None = None,
) -> Outcome | None:
    """The fastest kernels that were found for a problem; None without time for any.

    Args:
        arch: whose configurations are built in.
        runner: runs and times the problem.
        judge: what is known of a kernel ahead of time.
        floor: microseconds below which kernels cannot come.
        left: seconds that are left.
        variants: of a kernel that are tried at most, all by default.
    """
    return _Search(problem, arch, runner, judge, floor, left, variants).run()


def asked(
    problem: Posed, arch: str, floor: Floor, variants: int | None = None
) -> Iterator[tuple[Kernels, str]]:
    """All that the search may want to know of kernels ahead of time, by name, in its order."""
    for number, path in enumerate(candidates.paths(problem, arch)):
        for name in candidates.tunable(path):
            if number:
                yield path, name
            for variant in _ranked(problem, arch, path, name, floor, variants):
                yield variant, name


def _ranked(
    problem: Posed, arch: str, path: Kernels, name: str, floor: Floor, variants: int | None
) -> list[Kernels]:
    """Neighbours of a kernel, those with the lowest floor first: they pad the least."""
    found = candidates.variants(problem, arch, path, name)
    return sorted(found, key=floor)[: _COMPILED if variants is None else variants]

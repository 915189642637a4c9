# SPDX-License-Identifier: Apache-2.0
"""What changed between two runs beyond the measured spread.

Two runs of the same code differ: the machine is warmer, slower, busier. Both runs also timed what
has not changed in between, the libraries' contenders, in turns with ours. They are what a change is
held against:

- The **drift** is the median of B over A among peers, and the times of B are divided by it before
  they are judged. A busy moment of the machine hits a whole contest, which its own peers tell; a
  stumble of one library's contender hits only that one, which the peers of the whole run tell. So
  of the two medians the one is taken that explains more of a change.
- The **noise** from run to run is how much remains where nothing changed: every peer is held
  against the other peers in the same way, and the noise is 2.5 times the error that 90 % of them
  keep to, at least 2 %: with errors of a normal distribution four deviations, so that hundreds of
  figures give no false alarm. It is that of the peers of the same file or stage and mode where
  there are 8 of them, since short steps scatter more than long ones, else that of all. Without two
  peers it cannot be measured, and is taken as 5 %.
- A time is **slower** or **faster** if the intervals from the 20th to the 80th percentile of A and
  of drift-corrected B do not overlap, and the medians differ by more than the noise. The first
  says that the rounds of each run agree among themselves, the second that it is more than two runs
  of the same code differ by.

If the libraries' versions differ, their contenders did change, and the drift has that in it, too.

What was counted or compiled (registers, bytes, launches, predicted times) has no spread: it
differs when it differs. Figures without samples that a run states beside them, such as the host's
time of a call, are not compared.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastvit.benchmark.figures import Figure, Key, Results, spread

SLOWER, FASTER, WITHIN = "slower", "faster", "within the spread"
GREW, SHRANK, EQUAL, OTHER = "grew", "shrank", "equal", "another"
FAILED, APPEARED, VANISHED = "failed", "appeared", "vanished"

#: Verdicts on our code that make a comparison fail.
WORSE = (SLOWER, GREW, FAILED)

_LEAST_NOISE, _UNKNOWN_NOISE = 1.02, 1.05
_SHARE, _MARGIN = 0.9, 2.5
#: Peers from which a file or stage and mode has a noise of its own.
_ENOUGH = 8


class Drift(NamedTuple):
    """How the machine changed from A to B, as factors of time."""

    ratio: float
    noise: float
    #: Contenders of libraries that both runs timed.
    peers: int
    #: By file or stage and mode, where enough of them were timed.
    noises: dict[tuple[str, str], float] = {}  # noqa: RUF012

    def noise_of(self, key: Key) -> float:
        return self.noises.get((key.source, key.mode), self.noise)


@dataclass(frozen=True)
class Change:
    """One figure of two runs.

    ``before`` and ``after`` are median seconds or values, as measured; ``ratio`` is after over
    before, of times divided by the ``drift``.
    """

    key: Key
    ours: bool
    verdict: str
    before: float | str | None = None
    after: float | str | None = None
    ratio: float | None = None
    drift: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """All changes, those of libraries' contenders among them, which are not judged."""

    changes: list[Change]
    drift: Drift | None

    def counts(self) -> Counter[str]:
        """How many figures of ours have which verdict."""
        return Counter(change.verdict for change in self.changes if change.ours)

    @property
    def worse(self) -> bool:
        return any(self.counts()[verdict] for verdict in WORSE)


def compare(a: Results, b: Results) -> Comparison:
    """Every figure that one of the runs has; A is the earlier one."""
    ratios = _ratios(a, b)
    expected = {key: _expected(_others(ratios, key), key, ratio) for key, ratio in ratios.items()}
    drift = _drift(ratios, expected) if _timed(a) and _timed(b) else None
    changes = []
    for key in dict.fromkeys([*a.figures, *b.figures]):
        old, new = a.figures.get(key), b.figures.get(key)
        if old is None or new is None or old.error or new.error:
            changes.append(_one_sided(key, old, new))
        elif old.samples and new.samples:
            assert drift is not None
            # What is expected of a peer must not come from itself.
            likely = expected[key] if key in expected else _expected(ratios, key, 1.0)
            changes.append(_judged(old, new, likely, drift.noise_of(key)))
        else:
            changes.append(_exact(old, new))
    return Comparison(changes, drift)


def _timed(results: Results) -> bool:
    return any(figure.samples for figure in results.figures.values())


def _ratios(a: Results, b: Results) -> dict[Key, float]:
    """B over A of the medians of libraries' contenders."""
    found = {}
    for key, old in a.figures.items():
        new = b.figures.get(key)
        if new is not None and not old.ours and old.samples and new.samples:
            found[key] = spread(new.samples).median / spread(old.samples).median
    return found


def _others(ratios: dict[Key, float], key: Key) -> dict[Key, float]:
    return {other: ratio for other, ratio in ratios.items() if other != key}


def _expected(ratios: dict[Key, float], key: Key, otherwise: float) -> list[float]:
    """Drifts by the peers of a figure's contest, and by those of the whole run."""
    contest = [ratio for other, ratio in ratios.items() if other.contest == key.contest]
    groups = [group for group in (contest, list(ratios.values())) if group]
    return [statistics.median(group) for group in groups] or [otherwise]


def _explaining(drifts: Sequence[float], ratio: float) -> float:
    """The drift that leaves least of a change."""
    return min(drifts, key=lambda drift: abs(math.log(ratio / drift)))


def _drift(ratios: dict[Key, float], expected: dict[Key, list[float]]) -> Drift:
    if len(ratios) < 2:
        return Drift(next(iter(ratios.values()), 1.0), _UNKNOWN_NOISE, len(ratios))
    errors: dict[tuple[str, str], list[float]] = {}
    for key, ratio in ratios.items():
        error = abs(math.log(ratio / _explaining(expected[key], ratio)))
        errors.setdefault((key.source, key.mode), []).append(error)
    noises = {group: _noise(found) for group, found in errors.items() if len(found) >= _ENOUGH}
    everything = [error for found in errors.values() for error in found]
    return Drift(statistics.median(ratios.values()), _noise(everything), len(ratios), noises)


def _noise(errors: Sequence[float]) -> float:
    kept = sorted(errors)[math.ceil(_SHARE * len(errors)) - 1]
    return max(_LEAST_NOISE, math.exp(_MARGIN * kept))


def _judged(old: Figure, new: Figure, drifts: Sequence[float], noise: float) -> Change:
    before, after = spread(old.samples), spread(new.samples)
    drift = _explaining(drifts, after.median / before.median)
    ratio = after.median / before.median / drift
    verdict = WITHIN
    if after.q20 / drift > before.q80 and ratio > noise:
        verdict = SLOWER
    elif after.q80 / drift < before.q20 and ratio < 1.0 / noise:
        verdict = FASTER
    return Change(old.key, old.ours, verdict, before.median, after.median, ratio, drift)


def _exact(old: Figure, new: Figure) -> Change:
    before, after = old.value, new.value
    if isinstance(before, str) or isinstance(after, str) or before is None or after is None:
        verdict = EQUAL if before == after else OTHER
        return Change(old.key, old.ours, verdict, before, after)
    ratio = after / before if before else None
    if math.isclose(before, after, rel_tol=old.tolerance, abs_tol=0.0):
        verdict = EQUAL
    elif not old.better:
        verdict = OTHER
    else:
        # "grew" is always the worse direction; what more is better of has lost if it is less.
        verdict = GREW if (after > before) == (old.better == "less") else SHRANK
    return Change(old.key, old.ours, verdict, before, after, ratio)


def _one_sided(key: Key, old: Figure | None, new: Figure | None) -> Change:
    """A figure that one run lacks, or where one has an error in its place."""
    known = new or old
    assert known is not None
    before, after = (None if figure is None else _shown(figure) for figure in (old, new))
    if new is not None and new.error:
        # What failed before is no news.
        verdict = EQUAL if old is not None and old.error else FAILED
        return Change(key, known.ours, verdict, before, after, reason=new.error)
    verdict = APPEARED if new is not None else VANISHED
    return Change(key, known.ours, verdict, before, after)


def _shown(figure: Figure) -> float | str | None:
    return spread(figure.samples).median if figure.samples else figure.value

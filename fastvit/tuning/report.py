# SPDX-License-Identifier: Apache-2.0
"""What the search found, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastvit.kernels.configs import Config
from fastvit.kernels.tuned import Kernels
from fastvit.tuning.search import Outcome, Times
from fastvit.tuning.session import Prediction


def config_text(config: Config) -> str:
    """For example "64 x 128+64+16, d 32+16, 4 warps, 2 stages, resident"."""

    def text(sizes: Any) -> str:
        return "+".join(map(str, sizes)) if isinstance(sizes, tuple) else str(sizes)

    parts = [f"{config.rows} x {text(config.keys)}"] if config.rows else []
    parts += [f"d {text(config.channels)}"] if config.channels else []
    parts += [f"{config.taps} taps"] if config.taps else []
    parts += [f"{config.warps} warps", f"{config.stages} stages"]
    parts += ["resident"] if config.resident else []
    return ", ".join(parts)


def changes(before: Kernels, after: Kernels) -> list[tuple[str, str, str]]:
    """Kernels that differ: name, configuration before and after; a dash where there is none."""
    old, new = dict(before), dict(after)
    return [
        (
            name,
            config_text(old[name]) if name in old else "–",
            config_text(new[name]) if name in new else "–",
        )
        for name in dict.fromkeys((*old, *new))
        if old.get(name) != new.get(name)
    ]


def times_text(times: Times) -> str:
    """Median and, in brackets, 20th and 80th percentile."""
    return f"{times.median:.1f} µs ({times.q20:.1f}–{times.q80:.1f})"


def line(found: Outcome) -> str:
    """One outcome while the search goes on."""
    if found.chosen == found.built_in:
        end = "beyond the spread" if found.complete else "until its time was over, not kept"
        what = f"{times_text(found.before)}, nothing faster {end}"
    else:
        what = f"{times_text(found.before)} → {times_text(found.after)}, {gain(found)}"
    tried = f"{found.measured} timed, {found.spilled} spill or do not fit, {found.slow} too slow"
    late = f", {found.late} not compiled in time" if found.late else ""
    return f"{found.problem.name}: {what} [{tried}{late}]"


def gain(found: Outcome) -> str:
    """Of the medians: "1.08 times as fast"."""
    return f"{found.before.median / found.after.median:.2f} times as fast"


def table(outcomes: Sequence[Outcome]) -> str:
    """What changed: problem, built-in and chosen configuration with their times, gain."""
    changed = [found for found in outcomes if found.chosen != found.built_in]
    if not changed:
        return f"{len(outcomes)} problems measured; what is built in was not beaten."
    lines = [f"{len(changed)} of {len(outcomes)} problems have a faster configuration:"]
    for found in changed:
        lines.append(f"\n{found.problem.name}: {gain(found)}")
        lines.append(f"  built-in  {times_text(found.before)}")
        lines.append(f"  chosen    {times_text(found.after)}")
        for name, before, after in changes(found.built_in, found.chosen):
            lines.append(f"    {name}: {before} → {after}")
    return "\n".join(lines)


def prediction(found: Prediction) -> str:
    """One kernel's, predicted, not measured."""
    head = f"{found.problem.name}, {found.name}"
    discarded = ", ".join(f"{count} {word}" for word, count in found.discarded.items())
    tail = f"[{found.compiled} compiled{', of which ' if discarded else ''}{discarded}]"
    if found.best is None:
        return f"{head}: nothing that fits {tail}"
    own = "–" if found.built_in is None else f"{found.built_in:.1f} µs"
    config = config_text(dict(found.kernels)[found.name])
    return f"{head}: built-in {own}, best {found.best:.1f} µs with {config} {tail}"

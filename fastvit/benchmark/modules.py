# SPDX-License-Identifier: Apache-2.0
"""Contests measured: agreement first, then interleaved rounds, then a table."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from fastvit.benchmark.contests import (
    CHANNELS_LAST,
    COMPILED,
    DEIT,
    FASTVIT,
    FASTVIT_DEIT,
    LIBRARY,
    PRODUCTS,
    Entry,
    Run,
)
from fastvit.benchmark.files import write_text
from fastvit.benchmark.machine import Machine
from fastvit.benchmark.measure import Repeat, repeat_plainly
from fastvit.benchmark.report import now
from fastvit.benchmark.text import NOTHING, Cell, Column, bullets, render_markdown, render_text

_ROUNDS = 12
_SECONDS = 15.0


@dataclass
class Outcome:
    """What one contest yields: seconds of every round by contender, bytes at the peak."""

    entry: Entry
    error: float
    limit: float
    agrees: bool
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    def best(self, contender: str) -> float | None:
        """Seconds of the fastest round."""
        return min(self.seconds[contender]) if contender in self.seconds else None

    def ratio(self, contender: str, to: str = FASTVIT) -> float | None:
        """How many times as long as ``to`` a contender takes."""
        mine, other = self.best(contender), self.best(to)
        return None if mine is None or other is None else mine / other

    def fastest_other(self) -> float | None:
        """How many times as long as fastvit the library's layer takes at its fastest."""
        ratios = [r for r in map(self.ratio, (COMPILED, CHANNELS_LAST)) if r is not None]
        return min(ratios, default=None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.entry.name,
            "dtype": self.entry.dtype_name,
            "batch": self.entry.batch,
            "error": self.error,
            "limit": self.limit,
            "agrees": self.agrees,
            "seconds": self.seconds,
            "peak_bytes": self.peaks,
        }


def measure(entry: Entry, *, timed: bool, repeat: Repeat = repeat_plainly) -> Outcome:
    """Build a contest, compare, and time all contenders in turns.

    As many rounds as fit into 15 seconds, between 3 and 12, after two that do not count.

    Args:
        timed: whether there are rounds at all.
        repeat: runs them: fastvit is the target of a round, the others are its set-up.
    """
    contest = entry.build(entry.dtype, entry.batch)
    found = contest.agreement
    outcome = Outcome(entry, found.error, found.limit, found.ok)
    if not (timed and found.ok):
        return outcome
    outcome.seconds = _interleaved(contest.runs, repeat)
    outcome.peaks = {name: peak_bytes(run) for name, run in contest.memory.items()}
    return outcome


def _interleaved(runs: dict[str, Run], repeat: Repeat) -> dict[str, list[float]]:
    for run in runs.values():
        run()
    start = time.perf_counter()
    for run in runs.values():
        run()
    rounds = int(min(_ROUNDS, max(3, _SECONDS / (time.perf_counter() - start))))
    seconds: dict[str, list[float]] = {name: [] for name in runs}

    def timed(name: str) -> None:
        start = time.perf_counter()
        runs[name]()
        seconds[name].append(time.perf_counter() - start)

    def others() -> None:
        for name in runs:
            if name != FASTVIT:
                timed(name)

    repeat(lambda: timed(FASTVIT), others, rounds)
    return seconds


def peak_bytes(run: Run) -> int:
    """The most memory that a call holds at one time beyond what was there before it, on a CPU."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


_COLUMNS = [
    Column("what", left=True),
    Column("dtype", left=True),
    *map(
        Column, ("batch", "library ms", "fastvit ms", "speed-up", "at most", "otherwise", "memory")
    ),
]
_MODEL_COLUMNS = [
    Column("ConViT ÷ DeiT", left=True),
    Column("dtype", left=True),
    *map(Column, ("batch", "timm", "fastvit", "÷ fastvit's DeiT", "equal work")),
]

#: Images per second of ConViT over DeiT if both took equally long for a multiply-add.
_EQUAL_WORK = {"tiny": 1.0, "small": 0.80, "base": 1.0}

NOTES = (
    "Best of interleaved rounds, agreement checked before. Library: timm (GPSA, Attention, "
    "PatchEmbed, models), torchvision (stem), eager.",
    "At most: the library's time over that of the layer's matrix products or convolutions alone, "
    "in PyTorch's fastest form here: no implementation on these libraries gains more.",
    "Otherwise: the library's layer under torch.compile, or its stem in channels_last if that is "
    "faster, over fastvit, both forward; below 1 fastvit is slower. Memory: peak of what a "
    "training step allocates, fastvit over library.",
    "ConViT ÷ DeiT: images per second in inference; timm: both models timm's; fastvit: fastvit's "
    "ConViT over timm's DeiT. Equal work: what equal time per multiply-add would give.",
)


def _figure(value: float | None, form: str) -> str:
    return NOTHING if value is None else form.format(value)


def _row(o: Outcome) -> list[Cell]:
    milliseconds = [None if s is None else s * 1e3 for s in (o.best(LIBRARY), o.best(FASTVIT))]
    memory = o.peaks[FASTVIT] / o.peaks[LIBRARY] if o.peaks else None
    return [
        o.entry.name.replace(" against DeiT", ""),
        o.entry.dtype_name,
        str(o.entry.batch),
        *(_figure(m, "{:,.2f}") for m in milliseconds),
        _figure(o.ratio(LIBRARY), "{:.2f}x"),
        _figure(o.ratio(LIBRARY, PRODUCTS), "{:.2f}x"),
        _figure(o.fastest_other(), "{:.2f}x"),
        _figure(memory, "{:.2f}"),
    ]


def _model_row(o: Outcome) -> list[Cell]:
    size = o.entry.name.removeprefix("ConViT-").removesuffix(" against DeiT")
    return [
        size,
        o.entry.dtype_name,
        str(o.entry.batch),
        _figure(o.ratio(DEIT, LIBRARY), "{:.2f}"),
        _figure(o.ratio(DEIT), "{:.2f}"),
        _figure(o.ratio(FASTVIT_DEIT), "{:.2f}"),
        f"{_EQUAL_WORK[size]:.2f}",
    ]


def tables(outcomes: list[Outcome], *, markdown: bool = False) -> list[str]:
    """The table of all contests, and that of whole models where there are any."""
    render = render_markdown if markdown else render_text
    found = [render(_COLUMNS, [("", [_row(o) for o in outcomes])])]
    models = [o for o in outcomes if DEIT in o.seconds]
    if models:
        found.append(render(_MODEL_COLUMNS, [("", [_model_row(o) for o in models])]))
    return found


def text_report(outcomes: list[Outcome], machine: Machine) -> str:
    """What a run prints."""
    line = machine.line("float32 and bfloat16")
    return "\n\n".join([line, *tables(outcomes), bullets(NOTES)])


def write_report(outcomes: list[Outcome], machine: Machine, folder: Path) -> None:
    """Write ``modules.json`` and ``modules.md``, each whole or not at all."""
    content = {
        "contests": [o.to_dict() for o in outcomes],
        "machine": machine.to_dict(),
        **machine.origin(),
        "date": now(),
    }
    write_text(folder / "modules.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    parts = [
        "# Layers and models against their peers",
        machine.line("float32 and bfloat16").replace("|", "·"),
        *tables(outcomes, markdown=True),
        "\n".join(f"- {note}" for note in NOTES),
    ]
    write_text(folder / "modules.md", "\n\n".join(parts) + "\n")

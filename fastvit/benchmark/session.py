# SPDX-License-Identifier: Apache-2.0
"""One run of the benchmark: what is measured, what is told meanwhile, what is written and printed.

``pytest bench/`` and ``fastvit bench`` are two ways to drive it.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastvit.benchmark import contests, modules
from fastvit.benchmark import rows as tables
from fastvit.benchmark.machine import Machine
from fastvit.benchmark.measure import Repeat, Settings, measure_row, repeat_plainly
from fastvit.benchmark.options import BadOption, Options
from fastvit.benchmark.report import Run, text_report, write_json, write_report
from fastvit.benchmark.result import Result

#: Is told in a few words what goes on; words begin a line of their own where they need one.
Say = Callable[[str], None]


def device_of_run() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Session:
    """What is to be measured, and the results that grow as it is.

    Args:
        machine: what the figures are of.
        say: is told how it goes.

    Raises:
        BadOption: a name that nothing has, with the nearest ones.
    """

    def __init__(self, options: Options, machine: Machine, say: Say) -> None:
        self.timed, self.folder, self.say = options.timed, options.report, say
        self.rows = self._chosen_rows(options)
        self.settings = Settings(
            device_of_run(),
            getattr(torch, options.dtype),
            batch=options.batch,
            steps=options.steps,
            timed=options.timed,
        )
        self.run = Run(machine, self.settings.dtype_name, [], full=options.full)
        self.entries = self._chosen_entries(options)
        self.outcomes: list[modules.Outcome] = []

    def _chosen_rows(self, options: Options) -> list[tables.Row]:
        if options.rows == "":
            return []
        everything = "*" if options.timed else ",".join(tables.SMOKE_ROWS)
        try:
            return tables.select_rows((options.rows or everything).split(","))
        except ValueError as error:
            raise BadOption(f"--rows: {error}") from error

    def _chosen_entries(self, options: Options) -> list[contests.Entry]:
        if options.rows and not options.modules:
            return []
        # Without time to measure, one image is enough to compare.
        entries = contests.entries(batch=options.batch or (8 if options.timed else 1))
        try:
            return contests.select(entries, (options.modules or "*").split(","))
        except ValueError as error:
            raise BadOption(f"--modules: {error}") from error

    def measure_row(self, row: tables.Row, repeat: Repeat = repeat_plainly) -> Result:
        """Measure one row, tell how it went, and keep the result."""
        start = time.perf_counter()
        self.say(f"\n[{self.rows.index(row) + 1:2}/{len(self.rows)}] {row.name}")
        result = measure_row(
            row, self.settings, repeat=repeat, progress=lambda text: self.say(f" … {text}")
        )
        self.run.results.append(result)
        told = _outcome(result, timed=self.timed)
        self.say(f" … {told} ({time.perf_counter() - start:.0f} s)")
        if self.folder:
            write_json(self.run, self.folder)
        return result

    def measure_contest(
        self, entry: contests.Entry, repeat: Repeat = repeat_plainly
    ) -> modules.Outcome:
        """Measure one contest, tell how it went, and keep the outcome."""
        self.say(f"\n[{self.entries.index(entry) + 1:2}/{len(self.entries)}] {entry.id}")
        outcome = modules.measure(entry, timed=self.timed, repeat=repeat)
        self.outcomes.append(outcome)
        if not outcome.agrees:
            said = "disagrees"
        elif outcome.seconds:
            said = f"{outcome.ratio(contests.LIBRARY):.2f}x"
        else:
            said = f"agrees, error {outcome.error:.1e}"
        self.say(f" … {said}")
        return outcome

    def write(self, *, interrupted: bool) -> None:
        """Write the files of the report, if there is a folder for them."""
        self.run.interrupted = interrupted
        if not self.folder:
            return
        if any(outcome.seconds for outcome in self.outcomes):
            modules.write_report(self.outcomes, self.run.machine, self.folder)
        if self.run.results:
            write_report(self.run, self.folder)

    def sections(self) -> list[tuple[str, list[str]]]:
        """Titles and texts to print."""
        found = []
        if self.timed and self.outcomes:
            texts = [modules.text_report(self.outcomes, self.run.machine)]
            if self.folder:
                texts.append(f"\nwritten to {self.folder}: modules.json, .md")
            found.append(("fastvit: layers and models against their peers", texts))
        if self.run.results:
            found.append(("fastvit: minutes per ImageNet epoch", self._epochs()))
        return found

    def _epochs(self) -> list[str]:
        if not self.timed:
            return [
                f"Smoke test: {len(self.run.results)} of {len(self.rows)} rows ran once. "
                "`pytest bench/ --benchmark` times all rows of the tables."
            ]
        texts = [text_report(self.run)]
        if self.folder:
            texts.append(f"\nwritten to {self.folder}: epoch.json, .md, .svg")
        return texts


def check_report_folder(folder: Path) -> None:
    """Find out before a run of minutes, not after it.

    Raises:
        BadOption: nothing can be drawn, or written there.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise BadOption("--report needs matplotlib: pip install 'fastvit[bench]'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadOption(f"--report: cannot make the folder: {error}") from error
    if not os.access(folder, os.W_OK):
        raise BadOption(f"--report: cannot write to {folder}")


def _outcome(result: Result, *, timed: bool) -> str:
    if result.status != "ok":
        return result.status
    if not timed:
        compared = result.max_error is not None
        return f"agrees, largest error {result.max_error:.1e}" if compared else "ran"
    if result.speedup is None:
        return f"{result.minutes_reference:,.1f} min"
    figures = f"{result.minutes_reference:,.1f} → {result.minutes_fastvit:,.1f} min"
    return f"{figures}, {result.speedup:.2f}x"

# SPDX-License-Identifier: Apache-2.0
"""Options, choice of rows, progress and report of ``pytest bench/``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

# Triton decides when a kernel is decorated, so this stands above every import of fastvit.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastvit.benchmark import contests
from fastvit.benchmark import rows as tables
from fastvit.benchmark.machine import this_machine
from fastvit.benchmark.measure import Settings, measure_row
from fastvit.benchmark.modules import Outcome, measure
from fastvit.benchmark.modules import text_report as modules_text
from fastvit.benchmark.modules import write_report as write_modules
from fastvit.benchmark.report import Run, text_report, write_json, write_report
from fastvit.benchmark.result import Result

DTYPES = ("float32", "bfloat16", "float16")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastvit", "fastvit: the papers' tables, measured")
    group.addoption(
        "--benchmark",
        action="store_true",
        help="time all rows and print minutes per ImageNet epoch; without it a few rows run "
        "once, as a smoke test",
    )
    group.addoption(
        "--report",
        metavar="DIR",
        help="write epoch.json, .md, .svg and modules.json, .md into DIR",
    )
    group.addoption(
        "--modules",
        metavar="LIST",
        help="contests of layers by pattern: 'GPSA*','stem*batch 8'; with --rows alone: none",
    )
    group.addoption(
        "--rows", metavar="LIST", help="rows by name or pattern: ConViT-S,'ViT_C-*',*-18GF"
    )
    group.addoption(
        "--batch",
        type=_positive,
        metavar="N",
        help="images per step. Default on a GPU: the paper's batch per GPU, or as much of it as "
        "fits; on a CPU: 1 from 15 GF up, 2 below",
    )
    group.addoption(
        "--dtype", choices=DTYPES, default="float32", help="of models and images (%(default)s)"
    )
    group.addoption(
        "--steps",
        type=_positive,
        metavar="N",
        help="steps to time per row, however long they take. Default: 3 on a CPU, 20 on a GPU, "
        "fewer where they are slow",
    )
    group.addoption(
        "--full", action="store_true", help="add the papers' other columns, as citations"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


class Epochs:
    """The rows to measure, and the run that grows as they are."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.getoption
        self.timed = bool(option("--benchmark") or config.option.benchmark_only)
        chosen = (option("--rows") or ("*" if self.timed else ",".join(tables.SMOKE_ROWS))).split(
            ","
        )
        self.rows = tables.select_rows(chosen)
        self.folder = Path(option("--report")) if option("--report") else None
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.settings = Settings(
            device,
            getattr(torch, option("--dtype")),
            batch=option("--batch"),
            steps=option("--steps"),
            timed=self.timed,
        )
        machine = this_machine(device, checkout=Path(__file__).parent)
        self.run = Run(machine, self.settings.dtype_name, [], full=option("--full"))
        self._plugins = config.pluginmanager

    def measure(self, row: tables.Row, benchmark) -> Result:
        """Measure one row under pytest-benchmark, tell how it went, and keep the result."""
        start = time.perf_counter()
        self.say(f"\n[{self.rows.index(row) + 1:2}/{len(self.rows)}] {row.name}")
        result = measure_row(
            row,
            self.settings,
            repeat=lambda target, setup, rounds: benchmark.pedantic(
                target, setup=setup, rounds=rounds
            ),
            progress=lambda text: self.say(f" … {text}"),
        )
        self.run.results.append(result)
        benchmark.extra_info.update(result.to_dict())
        self.say(f" … {_outcome(result, timed=self.timed)} ({time.perf_counter() - start:.0f} s)")
        if self.folder:
            write_json(self.run, self.folder)
        return result

    def say(self, text: str) -> None:
        # Asked for late: in pytest_configure neither plugin may be there yet.
        terminal = self._plugins.get_plugin("terminalreporter")
        capture = self._plugins.get_plugin("capturemanager")
        if terminal is None:
            return
        with capture.global_and_fixture_disabled() if capture else nullcontext():
            terminal.write(text, flush=True)


class Modules:
    """The contests to measure, and what came of them."""

    def __init__(self, config: pytest.Config, epochs: Epochs) -> None:
        option = config.getoption
        self.timed, self.folder, self._epochs = epochs.timed, epochs.folder, epochs
        # Without time to measure, one image is enough to compare.
        entries = contests.entries(batch=option("--batch") or (8 if self.timed else 1))
        chosen = option("--modules") or "*"
        if option("--rows") and not option("--modules"):
            self.entries = []
        else:
            self.entries = contests.select(entries, chosen.split(","))
        self.outcomes: list[Outcome] = []

    def measure(self, entry: contests.Entry, benchmark) -> Outcome:
        """Measure one contest under pytest-benchmark, tell how it went, and keep the outcome."""
        self._epochs.say(f"\n[{self.entries.index(entry) + 1:2}/{len(self.entries)}] {entry.id}")
        outcome = measure(
            entry,
            timed=self.timed,
            repeat=lambda target, setup, rounds: benchmark.pedantic(
                target, setup=setup, rounds=rounds
            ),
        )
        self.outcomes.append(outcome)
        benchmark.extra_info.update(outcome.to_dict())
        if not outcome.agrees:
            said = "disagrees"
        elif outcome.seconds:
            said = f"{outcome.ratio(contests.LIBRARY):.2f}x"
        else:
            said = f"agrees, error {outcome.error:.1e}"
        self._epochs.say(f" … {said}")
        return outcome


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


EPOCHS = pytest.StashKey[Epochs]()
MODULES = pytest.StashKey[Modules]()


# Not trylast: pytest-benchmark reads its options in a trylast hook of its own.
def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("bench/ needs pytest-benchmark: pip install 'fastvit[bench]'")
    try:
        config.stash[EPOCHS] = epochs = Epochs(config)
    except ValueError as error:
        raise pytest.UsageError(f"--rows: {error}") from error
    try:
        config.stash[MODULES] = Modules(config, epochs)
    except ValueError as error:
        raise pytest.UsageError(f"--modules: {error}") from error
    if epochs.folder:
        if not epochs.timed:
            raise pytest.UsageError("--report needs --benchmark: a smoke test has no figures")
        _check_report_folder(epochs.folder)
    if not epochs.timed:
        config.option.benchmark_disable = True
    elif not config.option.benchmark_verbose:
        # Its own table would repeat ours without the columns that matter.
        config.option.benchmark_quiet = True


def _check_report_folder(folder: Path) -> None:
    """Find out before a run of minutes, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise pytest.UsageError("--report needs matplotlib: pip install 'fastvit[bench]'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(f"--report: cannot make the folder: {error}") from error
    if not os.access(folder, os.W_OK):
        raise pytest.UsageError(f"--report: cannot write to {folder}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        rows = metafunc.config.stash[EPOCHS].rows
        metafunc.parametrize("row", rows, ids=[row.name for row in rows])
    if "entry" in metafunc.fixturenames:
        entries = metafunc.config.stash[MODULES].entries
        metafunc.parametrize("entry", entries, ids=[entry.id for entry in entries])


def pytest_report_teststatus(
    report: pytest.TestReport, config: pytest.Config
) -> tuple[str, str, str] | None:
    """No dots: the line of a row says how it went."""
    ours = "test_row[" in report.nodeid or "test_contest[" in report.nodeid
    if report.when == "call" and ours and config.option.verbose <= 0:
        return report.outcome, "", ""
    return None


@pytest.fixture(scope="session")
def epochs(request: pytest.FixtureRequest) -> Epochs:
    return request.config.stash[EPOCHS]


@pytest.fixture(scope="session")
def modules(request: pytest.FixtureRequest) -> Modules:
    return request.config.stash[MODULES]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    epochs = session.config.stash.get(EPOCHS, None)
    modules = session.config.stash.get(MODULES, None)
    if modules is not None and modules.folder and any(o.seconds for o in modules.outcomes):
        write_modules(modules.outcomes, epochs.run.machine, modules.folder)
    if epochs is None or not epochs.run.results:
        return
    epochs.run.interrupted = exitstatus == pytest.ExitCode.INTERRUPTED
    if epochs.folder:
        write_report(epochs.run, epochs.folder)


# First, so that pytest's own summary of failures stands last, where it is looked for.
@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    epochs = config.stash.get(EPOCHS, None)
    modules = config.stash.get(MODULES, None)
    if modules is not None and modules.timed and modules.outcomes:
        terminalreporter.section("fastvit: layers and models against their peers")
        terminalreporter.write_line(modules_text(modules.outcomes, epochs.run.machine))
        if modules.folder:
            terminalreporter.write_line(f"\nwritten to {modules.folder}: modules.json, .md")
    if epochs is None or not epochs.run.results:
        return
    terminalreporter.section("fastvit: minutes per ImageNet epoch")
    if not epochs.timed:
        terminalreporter.write_line(
            f"Smoke test: {len(epochs.run.results)} of {len(epochs.rows)} rows ran once. "
            "`pytest bench/ --benchmark` times all rows of the tables."
        )
        return
    terminalreporter.write_line(text_report(epochs.run))
    if epochs.folder:
        terminalreporter.write_line(f"\nwritten to {epochs.folder}: epoch.json, .md, .svg")

# SPDX-License-Identifier: Apache-2.0
"""Options, choice of rows, progress and report of ``pytest bench/``."""

from __future__ import annotations

import dataclasses
import os
import runpy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

# Triton decides when a kernel is decorated, so this stands above every import of fastvit.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastvit.benchmark.contests import Entry
from fastvit.benchmark.machine import this_machine
from fastvit.benchmark.measure import Repeat
from fastvit.benchmark.modules import Outcome
from fastvit.benchmark.options import FLAGS, BadOption, Options
from fastvit.benchmark.result import Result
from fastvit.benchmark.rows import Row
from fastvit.benchmark.session import Session, check_report_folder, device_of_run


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastvit", "fastvit: the papers' tables, measured")
    group.addoption(
        "--benchmark",
        action="store_true",
        help="time all rows and print minutes per ImageNet epoch; without it a few rows run "
        "once, as a smoke test",
    )
    for flag, settings in FLAGS.items():
        group.addoption(flag, **settings)


class Benched:
    """A session whose rounds pytest-benchmark repeats and counts."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def row(self, row: Row, benchmark) -> Result:
        result = self.session.measure_row(row, _repeat(benchmark))
        benchmark.extra_info.update(result.to_dict())
        return result

    def contest(self, entry: Entry, benchmark) -> Outcome:
        outcome = self.session.measure_contest(entry, _repeat(benchmark))
        benchmark.extra_info.update(outcome.to_dict())
        return outcome


def _repeat(benchmark) -> Repeat:
    return lambda target, setup, rounds: benchmark.pedantic(target, setup=setup, rounds=rounds)


def _say(plugins: pytest.PytestPluginManager) -> Callable[[str], None]:
    def say(text: str) -> None:
        # Asked for late: in pytest_configure neither plugin may be there yet.
        terminal = plugins.get_plugin("terminalreporter")
        capture = plugins.get_plugin("capturemanager")
        if terminal is None:
            return
        with capture.global_and_fixture_disabled() if capture else nullcontext():
            terminal.write(text, flush=True)

    return say


SESSION = pytest.StashKey[Session]()


# Not trylast: pytest-benchmark reads its options in a trylast hook of its own.
def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("bench/ needs pytest-benchmark: pip install 'fastvit[bench]'")
    option = config.getoption
    options = Options(
        timed=bool(option("--benchmark") or config.option.benchmark_only),
        # An empty list is none given.
        rows=option("--rows") or None,
        modules=option("--modules"),
        batch=option("--batch"),
        dtype=option("--dtype"),
        steps=option("--steps"),
        report=Path(option("--report")) if option("--report") else None,
        full=option("--full"),
    )
    here = Path(__file__).parent
    # By its path: the folder on sys.path would make its modules top-level names.
    fingerprint = runpy.run_path(str(here / "gpu" / "fingerprint.py"))["fingerprint"]
    machine = dataclasses.replace(
        this_machine(device_of_run(), checkout=here), fingerprint=fingerprint(here.parent)
    )
    try:
        config.stash[SESSION] = Session(options, machine, _say(config.pluginmanager))
        if options.report and not options.timed:
            raise BadOption("--report needs --benchmark: a smoke test has no figures")
        if options.report:
            check_report_folder(options.report)
    except BadOption as error:
        raise pytest.UsageError(str(error)) from error
    if not options.timed:
        config.option.benchmark_disable = True
    elif not config.option.benchmark_verbose:
        # Its own table would repeat ours without the columns that matter.
        config.option.benchmark_quiet = True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = metafunc.config.stash[SESSION]
    if "row" in metafunc.fixturenames:
        metafunc.parametrize("row", session.rows, ids=[row.name for row in session.rows])
    if "entry" in metafunc.fixturenames:
        metafunc.parametrize("entry", session.entries, ids=[entry.id for entry in session.entries])


def pytest_report_teststatus(
    report: pytest.TestReport, config: pytest.Config
) -> tuple[str, str, str] | None:
    """No dots: the line of a row says how it went."""
    ours = "test_row[" in report.nodeid or "test_contest[" in report.nodeid
    if report.when == "call" and ours and config.option.verbose <= 0:
        return report.outcome, "", ""
    return None


@pytest.fixture(scope="session")
def benched(request: pytest.FixtureRequest) -> Benched:
    return Benched(request.config.stash[SESSION])


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    ours = session.config.stash.get(SESSION, None)
    if ours is not None:
        ours.write(interrupted=exitstatus == pytest.ExitCode.INTERRUPTED)


# First, so that pytest's own summary of failures stands last, where it is looked for.
@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    session = config.stash.get(SESSION, None)
    for title, texts in session.sections() if session is not None else ():
        terminalreporter.section(title)
        for text in texts:
            terminalreporter.write_line(text)

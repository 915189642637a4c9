# SPDX-License-Identifier: Apache-2.0
"""A session from the command line: progress to stderr, tables to stdout."""

from __future__ import annotations

import dataclasses
import sys
import traceback

from fastvit import _native
from fastvit.benchmark.machine import Machine, this_machine
from fastvit.benchmark.options import Options
from fastvit.benchmark.session import Session, device_of_run

_INTERRUPTED = 130


def drive(options: Options) -> int:
    """Measure all that is asked for, print the tables and write the report.

    Returns:
        The exit status: 1 if anything disagreed or failed, 130 after an interrupt, which keeps
        what was measured until then.

    Raises:
        BadOption: a name that nothing has.
    """
    session = Session(options, _machine(), _say)
    good, interrupted = True, False
    try:
        for row in session.rows:
            good &= session.measure_row(row).status == "ok"
        for entry in session.entries:
            try:
                good &= session.measure_contest(entry).agrees
            # One that cannot be built or run must not take the others along.
            except Exception as error:
                good = False
                _say(f" … {type(error).__name__}: {error}\n{traceback.format_exc()}")
    except KeyboardInterrupt:
        interrupted = True
    _say("\n")
    session.write(interrupted=interrupted)
    for title, texts in session.sections():
        print("\n".join([f"{title}\n", *texts]), end="\n\n")
    if interrupted:
        return _INTERRUPTED
    return 0 if good else 1


def _machine() -> Machine:
    """This machine, with the commit that the installed package was built from."""
    commit = None
    if _native.reason() is None:
        commit = _native.load().build_info()["commit"] or None
    return dataclasses.replace(this_machine(device_of_run()), commit=commit)


def _say(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)

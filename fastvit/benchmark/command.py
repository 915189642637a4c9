# SPDX-License-Identifier: Apache-2.0
"""``fastvit bench``: measure on this machine, or compare two results.

Imported for ``fastvit --help``, so torch is imported only by what runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from fastvit.benchmark.options import FLAGS, BadOption, Options

_DESCRIPTION = """\
Measure fastvit's layers and models in turns with the libraries' on this machine, as
`pytest bench/ --benchmark` does in a checkout; or compare the results of two runs."""

_EXAMPLES = """\
examples:
  fastvit bench --modules 'patch embedding*' --report before
                               some contests of layers and models; modules.json in before/
  fastvit bench --rows 'ConViT-*' --steps 10
                               rows of the papers' table: minutes per ImageNet epoch
  fastvit bench                all of both, which takes long on a processor
  fastvit bench --compare before after
                               what changed beyond the spread; exit with 1 if anything got worse
  fastvit bench --compare A.json B.json --all --json

what is compared: modules.json and epoch.json, the JSON of a run on a GPU (make gpu), tables of
resources, counts.json; or folders of them. Exit status: 0 nothing got worse, 1 something did,
2 there was nothing to compare.
"""

_NEEDED = ("timm", "torchvision")


def add_parser(commands: Any) -> None:
    """Add ``bench`` to the commands of ``fastvit``.

    Args:
        commands: what ``ArgumentParser.add_subparsers`` returned.
    """
    parser = commands.add_parser(
        "bench",
        help="measure layers and models against the libraries', or compare two results",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    measured = parser.add_argument_group("measure (--modules alone leaves the rows out)")
    for flag, settings in FLAGS.items():
        measured.add_argument(flag, **settings)
    compared = parser.add_argument_group("compare")
    compared.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="earlier and later results"
    )
    compared.add_argument("--all", action="store_true", help="list what did not change, too")
    compared.add_argument("--json", action="store_true", help="print JSON instead of tables")
    compared.add_argument(
        "--force", action="store_true", help="compare in spite of what speaks against it"
    )
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """The exit status. Wrong arguments end the process with 2 and a sentence."""
    if arguments.compare:
        for flag, settings in FLAGS.items():
            if getattr(arguments, flag[2:]) != settings.get("default", _absent(settings)):
                arguments.parser.error(f"{flag} is for measuring and means nothing to --compare")
        return _compare(arguments)
    for flag in ("all", "json", "force"):
        if getattr(arguments, flag):
            arguments.parser.error(f"--{flag} needs --compare A B")
    parser: argparse.ArgumentParser = arguments.parser
    try:
        return _measure(arguments)
    except BadOption as error:
        parser.error(str(error))


def _absent(settings: dict[str, Any]) -> Any:
    return False if settings.get("action") == "store_true" else None


def _measure(arguments: argparse.Namespace) -> int:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BadOption(
            f"fastvit is measured against {' and '.join(missing)}, not installed here: "
            "pip install 'fastvit[bench]'"
        )
    # Here, so that --help answers without the seconds that importing torch takes.
    from fastvit.benchmark.drive import drive
    from fastvit.benchmark.session import check_report_folder

    options = Options(
        rows="" if arguments.modules and not arguments.rows else arguments.rows,
        modules=arguments.modules,
        batch=arguments.batch,
        dtype=arguments.dtype,
        steps=arguments.steps,
        report=Path(arguments.report) if arguments.report else None,
        full=arguments.full,
    )
    if options.report:
        check_report_folder(options.report)
    return drive(options)


def _compare(arguments: argparse.Namespace) -> int:
    # Here, as above.
    from fastvit.benchmark import comparable, compare, compare_text
    from fastvit.benchmark.reading import read
    from fastvit.benchmark.stated import Unreadable

    try:
        a, b = (read(path) for path in arguments.compare)
    except Unreadable as error:
        arguments.parser.error(str(error))
    nothing = comparable.incomparable(a, b)
    if nothing:
        arguments.parser.error(nothing)
    doubts = comparable.refusals(a, b)
    if doubts and not arguments.force:
        listed = "\n".join(f"- {doubt}" for doubt in doubts)
        arguments.parser.error(f"not compared (--force does it all the same):\n{listed}")
    for doubt in doubts:
        print(f"warning: {doubt}", file=sys.stderr)
    found = compare.compare(a, b)
    notes = comparable.warnings(a, b)
    if arguments.json:
        print(json.dumps(compare_text.as_dict(a, b, found, [*doubts, *notes]), indent=1))
    else:
        print(compare_text.text(a, b, found, notes, everything=arguments.all))
    return 1 if found.worse else 0

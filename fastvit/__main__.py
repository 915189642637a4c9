# SPDX-License-Identifier: Apache-2.0
"""The command ``fastvit``, the same as ``python -m fastvit``."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence

from fastvit._version import __version__
from fastvit.benchmark import command as benchmark
from fastvit.tuning import command as tuning

_DESCRIPTION = """\
Fast GPSA attention, convolutional stem and patch embedding for vision transformers.
The layers are used from Python; this command tells about the installation."""

_EXAMPLES = """\
examples:
  fastvit info                 what is installed, built and usable here, for bug reports
  fastvit info --help          how to ask for more
  fastvit bench --help         how to measure here, and to compare two results
  fastvit tune --help          how to search the fastest launch configurations on this GPU
"""

_INFO_EXAMPLES = """\
examples:
  fastvit info                 text; paste it into a bug report
  fastvit info --check         also compare every backend with the reference, here and now
  fastvit info --json | jq .build
"""


_COMMANDS = ("info", "bench", "tune")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments after the program's name; by default those of the process.

    Returns:
        The exit status: 1 if a check disagreed, else 0.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if argv and not argv[0].startswith("-") and argv[0] not in _COMMANDS:
        close = difflib.get_close_matches(argv[0], _COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(_COMMANDS)}"
        parser.error(f"unknown command {argv[0]!r}; {hint}")
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvit",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastvit {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    info = commands.add_parser(
        "info",
        help="versions, build record, devices, and which backend runs what or why not",
        description="Tell what is installed, what was built, and which backends run here.",
        epilog=_INFO_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    info.add_argument("--json", action="store_true", help="print JSON instead of text")
    info.add_argument(
        "--check",
        action="store_true",
        help="compare every backend with the reference on small inputs; exit with 1 if one differs",
    )
    info.set_defaults(run=_info)
    benchmark.add_parser(commands)
    tuning.add_parser(commands)
    return parser


def _info(arguments: argparse.Namespace) -> int:
    # Here, so that --help and --version answer without the seconds that importing torch takes.
    from fastvit._info import info

    found = info(check=arguments.check)
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else found)
    return 0 if found.ok else 1


if __name__ == "__main__":
    sys.exit(main())

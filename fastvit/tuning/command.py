# SPDX-License-Identifier: Apache-2.0
"""``fastvit tune``."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from fastvit.kernels.tuned import Posed
    from fastvit.tuning.session import Target

_DESCRIPTION = """\
Search the launch configurations of the Triton kernels that are fastest on this GPU, and write them
to the table that the kernels read. Candidates are compiled ahead of time on the processor's cores;
those that spill, that differ from the built-in kernels' results or that cannot be fast enough are
left out. A call whose shape is not in the table takes the nearest; `fastvit info` shows which."""

_EXAMPLES = """\
examples:
  fastvit tune                                   the papers' shapes, bfloat16, five minutes
  fastvit tune --seconds 3600                    more of them
  fastvit tune --op gpsa --shapes 64x9x14x14x48  one shape: images, heads, rows, columns, channels
  fastvit tune --shapes 32x12x197x64             plain attention of 197 tokens
  fastvit tune --op conv_stem --shapes 4GF:64    the stem of ViT_C-4GF, 64 images of 224 x 224
  fastvit tune --dtype tf32
  fastvit tune --arch sm_90 --predict            without a GPU: compile, predict, write nothing
"""

_OPS = ("gpsa", "mhsa", "conv_stem", "gpsa_dropout")
_DTYPES = ("bfloat16", "float16", "float32", "tf32")


class _Misuse(ValueError):
    """An argument that cannot be."""


def add_parser(commands: Any) -> None:
    """Add the command to those of ``fastvit``."""
    parser = commands.add_parser(
        "tune",
        help="search the fastest launch configurations of the Triton kernels on this GPU",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--op",
        action="append",
        metavar="OP",
        help=f"only this, repeatable: {', '.join(_OPS)}; the last only if it is asked for",
    )
    parser.add_argument(
        "--shapes",
        action="append",
        metavar="SHAPE",
        help="instead of the papers', repeatable: BxHxROWSxCOLUMNSxd, BxHxNxd, or a stem "
        "(1GF, 4GF, 18GF, 36GF), with :IMAGES",
    )
    parser.add_argument("--dtype", default="bfloat16", help=", ".join(_DTYPES))
    parser.add_argument("--seconds", type=float, default=300.0, help="in all (%(default)g)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: tuned.json in fastvit's cache folder"
    )
    parser.add_argument("--arch", help="with --predict; default: this GPU's")
    parser.add_argument(
        "--predict",
        action="store_true",
        help="compile for --arch and print predicted times and spills; no GPU, nothing is written",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The exit status: 0, or 2 if there is nothing to run on or an argument cannot be."""
    try:
        return _run(arguments)
    except _Misuse as error:
        print(f"fastvit tune: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    ops = [_known(op, _OPS, "--op") for op in arguments.op or ()] or list(_OPS[:3])
    dtype = _known(arguments.dtype, _DTYPES, "--dtype")
    if not 0 < arguments.seconds < math.inf:
        raise _Misuse(f"--seconds: expected a positive number, got {arguments.seconds:g}")
    target = _target(arguments, dtype)
    posed = _problems(arguments.shapes, ops, dtype, target.arch)
    if arguments.predict:
        return _predict(posed, target, arguments.seconds)
    from fastvit.ops import tuned

    return search(posed, target, arguments.seconds, arguments.out or tuned.own_file())


def _known(name: str, names: Sequence[str], option: str) -> str:
    if name in names:
        return name
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}"
    raise _Misuse(f"{option}: unknown {name!r}; {hint}")


def _problems(
    shapes: Sequence[str] | None, ops: Sequence[str], dtype: str, arch: str
) -> list[Posed]:
    from fastvit.tuning import problems

    arithmetic = problems.DTYPES[dtype]
    if not shapes:
        return problems.default(ops, arithmetic, arch)
    try:
        return problems.asked(shapes, ops, arithmetic, arch)
    except ValueError as error:
        raise _Misuse(str(error)) from error


def _target(arguments: argparse.Namespace, dtype: str) -> Target:
    """What is tuned for.

    Raises:
        _Misuse: there is no GPU, or no Triton.
    """
    try:
        from fastvit.kernels import configs
    except ModuleNotFoundError as error:
        raise _Misuse(f"{error}; a clone as current folder hides the installed package") from error
    if arguments.arch is not None:
        _known(arguments.arch, configs.ARCHITECTURES, "--arch")
        if not arguments.predict:
            raise _Misuse("--arch goes with --predict: only this machine's GPU can be measured")
    import torch

    try:
        from fastvit.tuning.session import Target, target
    except ImportError as error:
        raise _Misuse(f"the kernels need Triton, which cannot be imported: {error}") from error

    precision = {"float32": "ieee"}.get(dtype, dtype)
    if arguments.arch is not None:
        number = int(arguments.arch.removeprefix("sm_"))
        return Target(arguments.arch, number, torch.device("cpu"), precision)
    if not torch.cuda.is_available():
        raise _Misuse(
            "PyTorch sees no CUDA device to measure on; `--predict --arch sm_90` compiles and "
            "predicts without one"
        )
    try:
        return target(torch.device("cuda", torch.cuda.current_device()), precision)
    except ValueError as error:
        raise _Misuse(str(error)) from error


def _predict(posed: Sequence[Posed], target: Target, seconds: float) -> int:
    from fastvit.tuning import report, session

    print(f"{target.arch}: times are predicted, not measured, and nothing is written")
    try:
        # No process measures: each core may compile.
        processes = session.workers() + 1
        for found in session.predict(posed, target, seconds, processes=processes):
            print(report.prediction(found), flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    return 0


def search(
    posed: Sequence[Posed],
    target: Target,
    seconds: float,
    file: Path,
    variants: int | None = None,
) -> int:
    """Tune, print, and keep what is found in a file after each problem.

    Raises:
        _Misuse: the file is there and is no table, or cannot be written.
    """
    from fastvit.tuning import report, session

    _check(file)
    outcomes = []
    print(f"{len(posed)} problems, {target.gpu} ({target.arch}), {seconds:g} s, into {file}")
    late: list[Posed] = []
    found = session.run(
        posed, target, seconds, _warn, processes=session.workers(), variants=variants,
        late=late.append,
    )  # fmt: skip
    try:
        for outcome in found:
            outcomes.append(outcome)
            print(f"[{len(outcomes)}/{len(posed)}] {report.line(outcome)}", flush=True)
            session.keep(file, target, outcomes)
    except KeyboardInterrupt:
        _warn(f"interrupted; what was measured is kept in {file}")
    except (OSError, ValueError) as error:
        _fail(file, error)
    finally:
        found.close()
    if late:
        print(f"not reached in {seconds:g} s: {len(late)} problems, {late[0].name} the first")
    print(report.table(outcomes))
    return 0


def _check(file: Path) -> None:
    """That it can be written, and is a table if it is there."""
    from fastvit.kernels import tuned as tables

    try:
        tables.read_all(file)
    except (OSError, ValueError) as error:
        raise _Misuse(
            f"{file} is there, and no table of configurations: {error}; move it away or choose "
            "another by --out"
        ) from error
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _fail(file, error)
    if not os.access(file.parent, os.W_OK):
        _fail(file, PermissionError(f"nothing can be written into {file.parent}"))


def _fail(file: Path, error: Exception) -> NoReturn:
    raise _Misuse(f"{file} cannot be written: {error}") from error


def _warn(words: str) -> None:
    print(words, file=sys.stderr, flush=True)

# SPDX-License-Identifier: Apache-2.0
"""What can be asked of a measurement: the options of ``fastvit bench`` and ``pytest bench/``.

Imports neither torch nor anything of fastvit, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


#: Flags in the order of ``--help``, with what ``add_argument`` takes.
FLAGS: dict[str, dict[str, Any]] = {
    "--report": {
        "metavar": "DIR",
        "help": "write epoch.json, .md, .svg and modules.json, .md into DIR",
    },
    "--modules": {
        "metavar": "LIST",
        "help": "contests of layers by pattern: 'GPSA*','stem*batch 8'; with --rows alone: none",
    },
    "--rows": {
        "metavar": "LIST",
        "help": "rows by name or pattern: ConViT-S,'ViT_C-*',*-18GF",
    },
    "--batch": {
        "type": positive,
        "metavar": "N",
        "help": "images per step. Default on a GPU: the paper's batch per GPU, or as much of it as "
        "fits; on a CPU: 1 from 15 GF up, 2 below",
    },
    "--dtype": {
        "choices": DTYPES,
        "default": "float32",
        "help": "of models and images (%(default)s)",
    },
    "--steps": {
        "type": positive,
        "metavar": "N",
        "help": "steps to time per row, however long they take. Default: 3 on a CPU, 20 on a GPU, "
        "fewer where they are slow",
    },
    "--full": {
        "action": "store_true",
        "help": "add the papers' other columns, as citations",
    },
}


@dataclass(frozen=True)
class Options:
    """What was asked for.

    ``rows`` and ``modules`` are patterns between commas. None: all of them; but ``modules`` None
    beside ``rows`` leaves the contests out, and ``rows`` "" leaves the rows out. ``timed`` False
    is the smoke test: a few rows, once, and contests of one image.
    """

    timed: bool = True
    rows: str | None = None
    modules: str | None = None
    batch: int | None = None
    dtype: str = "float32"
    steps: int | None = None
    report: Path | None = None
    full: bool = False


class BadOption(ValueError):
    """An option that cannot be met; the message names it."""

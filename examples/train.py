# SPDX-License-Identifier: Apache-2.0
"""Train any of fastvit's models, on one processor or many GPUs; a kill costs seconds.

    pip install 'fastvit[train]'
    python examples/train.py --config examples/recipes/convit_tiny_digits.toml
    torchrun --nproc-per-node 2 examples/train.py --parallel fsdp \
        --config examples/recipes/convit_tiny_digits.toml --out runs/two

A run writes ``checkpoint.pt``, ``log.jsonl`` and ``summary.json`` into its folder. Started again,
with the same settings, it goes on from its checkpoint and ends with the same bits as if it had not
been interrupted. Options win over the recipe, the recipe over the defaults in brackets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Python's safe-path mode leaves the script's own folder out.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from training import config as settings
from training.loop import run


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="a recipe: TOML, or JSON")
    settings.add_options(parser)
    options = vars(parser.parse_args(argv))
    recipe = options.pop("config")
    try:
        summary = run(settings.make({**(settings.read(recipe) if recipe else {}), **options}))
    except settings.ConfigError as error:
        raise SystemExit(f"train.py: {error}") from None
    return summary


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""``python bench/gpu``: see ``--help``, or ``make gpu``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# As the package `gpu`: its folder as first entry would make `kernels` and others top-level names.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from gpu.driver import BUDGET, GRACE, Run  # noqa: E402
from gpu.stages import NAMES, STAGES  # noqa: E402

if __name__ == "__main__":
    stages = "\n".join(f"  {stage.name:<12} {stage.what}" for stage in STAGES)
    parser = argparse.ArgumentParser(
        "python bench/gpu",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Check and measure fastvit on this machine's GPU, offline.",
        epilog=f"stages:\n{stages}",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: bench/results/GPU/DATE-COMMIT"
    )
    parser.add_argument(
        "--stage",
        action="append",
        choices=NAMES,
        metavar="NAME",
        help="only these and what they need, or those of gpsa or conv_stem; repeatable",
    )
    parser.add_argument("--dry", action="store_true", help="walk the code on a processor instead")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS",
        help=f"in all ({BUDGET:.0f}, and {GRACE:.0f} more at most)",
    )  # fmt: skip
    options = parser.parse_args()
    sys.exit(Run(options.out, options.stage, dry=options.dry, budget=options.budget).run())

# SPDX-License-Identifier: Apache-2.0
"""The verdicts on kernels that a package may ship, so that others need not check them again."""

from __future__ import annotations

import json
from pathlib import Path


def verified() -> dict[str, str]:
    """What the kernels' own checks found in this process: key, and what differed if anything.

    Raises:
        RuntimeError: this version of fastvit keeps no such record.
    """
    from fastvit.ops import trust

    if not hasattr(trust, "verified_here"):
        raise RuntimeError("fastvit.ops.trust has no verified_here()")
    return trust.verified_here()


def write_verified(out: Path, found: dict[str, str], *, add: bool = False) -> None:
    """Write what passed in all processes of a run: a package trusts every key in this file.

    Args:
        add: keep the keys that an earlier stage wrote.
    """
    path = out / "verified.json"
    whole = {**(_read(path) if add else {}), **found}
    passed = {key: "" for key, finding in whole.items() if not finding}
    path.write_text(json.dumps(passed, indent=1, sort_keys=True) + "\n", "utf-8")


def _read(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}

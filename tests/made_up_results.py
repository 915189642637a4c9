# SPDX-License-Identifier: Apache-2.0
"""Files of results with made-up samples, as the benchmark writes them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvit.benchmark.figures import spread

CONTENDERS = {"library": 2.0, "fastvit": 1.0, "products": 0.5}
MACHINE = {"device": "cpu", "cpu": "Some Processor, 2 cores", "threads": 2, "gpu": None}
VERSIONS = {"fastvit": "0.1.0", "torch": "2.15.0", "timm": "1.0.31"}


def contests(
    seed: int,
    *,
    count: int = 12,
    drift: float = 1.0,
    noise: float = 0.03,
    slowed: Mapping[str, float] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """The content of ``modules.json``.

    Args:
        drift: of the machine, a factor of every time.
        noise: relative deviation of a round, and, once for each contest, of all its contenders.
        slowed: factors of ours by the name of the contest.
        changes: of the file's other fields.
    """
    draw = random.Random(seed)
    found = []
    for i in range(count):
        moment = drift * draw.lognormvariate(0.0, noise)
        name = f"layer {i}"
        seconds = {}
        for contender, size in CONTENDERS.items():
            factor = (slowed or {}).get(name, 1.0) if contender == "fastvit" else 1.0
            median = 1e-3 * (1 + i) * size * moment * factor
            seconds[contender] = [median * draw.lognormvariate(0.0, noise) for _ in range(12)]
        found.append(
            {
                "name": name, "dtype": "float32", "batch": 8, "error": 1e-7, "limit": 1e-6,
                "agrees": True, "seconds": seconds, "peak_bytes": {"fastvit": 1000 * (1 + i)},
            }
        )  # fmt: skip
    content = {
        "contests": found, "versions": VERSIONS, "machine": MACHINE, "commit": f"commit{seed}",
    }  # fmt: skip
    return {**content, **changes}


def stage(
    seed: int, *, commit: str = "abc", slowed: float = 1.0, dry: bool = False
) -> dict[str, Any]:
    """One stage of a run on a GPU."""
    draw = random.Random(seed)
    cases = []
    for batch in (256, 64, 8, 1):
        for mode in ("forward", "forward+backward"):
            contenders = {}
            for name, size in {"fastvit": slowed, "flash": 1.2, "cudnn": 1.5}.items():
                middle = 1e-4 * batch * size
                samples = [middle * draw.lognormvariate(0.0, 0.01) for _ in range(20)]
                found = spread(samples)
                contenders[name] = {
                    "how": "events", **found._asdict(), "samples": samples,
                    "floor": 0.5 * middle, "share": 0.5 * middle / found.median,
                }  # fmt: skip
            shape = {"label": "S", "B": batch, "H": 9, "d": 48, "N": 196, "grid": [14, 14]}
            cases.append({"what": "core", "mode": mode, "shape": shape, "contenders": contenders})
    machine = {
        "gpu": "Some GPU", "cpu": "Some Processor", "threads": 16, "commit": commit,
        "dirty": False, "versions": VERSIONS,
    }  # fmt: skip
    return {
        "status": "ok", "cases": cases, "machine": machine, "dry": dry,
        "date": "2026-01-01T00:00:00+0000",
    }  # fmt: skip


def resources(**changes: Any) -> dict[str, Any]:
    """A table of resources of one kernel."""
    row = {
        "arch": "sm_90", "kernel": "forward_tile", "direction": "forward", "case": "bfloat16 B1",
        "config": "64 x 128", "registers": 128, "shared": 1024, "blocks_per_sm": 4, "warps": 4,
        "predicted_us": 10.0, "bytes": 4096, "hash": "0",
    }  # fmt: skip
    return {"triton": "3.9", "rows": [{**row, **changes}]}


def write(path: Path, content: Any) -> Path:
    """Write a file of results, and the folder around it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")
    return path

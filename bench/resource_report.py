# SPDX-License-Identifier: Apache-2.0
"""The tables of ``bench/resources.py`` for reading."""

from __future__ import annotations

from typing import Any

from kernels.ahead.model import LIMITS
from kernels.configs import ARCHITECTURES

_HEAD = """# What the Triton kernels take

Written by `python bench/resources.py --write` (all versions of Triton: `make resources`), from
kernels that were compiled ahead of time; no GPU was involved. The same with hashes, bytes, flops
and exponentials, for programs: `triton-*.json`. No pair spills, so stack and spill instructions,
which are zero, have no column.

**Times are predicted, not measured.** The model stands at the top of `kernels/ahead/model.py`.

- **case**: dtype (float32 as its arithmetic, tf32 or ieee), batch B, heads H, sides of the grid or
  number of tokens N of plain attention, channels d of a head. The arrow says forward (→) or
  backward (←). Of the stem: sides of what the kernel reads, channels c from its input to its
  output, strides s; uint8 images; train where it keeps sums and their statistics.
- **tiles**: queries x keys of a tile (a sum is a row in several tiles), channels d in pieces,
  stages s of the pipeline; resident where one block does a whole head. Of the stem: positions x
  output channels, input channels d.
- **warps** of a block; **registers** of a thread, of 255; **shared**: shared memory of a block,
  KiB; **tmem**: columns of tensor memory, of 512.
- **blocks**: how many fit on a multiprocessor at once.
- **matrix**: the matrix instructions; "none" is FMA.
- **predicted µs** of the launch, and **floor**: the share of it that reading every input once and
  writing every output once would take at the card's bandwidth. 100 % is bound by memory.

Where versions of Triton differ, a cell has a value for each, in the order {versions}.
"""


def markdown(tables: dict[str, dict[str, dict[str, Any]]]) -> str:
    """One table for each architecture from rows by version of Triton and name."""
    versions = sorted(tables, key=lambda v: tuple(map(int, v.split("."))))
    names = list(dict.fromkeys(name for version in versions for name in tables[version]))
    parts = [_HEAD.replace("{versions}", ", ".join(versions))]
    for arch in ARCHITECTURES:
        limits = LIMITS[arch]
        parts.append(
            f"\n## {arch}\n\nPredictions are for {limits.card}: {limits.bandwidth} TB/s, "
            f"{limits.half} TFLOP/s in half precision, {limits.multiprocessors} multiprocessors at "
            f"{limits.clock} GHz. A block may have {limits.shared_block} KiB of shared memory.\n\n"
        )
        tensor = limits.tensor_columns > 0
        titles = ["kernel", "case", "tiles", "warps", "registers", "shared"]
        titles += [*(["tmem"] if tensor else []), "blocks", "matrix", "predicted µs", "floor"]
        left = 3
        parts.append("| " + " | ".join(titles) + " |\n")
        parts.append("|" + " --- |" * left + " ---: |" * (len(titles) - left) + "\n")
        for name in names:
            rows = [tables[version][name] for version in versions if name in tables[version]]
            if rows[0]["arch"] == arch:
                parts.append("| " + " | ".join(_cells(rows, tensor)) + " |\n")
    return "".join(parts)


def _cells(rows: list[dict[str, Any]], tensor: bool) -> list[str]:
    columns = [
        lambda r: r["kernel"],
        lambda r: ("→ " if r["direction"] == "forward" else "← ") + r["case"],
        lambda r: r["config"],
        lambda r: str(r["warps"]),
        lambda r: str(r["registers"]),
        lambda r: f"{r['shared'] / 1024:.0f}",
        *([lambda r: str(r["tensor_columns"])] if tensor else []),
        lambda r: str(r["blocks_per_sm"]),
        lambda r: r["instruction"],
        lambda r: f"{r['predicted_us']:g}",
        lambda r: f"{r['predicted_floor_us'] / r['predicted_us']:.0%}",
    ]
    cells = []
    for column in columns:
        values = [column(row) for row in rows]
        cells.append(values[0] if len(set(values)) == 1 else ", ".join(values))
    return cells

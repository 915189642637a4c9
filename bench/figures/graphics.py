# SPDX-License-Identifier: Apache-2.0
"""Blocks from committed runs of ``make gpu``, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

from gpu.cells import NOTHING, markdown, median, share, spread
from gpu.record import MISSED

from figures import gpu, load, models
from figures.pairs import OPS, Pair, pairs
from figures.sources import Source, gpu_runs

NOT_MEASURED = "Not measured on a GPU."


def tables(root: Path, base: Path) -> str:
    """Of the newest run of each GPU, for a document in the folder ``base``."""
    return "\n\n".join(_tables(run, base) for run in gpu_runs(root)) or NOT_MEASURED


def state(root: Path) -> str:
    """One sentence."""
    names = [gpu.device_name(run.data) for run in gpu_runs(root)]
    return f"Measured on {' and '.join(names)}." if names else NOT_MEASURED


def _tables(run: Source, base: Path) -> str:
    load.check_records(run.data)
    parts = [f"### {gpu.device_name(run.data)}", _head(run, base)]
    ceilings = run.data.get("ceilings", {}).get("ceilings")
    if ceilings:
        rates = ", ".join(
            f"{rate / 1e12:,.0f} TFLOP/s {n}" for n, rate in ceilings["rates"].items()
        )
        parts.append(f"Ceilings: {ceilings['bandwidth'] / 1e12:.2f} TB/s copied; {rates}.")
    found = pairs(run.data)
    for op, title in OPS.items():
        rows = [_row(pair) for pair in found if pair.problem.op == op]
        heads = [title, "dtype", "fastvit µs (20–80 %)", "of floor", "strongest other way", "µs",
                 "÷ fastvit"]  # fmt: skip
        parts.append(markdown(heads, rows) or f"{title}: not measured.")
    parts.append(_ratios(run))
    return "\n\n".join(parts)


def _head(run: Source, base: Path) -> str:
    line = gpu.head_line(run.data)
    source = f"*{line} · `make gpu` · samples: [{run.path.name}]({run.link(base)})*"
    return source + run.stale() + _failures(run)


def _failures(run: Source) -> str:
    """A paragraph of the stages that failed, whose figures stand below all the same; or nothing."""
    said = [
        f"{stage} ({(record.get('problems') or ['no reason'])[0].splitlines()[0][:200]})"
        for stage, record in run.data.items()
        if record.get("status") not in ("ok", MISSED)
    ]
    return f"\n\n**Stages that failed: {'; '.join(said)}.**" if said else ""


def _row(pair: Pair) -> list[str]:
    ratio = NOTHING if pair.ratio is None else f"{pair.ratio:.2f}"
    return [
        pair.problem.name, pair.problem.dtype, spread(dict(pair.ours)), share(dict(pair.ours)),
        pair.peer or NOTHING, median(dict(pair.theirs) if pair.theirs else None), ratio,
    ]  # fmt: skip


def _ratios(run: Source) -> str:
    rows = []
    for pair in models.PAIRS:
        for mode in ("inference", "training"):
            ours = models.ratios(run.data, pair, ours=True, mode=mode)
            library = models.ratios(run.data, pair, ours=False, mode=mode)
            for size in dict.fromkeys((*ours, *library)):
                cells = [
                    f"{found[size]:.2f}" if size in found else NOTHING for found in (library, ours)
                ]
                rows.append([f"{pair} {size}", mode, *cells])
    heads = ["bfloat16, 224 x 224, largest batch", "mode", "library", "fastvit"]
    return markdown(heads, rows) or "Whole models: not measured."

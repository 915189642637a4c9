# SPDX-License-Identifier: Apache-2.0
"""summary.md, from whatever results there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gpu import moonshots, summary_attention, summary_checks, summary_images, summary_models
from gpu.cells import Records, markdown
from gpu.stages import STAGES

DRY = "dry run on a processor: not a measurement"

_HOW_TO_READ = """\
Times are medians, with the 20th and 80th percentile, of rounds in which all contenders of a
contest take turns. Inputs rotate through more memory than the L2 cache holds; *warm* is the same
call over one set of inputs again and again, for small batches, whose data the call before may have
left in the cache. Whole models take two batches in turns, their CUDA graphs one; their weights may
stay in the cache. *of floor*: the least time that the measured ceilings allow, over the time; it
does not apply to warm times. Floors are of bytes and products alone: what takes a few microseconds
is bounded by its launches, whose cost stands under the ceilings. *÷ fastvit*: the other's time over
fastvit's in the same contest; above 1, fastvit is faster. *host*: what the processor needs to issue
a call of fastvit. *kept*: memory held for the backward; *peak*: of a training step. A contender
that computed something else, ran out of memory or refused is –; the JSON has the reason."""


def write(out: Path, records: Records, picture: str, *, dry: bool) -> None:
    """The tables whose stages left results, each under its own heading.

    Args:
        picture: the line that shows it, or says why there is none.
    """
    note = f"*{DRY}*\n\n" if dry else ""
    parts = [f"# fastvit on a GPU\n\n{_head(records)}", f"{note}{moonshots.line(records)}"]
    parts.append(f"{note}{stage_table(records)}")
    parts.append(_HOW_TO_READ)
    for title, make in _TABLES.items():
        table = make(records)
        if table:
            parts.append(f"## {title}\n\n{note}{table}")
    parts.append(f"{note}{picture}")
    lacking = [
        f"- {name} did without the results of {other}: {why}"
        for name, record in records.items()
        for other, why in record.get("without", {}).items()
    ]
    if lacking:
        parts.append("## Results that were not used\n\n" + "\n".join(lacking))
    missed = [f"- {n}: {', '.join(r['missed'])}" for n, r in records.items() if r.get("missed")]
    if missed:
        parts.append("## Not reached in time, or left out\n\n" + "\n".join(missed))
    (out / "summary.md").write_text("\n\n".join(parts) + "\n", "utf-8")


def stage_table(records: Records) -> str:
    """Every stage with its status, seconds, and the first line of what went wrong."""
    rows = []
    for stage in STAGES:
        record = records.get(stage.name, {})
        problems = record.get("problems", [])
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        rows.append(
            [
                stage.name,
                record.get("status", "not run"),
                f"{record.get('seconds', 0):.0f}",
                str(len(record.get("missed", []))),
                (problems[0].splitlines()[0][:300] + more) if problems else "",
            ]
        )
    return markdown(["stage", "status", "s", "not reached", "first problem"], rows)


def _head(records: Records) -> str:
    for record in records.values():
        machine = record.get("machine")
        if machine:
            versions = ", ".join(f"{n} {v}" for n, v in machine["versions"].items())
            commit = machine["commit"] or "none"
            changed = ", with changes" if machine["dirty"] else ""
            where = machine["gpu"] or machine["cpu"]
            date = record["date"]
            return f"{where} · {versions} · commit {commit}{changed} · {date}"
    return "No stage came as far as naming the machine."


_TABLES: dict[str, Callable[[Records], str]] = {
    "Targets": moonshots.table,
    "Ceilings": summary_checks.ceilings,
    "Attention and its position term, against plain attention": summary_attention.core,
    "The same, against FlexAttention": summary_attention.compiled_core,
    "GPSA layer, against timm's": summary_attention.module,
    "GPSA layer under torch.compile": summary_attention.compiled_module,
    "Models": summary_models.models,
    "Minutes per ImageNet epoch, bfloat16": summary_models.epoch,
    "Patch embedding with class token and positions": summary_images.embedding,
    "Patch embedding: compiled, the convolution alone, memory": summary_images.embedding_more,
    "Convolutional stem": summary_images.stem,
    "Convolutional stem: compiled, and memory": summary_images.stem_more,
    "Agreement with float64": summary_checks.agreement("agreement"),
    "Agreement with float64 of the patch embedding": summary_checks.agreement(
        "patch_embed", "agreement"
    ),
    "Agreement with float64 of the stem": summary_checks.agreement("stem", "agreement"),
    "CUDA graphs, torch.compile, streams, large buffers": summary_checks.outcomes("graphs"),
    "compute-sanitizer": summary_checks.outcomes("sanitizer"),
    "Clocks": summary_checks.clocks,
}

# SPDX-License-Identifier: Apache-2.0
"""Pictures of one run of ``make gpu``, from its records."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastvit.benchmark.pictures import epoch, ratios, roofline, scaling
from fastvit.benchmark.pictures.theme import Draw, NothingToDraw, Theme
from figures import models
from figures.cited import paper_series, published_series
from figures.pairs import OPS, Pair, Records, pairs

#: Problems of a roofline, whose labels then have room.
_MOST = 8


def head_line(records: Records) -> str:
    """Machine, versions, commit and date, of the first stage that names them."""
    for record in records.values():
        machine = record.get("machine")
        if machine:
            versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
            commit = machine.get("commit") or "none"
            changed = ", with changes" if machine.get("dirty") else ""
            date = str(record.get("date", ""))[:10]
            where = device_name(records)
            return f"{where} · {versions} · commit {commit}{changed} · {date}"
    return "No stage came as far as naming the machine."


def device_name(records: Records) -> str:
    """The GPU, or in a dry run the processor."""
    for record in records.values():
        machine = record.get("machine")
        if machine:
            return machine.get("gpu") or machine.get("cpu") or "unknown"
    return "unknown"


def short(device: str) -> str:
    """The same as it stands beside a bar."""
    return re.sub(r"\(R\)|^NVIDIA | Processor|, \d+ cores?$", "", device)


def pictures(
    records: Records, epoch_rows: Sequence[dict[str, Any]], *, dry: bool
) -> dict[str, Draw]:
    """What draws each picture, by name of file without ending.

    Drawing raises :class:`NothingToDraw` with a sentence where the run has no data for one.
    """
    line = head_line(records)
    found: dict[str, Draw] = {}
    timed = pairs(records)
    for op, title in OPS.items():
        found[f"roofline_{op}"] = partial(_roofline, title, records, _chosen(timed, op), line, dry)
    found["ratios"] = partial(_ratios, records, line, dry)
    found["scaling"] = partial(_scaling, records, timed, line, dry)
    found["epoch"] = partial(_epoch, epoch_rows, line, dry)
    return found


def data_of(draw: Draw) -> str:
    """What a picture depends on, to know whether to draw it again."""
    return repr(getattr(draw, "args", draw))


def _chosen(timed: Sequence[Pair], op: str) -> list[Pair]:
    """bfloat16, the largest batch of each problem; of training the first problems only."""
    best: dict[tuple[Any, ...], Pair] = {}
    for pair in timed:
        problem = pair.problem
        if problem.op != op or problem.dtype != "bfloat16":
            continue
        # Of five sizes the two that the papers print all figures of.
        if op.startswith("gpsa") and problem.kind[0] not in ("S", "B"):
            continue
        key = (problem.mode, problem.kind)
        if key not in best or problem.batch > best[key].problem.batch:
            best[key] = pair
    forward = [p for p in best.values() if p.problem.mode == "forward"]
    others = [p for p in best.values() if p.problem.mode != "forward"]
    kept = forward[: _MOST - min(len(others), 2)]
    return kept + others[: _MOST - len(kept)]


def _roofline(
    title: str, records: Records, chosen: Sequence[Pair], line: str, dry: bool, theme: Theme
) -> Any:
    ceilings = records.get("ceilings", {}).get("ceilings") or {}
    roof = None
    if ceilings.get("rates", {}).get("bfloat16"):
        rates = {"bfloat16": ceilings["rates"]["bfloat16"]}
        roof = roofline.Roof(ceilings["bandwidth"], rates)
    points = [
        roofline.Point(
            p.problem.name,
            p.problem.work.bytes,
            p.problem.work.flops,
            p.ours["median"],
            p.peer,
            p.theirs["median"] if p.theirs else None,
        )
        for p in chosen
    ]
    lines = [line, "bfloat16; medians; ceilings measured in the same run"]
    return roofline.draw(title, points, roof, lines, theme, dry=dry)


def _ratios(records: Records, line: str, dry: bool, theme: Theme) -> Any:
    where = short(device_name(records))
    measured = {
        (pair, ours): models.ratios(records, pair, ours=ours)
        for pair in models.PAIRS
        for ours in (False, True)
    }
    if not any(measured.values()):
        raise NothingToDraw("no pair of models was timed")
    panels = []
    for pair, library in ((models.CONVIT, "timm"), (models.VIT_C, "library")):
        cited = [paper_series(pair)] + (published_series() if pair == models.CONVIT else [])
        here = [
            ratios.Series("library", f"{library}, {where}", measured[pair, False]),
            ratios.Series("fastvit", f"fastvit, {where}", measured[pair, True]),
        ]
        groups = paper_groups(pair)
        extra = [s for s in measured[pair, True] if s not in groups]
        panels.append(ratios.Panel(f"{pair}, inference", [*groups, *extra], [*cited, *here]))
    lines = [
        line,
        "Measured: bfloat16, 224 x 224, the largest batch, eager or CUDA graph, both models of the "
        "same width, depth and heads; fastvit over the fastest of the other family.",
    ]
    return ratios.draw(panels, lines, theme, dry=dry)


def paper_groups(pair: str) -> list[str]:
    """The sizes of a pair, in the order of the papers."""
    if pair == models.CONVIT:
        return ["tiny", "small", "small+", "base", "base+"]
    return ["1GF", "4GF", "18GF", "36GF"]


def _scaling(records: Records, timed: Sequence[Pair], line: str, dry: bool, theme: Theme) -> Any:
    core: dict[int, Pair] = {}
    for pair in timed:
        problem = pair.problem
        if (problem.op, problem.mode, problem.dtype) != ("gpsa_core", "forward", "bfloat16"):
            continue
        label, N = problem.kind
        if label == "S" and (N not in core or problem.batch > core[N].problem.batch):
            core[N] = pair
    ours = [(N, p.ours["median"] / p.problem.batch) for N, p in core.items()]
    theirs = [(N, p.theirs["median"] / p.problem.batch) for N, p in core.items() if p.theirs]
    sizes = [case["size"] for case in models.cases(records, models.CONVIT)]
    size = "small" if "small" in sizes or not sizes else sizes[0]
    panels = [
        scaling.Panel(
            "GPSA core of ConViT-S, forward",
            "tokens N",
            [scaling.Line("fastvit", True, ours), scaling.Line("fastest other way", False, theirs)],
        ),
        scaling.Panel(f"ConViT-{size}, inference", "batch", _lines(records, "batch", size)),
        scaling.Panel(
            f"ConViT-{size}, inference", "pixels of a side", _lines(records, "image_size", size)
        ),
    ]
    lines = [line, "bfloat16; medians; largest batch of each size on the left and on the right"]
    return scaling.draw(panels, lines, theme, dry=dry)


def _lines(records: Records, vary: str, size: str) -> list[scaling.Line]:
    def timed(name: str, *, ours: bool, family: str) -> scaling.Line:
        def chosen(contender: str) -> bool:
            mine = contender.startswith("fastvit")
            return family in contender.split() and (mine if ours else family == "deit" or not mine)

        return scaling.Line(name, ours, models.times(records, vary, chosen, size))

    return [
        timed("fastvit", ours=True, family="convit"),
        timed("timm", ours=False, family="convit"),
        timed("fastest DeiT", ours=False, family="deit"),
    ]


def _epoch(rows: Sequence[dict[str, Any]], line: str, dry: bool, theme: Theme) -> Any:
    return epoch.draw([epoch.from_row(row) for row in rows], [line], theme, dry=dry)

# SPDX-License-Identifier: Apache-2.0
"""summary.md, from whatever results there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gpu import moonshots, summary_models
from gpu.cells import (
    NOTHING,
    Records,
    best_of,
    cases_of,
    fastest_of,
    markdown,
    median,
    ratio,
    share,
    spread,
    us,
)
from gpu.stages import STAGES

DRY = "dry run on a processor: not a measurement"

_CHAINS = ("timm", "timm channels_last", "linear")


def write(out: Path, records: Records, picture: str, *, dry: bool) -> None:
    """The tables whose stages left results, each under its own heading.

    Args:
        picture: the line that shows it, or says why there is none.
    """
    note = f"*{DRY}*\n\n" if dry else ""
    parts = [f"# fastvit on a GPU\n\n{_head(records)}", f"{note}{moonshots.line(records)}"]
    parts.append(f"{note}{stage_table(records)}")
    for title, make in _TABLES.items():
        table = make(records)
        if table:
            parts.append(f"## {title}\n\n{note}{table}")
    parts.append(f"{note}{picture}")
    missed = [f"- {n}: {', '.join(r['missed'])}" for n, r in records.items() if r.get("missed")]
    if missed:
        parts.append("## Not reached in time\n\n" + "\n".join(missed))
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


def _ceilings(records: Records) -> str:
    scale = {
        "B/s": (1e-12, "TB/s"),
        "FLOP/s": (1e-12, "TFLOP/s"),
        "1/s": (1e-12, "T/s"),
        "s": (1e6, "µs"),
    }
    rows = []
    for case in cases_of(records, "ceilings"):
        factor, unit = scale[case["unit"]]
        rows.append([case["name"], f"{case['value'] * factor:.3g} {unit}"])
    return markdown(["what", "rate"], rows)


def _core(records: Records) -> str:
    flex = _others(records, "core")
    rows = []
    for case in cases_of(records, "kernels", "core"):
        ours, name, peer = best_of(case, ("flash", "efficient", "cudnn", "math"))
        rows.append(
            [
                _shape(case), case["mode"], spread(ours), share(ours),
                name, median(peer), share(peer), ratio(peer, ours),
                median(flex.get((_shape(case), case["mode"], "flex"))), us(case["host"]),
            ]
        )  # fmt: skip
    heads = ["shape", "mode", "fastvit µs (20–80 %)", "of floor", "fastest SDPA", "µs", "of floor",
             "SDPA ÷ fastvit", "flex µs", "host µs"]  # fmt: skip
    return markdown(heads, rows)


def _module(records: Records) -> str:
    others = _others(records, "module")
    memory = {_shape(c): c["memory"] for c in cases_of(records, "kernels", "memory")}
    rows = []
    for case in cases_of(records, "kernels", "module"):
        shape, mode, found = _shape(case), case["mode"], case["contenders"]
        ours, timm = found["fastvit"], found["timm eager"]
        row = [shape, mode, spread(ours), share(ours), median(timm), ratio(timm, ours)]
        for name in ("timm compiled", "timm compiled, max-autotune-no-cudagraphs"):
            peer = others.get((shape, mode, name))
            row += [median(peer), ratio(peer, ours)]
        row += [us(case["host"]), _kept(memory.get(shape))]
        rows.append(row)
    heads = ["shape", "mode", "fastvit µs (20–80 %)", "of floor", "timm eager µs", "÷ fastvit",
             "timm compiled µs", "÷ fastvit", "max-autotune µs", "÷ fastvit", "host µs",
             "kept MB, fastvit / timm"]  # fmt: skip
    return markdown(heads, rows)


def _peers(records: Records) -> str:
    names = ("flash", "efficient", "cudnn", "math")
    rows = [
        [_shape(case), case["mode"], *(median(case["contenders"].get(n)) for n in names)]
        for case in cases_of(records, "peers", "core")
        if "flash" in case["contenders"]
    ]
    return markdown(["shape", "mode", *(f"{n} µs" for n in names)], rows)


def _embedding(records: Records) -> str:
    compiled = {_problem(c): c["contenders"] for c in cases_of(records, "patch_embed", "compiled")}
    rows = []
    for case in cases_of(records, "patch_embed", "eager"):
        found, (ours, name, peer) = case["contenders"], best_of(case, _CHAINS)
        portable, others = found.get("fastvit portable"), compiled.get(_problem(case), {})
        conv = fastest_of(found, ("conv alone", "conv alone channels_last"))
        row = [*_problem(case), spread(ours), share(ours), median(portable), share(portable)]
        row += [name, median(peer), ratio(peer, ours), ratio(found.get("timm"), ours)]
        for other in ("linear compiled", "timm compiled"):
            # In turns with ours of that contest.
            row += [median(others.get(other)), ratio(others.get(other), others.get("fastvit", {}))]
        row += [median(found.get(conv)), us(case["host"]) if "host" in case else NOTHING]
        rows.append(row)
    heads = ["shape", "dtype", "pixels", "mode", "fastvit µs (20–80 %)", "of floor",
             "mma.sync µs", "of floor", "fastest eager", "µs", "÷ fastvit", "timm ÷ fastvit",
             "linear compiled µs", "÷ fastvit", "timm compiled µs", "÷ fastvit",
             "convolution alone µs", "host µs"]  # fmt: skip
    return markdown(heads, rows)


def _stem(records: Records) -> str:
    others = {
        (_stem_name(case), case["mode"], what): case["contenders"]
        for what in _COMPILED
        for case in cases_of(records, "stem", what)
    }
    rows = []
    for case in cases_of(records, "stem", "eager"):
        ours, name, peer = best_of(case, ("eager", "eager channels_last"))
        row = [_stem_name(case), case["mode"], spread(ours), share(ours)]
        row += [name, median(peer), ratio(peer, ours)]
        for what in _COMPILED:
            # In turns with ours of that contest.
            found = others.get((_stem_name(case), case["mode"], what), {})
            other = found.get("compiled channels_last")
            row += [median(other), ratio(other, found.get("fastvit", {}))]
        memory = case.get("memory", {})
        kept = [memory.get(n, {}).get("kept") for n in ("fastvit", "eager channels_last")]
        row.append(" / ".join(f"{k / 1e6:,.0f}" if k is not None else NOTHING for k in kept))
        row.append(us(case["host"]) if "host" in case else NOTHING)
        rows.append(row)
    heads = ["stem", "mode", "fastvit µs (20–80 %)", "of floor", "fastest eager", "µs", "÷ fastvit",
             "compiled µs", "÷ fastvit", "max-autotune µs", "÷ fastvit",
             "kept MB, fastvit / channels_last", "host µs"]  # fmt: skip
    return markdown(heads, rows)


_COMPILED = ("compiled", "max-autotune-no-cudagraphs")


def _stem_name(case: dict[str, Any]) -> str:
    shape = case["shape"]
    height, width = shape["size"]
    return f"{shape['label']} {height}x{width} B={shape['B']}"


def _problem(case: dict[str, Any]) -> tuple[str, str, str, str]:
    shape = case["shape"]
    height, width = shape["size"]
    name = f"p={shape['patch']} {height}x{width} D={shape['D']} B={shape['B']}"
    return name, case["dtype"], case["pixels"], case["mode"]


def _agreement(stage: str, what: str | None = None) -> Callable[[Records], str]:
    return lambda records: _comparisons(cases_of(records, stage, what))


def _comparisons(cases: Iterable[dict[str, Any]]) -> str:
    rows = []
    for case in cases:
        worst = max(
            case.get("tensors", []), key=lambda t: t["error"] / (t["limit"] or 1.0), default=None
        )
        rows.append(
            [
                case["group"], case["layout"], case["dtype"], "yes" if case["ok"] else "NO",
                case.get("error") or _worst(worst), *([_ran(case)] if "what" in case else []),
            ]
        )  # fmt: skip
    heads = ["problem", "layout", "dtype", "agrees", "nearest to its limit, or what went wrong"]
    return markdown(heads + (["kernels"] if rows and len(rows[0]) > len(heads) else []), rows)


def _ran(case: dict[str, Any]) -> str:
    """Our kernels that the profiler saw, without their parameters."""
    names = case.get("ran", [])
    return names if isinstance(names, str) else ", ".join(n.split("<")[0] for n in names)


def _worst(tensor: dict[str, Any] | None) -> str:
    return f"{tensor['name']}: {tensor['error']:.1e} of {tensor['limit']:.1e}" if tensor else ""


def _outcomes(stage: str) -> Callable[[Records], str]:
    def make(records: Records) -> str:
        rows = [[case["name"], case["outcome"]] for case in cases_of(records, stage)]
        return markdown(["check", "outcome"], rows)

    return make


_TABLES: dict[str, Callable[[Records], str]] = {
    "Targets": moonshots.table,
    "Ceilings": _ceilings,
    "Attention and its position term, against plain attention": _core,
    "GPSA layer, against timm's": _module,
    "Plain attention of PyTorch, by backend": _peers,
    "Models": summary_models.models,
    "Minutes per ImageNet epoch, bfloat16": summary_models.epoch,
    "Patch embedding with class token and positions": _embedding,
    "Convolutional stem": _stem,
    "Agreement with float64": _agreement("agreement"),
    "Agreement with float64 of the patch embedding": _agreement("patch_embed", "agreement"),
    "Agreement with float64 of the stem": _agreement("stem", "agreement"),
    "CUDA graphs, torch.compile, streams, large buffers": _outcomes("graphs"),
    "compute-sanitizer": _outcomes("sanitizer"),
}


def _others(records: Records, what: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Times of the stage peers, whose process was another, by shape, mode and name."""
    return {
        (_shape(case), case["mode"], name): times
        for case in cases_of(records, "peers", what)
        for name, times in case["contenders"].items()
    }


def _shape(case: dict[str, Any]) -> str:
    shape = case["shape"]
    return f"{shape['label']} {shape['H']}x{shape['d']} N={shape['N']} B={shape['B']}"


def _kept(memory: dict[str, dict[str, Any]] | None) -> str:
    if not memory:
        return NOTHING
    kept = [memory[n].get("kept") for n in ("fastvit", "timm eager")]
    return " / ".join(f"{k / 1e6:,.0f}" if k is not None else NOTHING for k in kept)

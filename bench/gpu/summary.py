# SPDX-License-Identifier: Apache-2.0
"""summary.md, from whatever results there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gpu.stages import STAGES

DRY = "dry run on a processor: not a measurement"

Records = dict[str, dict[str, Any]]
_NOTHING = "–"


def write(out: Path, records: Records, picture: str, *, dry: bool) -> None:
    """The tables whose stages left results, each under its own heading.

    Args:
        picture: the line that shows it, or says why there is none.
    """
    note = f"*{DRY}*\n\n" if dry else ""
    parts = [f"# fastvit on a GPU\n\n{_head(records)}", f"{note}{stage_table(records)}"]
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
    return _markdown(["stage", "status", "s", "not reached", "first problem"], rows)


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
    for case in _cases(records, "ceilings"):
        factor, unit = scale[case["unit"]]
        rows.append([case["name"], f"{case['value'] * factor:.3g} {unit}"])
    return _markdown(["what", "rate"], rows)


def _core(records: Records) -> str:
    flex = _others(records, "core")
    rows = []
    for case in _cases(records, "kernels", "core"):
        ours, name, peer = _best(case, ("flash", "efficient", "cudnn", "math"))
        rows.append(
            [
                _shape(case), case["mode"], _spread(ours), _share(ours),
                name, _time(peer), _share(peer), _ratio(peer, ours),
                _time(flex.get((_shape(case), case["mode"], "flex"))), _us(case["host"]),
            ]
        )  # fmt: skip
    heads = ["shape", "mode", "fastvit µs (20–80 %)", "of floor", "fastest SDPA", "µs", "of floor",
             "SDPA ÷ fastvit", "flex µs", "host µs"]  # fmt: skip
    return _markdown(heads, rows)


def _module(records: Records) -> str:
    others = _others(records, "module")
    memory = {_shape(c): c["memory"] for c in _cases(records, "kernels", "memory")}
    rows = []
    for case in _cases(records, "kernels", "module"):
        shape, mode, found = _shape(case), case["mode"], case["contenders"]
        ours, timm = found["fastvit"], found["timm eager"]
        row = [shape, mode, _spread(ours), _share(ours), _time(timm), _ratio(timm, ours)]
        for name in ("timm compiled", "timm compiled, max-autotune-no-cudagraphs"):
            peer = others.get((shape, mode, name))
            row += [_time(peer), _ratio(peer, ours)]
        row += [_us(case["host"]), _kept(memory.get(shape))]
        rows.append(row)
    heads = ["shape", "mode", "fastvit µs (20–80 %)", "of floor", "timm eager µs", "÷ fastvit",
             "timm compiled µs", "÷ fastvit", "max-autotune µs", "÷ fastvit", "host µs",
             "kept MB, fastvit / timm"]  # fmt: skip
    return _markdown(heads, rows)


def _peers(records: Records) -> str:
    names = ("flash", "efficient", "cudnn", "math")
    rows = [
        [_shape(case), case["mode"], *(_time(case["contenders"].get(n)) for n in names)]
        for case in _cases(records, "peers", "core")
        if "flash" in case["contenders"]
    ]
    return _markdown(["shape", "mode", *(f"{n} µs" for n in names)], rows)


def _models(records: Records) -> str:
    rows = []
    for case in _cases(records, "models"):
        rate = {n: t.get("images_per_s") for n, t in case["contenders"].items()}

        def over(a: str, b: str, rate: dict[str, Any] = rate) -> str:
            return f"{rate[a] / rate[b]:.2f}" if rate.get(a) and rate.get(b) else _NOTHING

        rows.append(
            [
                case["size"], str(case["batch"]), case["mode"],
                *(f"{rate[n]:,.0f}" if rate[n] else case["contenders"][n]["error"][:40] for n in
                  ("timm convit", "fastvit convit", "timm deit", "fastvit deit")),
                over("fastvit convit", "timm convit"), over("timm convit", "timm deit"),
                over("fastvit convit", "timm deit"), over("fastvit convit", "fastvit deit"),
            ]
        )  # fmt: skip
    heads = ["size", "batch", "mode", "timm ConViT images/s", "fastvit ConViT", "timm DeiT",
             "fastvit DeiT", "fastvit ÷ timm", "timm ConViT ÷ DeiT",
             "fastvit ConViT ÷ timm DeiT", "÷ fastvit DeiT"]  # fmt: skip
    return _markdown(heads, rows)


def _agreement(records: Records) -> str:
    rows = []
    for case in _cases(records, "agreement"):
        worst = max(
            case.get("tensors", []), key=lambda t: t["error"] / (t["limit"] or 1.0), default=None
        )
        rows.append(
            [
                case["group"], case["layout"], case["dtype"], "yes" if case["ok"] else "NO",
                case.get("error") or _worst(worst),
            ]
        )  # fmt: skip
    heads = ["problem", "layout", "dtype", "agrees", "nearest to its limit, or what went wrong"]
    return _markdown(heads, rows)


def _worst(tensor: dict[str, Any] | None) -> str:
    return f"{tensor['name']}: {tensor['error']:.1e} of {tensor['limit']:.1e}" if tensor else ""


def _outcomes(stage: str) -> Callable[[Records], str]:
    def make(records: Records) -> str:
        rows = [[case["name"], case["outcome"]] for case in _cases(records, stage)]
        return _markdown(["check", "outcome"], rows)

    return make


_TABLES: dict[str, Callable[[Records], str]] = {
    "Ceilings": _ceilings,
    "Attention and its position term, against plain attention": _core,
    "GPSA layer, against timm's": _module,
    "Plain attention of PyTorch, by backend": _peers,
    "Models, bfloat16": _models,
    "Agreement with float64": _agreement,
    "CUDA graphs, torch.compile, streams, large buffers": _outcomes("graphs"),
    "compute-sanitizer": _outcomes("sanitizer"),
}


def _cases(records: Records, stage: str, what: str | None = None) -> list[dict[str, Any]]:
    found = records.get(stage, {}).get("cases", [])
    return [case for case in found if what in (None, case.get("what"))]


def _others(records: Records, what: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Times of the stage peers, whose process was another, by shape, mode and name."""
    return {
        (_shape(case), case["mode"], name): times
        for case in _cases(records, "peers", what)
        for name, times in case["contenders"].items()
    }


def _best(
    case: dict[str, Any], names: Iterable[str]
) -> tuple[dict[str, Any], str, dict[str, Any] | None]:
    """Ours, and name and times of the fastest of the others."""
    found = case["contenders"]
    timed = [n for n in names if "median" in found.get(n, {})]
    name = min(timed, key=lambda n: found[n]["median"], default=_NOTHING)
    return found["fastvit"], name, found.get(name)


def _shape(case: dict[str, Any]) -> str:
    shape = case["shape"]
    return f"{shape['label']} {shape['H']}x{shape['d']} N={shape['N']} B={shape['B']}"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}"


def _time(times: dict[str, Any] | None) -> str:
    return _us(times["median"]) if times and "median" in times else _NOTHING


def _spread(times: dict[str, Any]) -> str:
    if "median" not in times:
        return times["error"][:60]
    return f"{_us(times['median'])} ({_us(times['q20'])}–{_us(times['q80'])})"


def _share(times: dict[str, Any] | None) -> str:
    return f"{100 * times['share']:.0f} %" if times and "share" in times else _NOTHING


def _ratio(theirs: dict[str, Any] | None, ours: dict[str, Any]) -> str:
    if not theirs or "median" not in theirs or "median" not in ours:
        return _NOTHING
    return f"{theirs['median'] / ours['median']:.2f}"


def _kept(memory: dict[str, dict[str, Any]] | None) -> str:
    if not memory:
        return _NOTHING
    kept = [memory[n].get("kept") for n in ("fastvit", "timm eager")]
    return " / ".join(f"{k / 1e6:,.0f}" if k is not None else _NOTHING for k in kept)


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, or nothing where there are no rows."""
    if not rows:
        return ""
    lines = [heads, [":---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |" for line in lines)

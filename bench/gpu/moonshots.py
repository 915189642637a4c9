# SPDX-License-Identifier: Apache-2.0
"""What was hoped for and what was measured, from the files of a run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from gpu.cells import NOTHING, Records, cases_of, markdown
from gpu.model_plan import CONVIT, CONVITS, EAGER, PAIRS, STEMS, VIT_C

_SDPA = ("flash", "efficient", "cudnn", "math")
_CHAINS = ("timm", "timm channels_last", "linear")
_UNMEASURED = "not measured"


class Answer(NamedTuple):
    """A measured figure, and what of: names of the sides and the dispersion of both."""

    value: float
    of: str


class Target(NamedTuple):
    """One figure that was hoped for; ``answer`` finds it in a run, or says why not."""

    name: str
    stage: str
    wanted: float
    unit: str
    answer: Callable[[Records], Answer | str]
    #: Whether it is one of those that the project set itself; the others stand beside them.
    asked: bool = True

    @property
    def at_most(self) -> bool:
        return self.unit == "µs"

    def verdict(self, value: float) -> str:
        """Met, or missed by how much of what was wanted."""
        short = value / self.wanted - 1 if self.at_most else 1 - value / self.wanted
        return "met" if short <= 0 else f"missed by {100 * short:.2f} %"


def targets(records: Records) -> list[Target]:
    """Those that the project set itself, and the same questions at the shapes that a run has."""
    found = [
        Target(f"ConViT ÷ DeiT, {size}", "models", 0.98, "", _ratio(CONVIT, size))
        for size in CONVITS
    ]
    found += [
        Target(f"ViT_C ÷ ViT_P, {size}", "models", 0.99, "", _ratio(VIT_C, size)) for size in STEMS
    ]
    found.append(
        Target("GPSA core ÷ fastest plain SDPA, S", "kernels", 1.0, "", _core("S", 196, 256))
    )
    found += [
        Target("uint8 → tokens ÷ fastest eager chain", "patch_embed", 3.0, "", _tokens),
        Target("batch-1 ConViT-small, CUDA graph", "models", 250.0, "µs", _latency),
    ]
    return found + [
        Target(f"GPSA core ÷ fastest plain SDPA, {label} N={N} B={B}", "kernels", 1.0, "",
               _core(label, N, B), asked=False)
        for label, N, B in _other_cores(records)
    ]  # fmt: skip


def line(records: Records) -> str:
    """How many of the targets are met, in a sentence."""
    verdicts = [cells[3] for target, cells in _rows(records) if target.asked]
    met = verdicts.count("met")
    missed = sum(verdict.startswith("missed") for verdict in verdicts)
    unmeasured = len(verdicts) - met - missed
    return f"**Targets: {met} of {len(verdicts)} met, {missed} missed, {unmeasured} not measured.**"


def table(records: Records) -> str:
    """Every target with its figure and verdict; nothing where none was measured."""
    rows = list(_rows(records))
    if all(cells[2] == NOTHING for _, cells in rows):
        return ""
    heads = ["target", "wanted", "measured", "verdict", "what (median, 20–80 %)", "measured at"]
    return markdown(heads, [cells for _, cells in rows])


def _rows(records: Records) -> Iterator[tuple[Target, list[str]]]:
    for target in targets(records):
        found = target.answer(records)
        sign = "≤" if target.at_most else "≥"
        wanted = f"{sign} {target.wanted:g} {target.unit}".strip()
        if isinstance(found, str):
            reason = f"{_UNMEASURED}: {found}" if found else _UNMEASURED
            yield target, [target.name, wanted, NOTHING, reason, NOTHING, NOTHING]
            continue
        # Three digits of a ratio: 0.979 and 0.981 lie on either side of a target.
        value = f"{found.value:,.1f} µs" if target.at_most else f"{found.value:.3f}"
        verdict = target.verdict(found.value)
        yield target, [target.name, wanted, value, verdict, found.of, _origin(records, target)]


def _origin(records: Records, target: Target) -> str:
    """Commit and day of the stage, whose files may come from several runs; and if it failed."""
    record = records.get(target.stage, {})
    commit = (record.get("machine") or {}).get("commit") or "no commit"
    changed = "+changes" if (record.get("machine") or {}).get("dirty") else ""
    status = record.get("status")
    failed = f", stage {status}" if status != "ok" else ""
    return f"{commit[:12]}{changed}, {record.get('date', 'no date')[:10]}{failed}"


def _model_case(records: Records, pair: str, size: str, batch: int) -> dict[str, Any] | None:
    wanted = {
        "pair": pair, "size": size, "batch": batch, "mode": "inference", "dtype": "bfloat16",
        "image_size": 224, "way": EAGER,
    }  # fmt: skip
    # Of several the last, which a later run left.
    cases = [c for c in cases_of(records, "models") if wanted.items() <= c.items()]
    return cases[-1] if cases else None


def fastest(contenders: dict[str, dict[str, Any]], names: Iterable[str]) -> str | None:
    """The one with the least median."""
    timed = [name for name in names if "median" in contenders.get(name, {})]
    return min(timed, key=lambda name: contenders[name]["median"]) if timed else None


def of_family(
    contenders: dict[str, dict[str, Any]], family: str, library: str | None = None
) -> list[str]:
    """Names of the contenders that run a model of ``family``, of one library or of all."""
    words = {name: name.split() for name in contenders}
    return [
        name for name, (whose, which, *_) in words.items()
        if which == family and library in (None, whose)
    ]  # fmt: skip


def _ratio(pair: str, size: str) -> Callable[[Records], Answer | str]:
    def answer(records: Records) -> Answer | str:
        case = _model_case(records, pair, size, 256)
        if case is None:
            return ""
        found, (first, second) = case["contenders"], PAIRS[pair]
        return _over(found, of_family(found, second), of_family(found, first, "fastvit"), unit="ms")

    return answer


def _core(label: str, N: int, B: int) -> Callable[[Records], Answer | str]:
    def answer(records: Records) -> Answer | str:
        case = _op_case(records, "kernels", "core", lambda shape: _core_key(shape) == (label, N, B))
        return "" if case is None else _over(case["contenders"], _SDPA, ["fastvit"])

    return answer


def _core_key(shape: dict[str, Any]) -> tuple[str, int, int]:
    return shape["label"], shape["N"], shape["B"]


def _other_cores(records: Records) -> Iterator[tuple[str, int, int]]:
    keys = (
        _core_key(case["shape"]) for case in _op_cases(records, "kernels", "core")
        if case["shape"].get("grid")
    )  # fmt: skip
    yield from (key for key in dict.fromkeys(keys) if key != ("S", 196, 256))


def _tokens(records: Records) -> Answer | str:
    def asked(shape: dict[str, Any]) -> bool:
        return (shape["patch"], shape["D"], shape["B"], list(shape["size"])) == (
            16, 768, 256, [224, 224],
        )  # fmt: skip

    case = _op_case(records, "patch_embed", "eager", asked, pixels="uint8")
    return "" if case is None else _over(case["contenders"], _CHAINS, ["fastvit"])


def _op_cases(records: Records, stage: str, what: str, **wanted: Any) -> Iterator[dict[str, Any]]:
    """Forward, in bfloat16, which a case that names no dtype is."""
    for case in cases_of(records, stage, what):
        plain = case["mode"] == "forward" and case.get("dtype", "bfloat16") == "bfloat16"
        if plain and wanted.items() <= case.items():
            yield case


def _op_case(
    records: Records, stage: str, what: str, shape: Callable[[dict[str, Any]], bool], **wanted: Any
) -> dict[str, Any] | None:
    cases = [c for c in _op_cases(records, stage, what, **wanted) if shape(c["shape"])]
    return cases[-1] if cases else None


def _latency(records: Records) -> Answer | str:
    case = _model_case(records, CONVIT, "small", 1)
    if case is None:
        return ""
    found = case["contenders"]
    graphs = [name for name in of_family(found, "convit", "fastvit") if name.endswith(" graph")]
    name = fastest(found, graphs)
    if name is None:
        return _errors(found, graphs)
    return Answer(1e6 * found[name]["median"], f"{name} {_spread(found[name], 'µs')}")


def _over(
    found: dict[str, dict[str, Any]], theirs: Iterable[str], ours: Iterable[str], unit: str = "µs"
) -> Answer | str:
    """Time of the fastest of theirs over that of the fastest of ours."""
    theirs, ours = list(theirs), list(ours)
    peer, best = fastest(found, theirs), fastest(found, ours)
    if best is None or peer is None:
        return _errors(found, ours if best is None else theirs)
    of = f"{best} {_spread(found[best], unit)}; {peer} {_spread(found[peer], unit)}"
    return Answer(found[peer]["median"] / found[best]["median"], of)


def _errors(found: dict[str, dict[str, Any]], names: Iterable[str]) -> str:
    said = [
        f"{name}: {found[name]['error'][:120]}" for name in names if "error" in found.get(name, {})
    ]
    return said[0] if said else "no such contender"


def _spread(times: dict[str, Any], unit: str) -> str:
    scale = {"µs": 1e6, "ms": 1e3}[unit]
    middle, low, high = (f"{scale * times[k]:,.2f}" for k in ("median", "q20", "q80"))
    return f"{middle} ({low}–{high}) {unit}"

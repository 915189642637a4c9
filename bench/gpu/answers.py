# SPDX-License-Identifier: Apache-2.0
"""Finds in the files of a run the figures that its targets ask for, or why they are not there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from gpu.cells import Records, cases_of
from gpu.model_plan import CONVIT, EAGER, PAIRS

_SDPA = ("flash", "efficient", "cudnn", "math")
_CHAINS = ("timm", "timm channels_last", "linear")


class Answer(NamedTuple):
    """A measured figure, and what of: names of the sides and the dispersion of both."""

    value: float
    of: str


def model_ratio(pair: str, size: str) -> Callable[[Records], Answer | str]:
    """Speed of fastvit's fastest model of the first family over the fastest of the second's."""

    def answer(records: Records) -> Answer | str:
        case = _model_case(records, pair, size, 256)
        if case is None:
            return ""
        found, (first, second) = case["contenders"], PAIRS[pair]
        return _over(found, of_family(found, second), of_family(found, first, "fastvit"), unit="ms")

    return answer


def latency(records: Records) -> Answer | str:
    """Microseconds of an image through ConViT-small in a CUDA graph."""
    case = _model_case(records, CONVIT, "small", 1)
    if case is None:
        return ""
    found = case["contenders"]
    graphs = [name for name in of_family(found, "convit", "fastvit") if name.endswith(" graph")]
    name = fastest(found, graphs)
    if name is None:
        return _errors(found, graphs)
    return Answer(1e6 * found[name]["median"], f"{name} {_spread(found[name], 'µs')}")


def core_ratio(label: str, N: int, B: int) -> Callable[[Records], Answer | str]:
    """Speed of GPSA's core over the fastest plain attention of PyTorch at the same shape."""

    def answer(records: Records) -> Answer | str:
        case = _op_case(records, "kernels", "core", lambda shape: _core_key(shape) == (label, N, B))
        return "" if case is None else _over(case["contenders"], _SDPA, ["fastvit"])

    return answer


def other_cores(records: Records) -> Iterator[tuple[str, int, int]]:
    """Shapes of GPSA's core that a run has besides the one that a target asks for."""
    keys = (
        _core_key(case["shape"]) for case in _op_cases(records, "kernels", "core")
        if case["shape"].get("grid")
    )  # fmt: skip
    yield from (key for key in dict.fromkeys(keys) if key != ("S", 196, 256))


def tokens_ratio(records: Records) -> Answer | str:
    """Speed of the embedding of uint8 images over the fastest eager chain."""

    def asked(shape: dict[str, Any]) -> bool:
        return (shape["patch"], shape["D"], shape["B"], list(shape["size"])) == (
            16, 768, 256, [224, 224],
        )  # fmt: skip

    case = _op_case(records, "patch_embed", "eager", asked, pixels="uint8")
    return "" if case is None else _over(case["contenders"], _CHAINS, ["fastvit"])


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


def _model_case(records: Records, pair: str, size: str, batch: int) -> dict[str, Any] | None:
    wanted = {
        "pair": pair, "size": size, "batch": batch, "mode": "inference", "dtype": "bfloat16",
        "image_size": 224, "way": EAGER,
    }  # fmt: skip
    # Of several the last, which a later run left.
    cases = [c for c in cases_of(records, "models") if wanted.items() <= c.items()]
    return cases[-1] if cases else None


def _core_key(shape: dict[str, Any]) -> tuple[str, int, int]:
    return shape["label"], shape["N"], shape["B"]


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

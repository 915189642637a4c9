# SPDX-License-Identifier: Apache-2.0
"""Ours and the strongest other way, for every problem that a run of ``make gpu`` timed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from gpu import floors

Records = Mapping[str, Mapping[str, Any]]
Times = Mapping[str, Any]

OPS = {
    "gpsa_core": "GPSA core (q, k, v → o)",
    "gpsa_module": "GPSA layer with its projections",
    "patch_embed": "Patch embedding, with class token and positions",
    "conv_stem": "Convolutional stem of ViT_C",
}
_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "tf32": 4}
_BACKWARD = "forward+backward"


class Problem(NamedTuple):
    """What was timed, and its necessary work."""

    op: str
    label: str
    #: What larger batches of are the same problem.
    kind: tuple[Any, ...]
    batch: int
    mode: str
    dtype: str
    work: floors.Work

    @property
    def name(self) -> str:
        backward = " fwd+bwd" if self.mode == _BACKWARD else ""
        return f"{self.label} B={self.batch}{backward}"


class Pair(NamedTuple):
    """Our times, and those of the other way that comes nearest to them or passes them."""

    problem: Problem
    ours: Times
    peer: str
    theirs: Times | None

    @property
    def ratio(self) -> float | None:
        """How many times our time the other way takes."""
        return self.theirs["median"] / self.ours["median"] if self.theirs else None


def pairs(records: Records) -> list[Pair]:
    """One for every problem with times of ours, in the order of the run.

    The two sides come from the same contest where one has both, so that they met the same clocks.
    """
    grouped: dict[tuple[str, ...], list[tuple[Problem, Mapping[str, Times]]]] = {}
    for problem, contenders in _contests(records):
        key = (problem.op, problem.label, str(problem.batch), problem.mode, problem.dtype)
        grouped.setdefault(key, []).append((problem, contenders))
    found = (_pair(contests) for contests in grouped.values())
    return [pair for pair in found if pair is not None]


def _pair(contests: list[tuple[Problem, Mapping[str, Times]]]) -> Pair | None:
    problem = contests[0][0]
    ours = [c["fastvit"] for _, c in contests if "median" in c.get("fastvit", {})]
    if not ours:
        return None
    best = Pair(problem, ours[0], "", None)
    for _, contenders in contests:
        here = contenders.get("fastvit", {})
        mine = here if "median" in here else ours[0]
        for name, times in contenders.items():
            # A convolution alone computes less.
            if name.startswith("fastvit") or "alone" in name or "median" not in times:
                continue
            pair = Pair(problem, mine, name, times)
            if best.ratio is None or (pair.ratio or 0.0) < best.ratio:
                best = pair
    return best


def _contests(records: Records) -> Iterator[tuple[Problem, Mapping[str, Times]]]:
    for stage in ("kernels", "peers"):
        for case in _cases(records, stage):
            # Without a grid it is plain attention.
            if case.get("what") in ("core", "module") and case["shape"].get("grid"):
                yield _attention(case), case["contenders"]
    for case in _cases(records, "patch_embed"):
        if "pixels" in case:
            yield _embedding(case), case["contenders"]
    for case in _cases(records, "stem"):
        if "strides" in case["shape"]:
            yield _stem(case), case["contenders"]


def _cases(records: Records, stage: str) -> list[Mapping[str, Any]]:
    cases = records.get(stage, {}).get("cases", [])
    return [case for case in cases if "contenders" in case and "shape" in case]


def _attention(case: Mapping[str, Any]) -> Problem:
    shape, dtype = case["shape"], case.get("dtype", "bfloat16")
    B, N, H, d = (shape[name] for name in ("B", "N", "H", "d"))
    count = floors.core if case["what"] == "core" else floors.module
    work = count(B, N, H, d, _SIZES[dtype], backward=case["mode"] == _BACKWARD)
    label = f"{shape['label']} N={N}"
    return Problem(f"gpsa_{case['what']}", label, (shape["label"], N), B, case["mode"], dtype, work)


def _embedding(case: Mapping[str, Any]) -> Problem:
    shape, dtype, pixels = case["shape"], case["dtype"], case["pixels"]
    B, patch, D, (height, width) = (shape[name] for name in ("B", "patch", "D", "size"))
    size, grid = _SIZES[dtype], (height // patch) * (width // patch)
    work = floors.patch_embed(
        B, grid, 3 * patch**2, D, size, 1 if pixels == "uint8" else size,
        backward=case["mode"] == _BACKWARD,
    )  # fmt: skip
    label = f"D={D} p={patch}" + (" uint8" if pixels == "uint8" else "")
    kind = (D, patch, pixels)
    return Problem("patch_embed", label, kind, B, case["mode"], dtype, work)


def _stem(case: Mapping[str, Any]) -> Problem:
    shape, dtype = case["shape"], case.get("dtype", "bfloat16")
    work = floors.stem(SimpleNamespace(**shape), _SIZES[dtype], backward=case["mode"] == _BACKWARD)
    label, side = shape["label"], shape["size"][0]
    return Problem(
        "conv_stem", f"ViT_C-{label}", (label, side), shape["B"], case["mode"], dtype, work
    )

# SPDX-License-Identifier: Apache-2.0
"""The summary's tables of whole models and of the papers' rows."""

from __future__ import annotations

from typing import Any

from gpu.answers import fastest, of_family
from gpu.cells import NOTHING, Records, cases_of, markdown, share
from gpu.model_plan import PAIRS


def models(records: Records) -> str:
    """Each contest with the fastest of each family and library."""
    # Files of versions before this one had no pairs.
    rows = [_model(case) for case in cases_of(records, "models") if "pair" in case]
    heads = ["pair", "size", "mode", "batch", "dtype", "image", "way",
             "fastvit's first images/s", "by", "of floor", "fastest second images/s", "by",
             "of floor", "first ÷ second", "timm's first ÷ second", "fastvit ÷ timm, first",
             "kept GB, fastvit / timm"]  # fmt: skip
    note = (
        "First and second are the families of the pair. Each is its fastest contender, eager or in "
        "a CUDA graph where the way is eager; of the second, of either library. A ratio compares "
        "images/s: 1 is a first family that costs no speed."
    )
    return f"{markdown(heads, rows)}\n\n{note}" if rows else ""


def _model(case: dict[str, Any]) -> list[str]:
    found, (first, second) = case["contenders"], PAIRS[case["pair"]]
    ours = fastest(found, of_family(found, first, "fastvit"))
    peer = fastest(found, of_family(found, second))
    timm = fastest(found, of_family(found, first, "timm"))
    side = case["image_size"]
    return [
        case["pair"], case["size"], case["mode"], str(case["batch"]), case["dtype"],
        f"{side} x {side}", case["way"],
        *_contender(found, ours, of_family(found, first, "fastvit")),
        *_contender(found, peer, of_family(found, second)),
        _ratio(found, ours, peer), _ratio(found, timm, peer), _ratio(found, ours, timm),
        _kept(case, first),
    ]  # fmt: skip


def _contender(found: dict[str, Any], name: str | None, names: list[str]) -> list[str]:
    """Speed, name and share of the floor, or in the place of the name what went wrong."""
    if name is None:
        errors = [found[n]["error"] for n in names if "error" in found[n]]
        return [NOTHING, errors[0][:60] if errors else NOTHING, NOTHING]
    return [f"{found[name]['images_per_s']:,.0f}", name, share(found[name])]


def _ratio(found: dict[str, Any], ours: str | None, theirs: str | None) -> str:
    if ours is None or theirs is None:
        return NOTHING
    return f"{found[theirs]['median'] / found[ours]['median']:.3f}"


def _kept(case: dict[str, Any], family: str) -> str:
    memory = case.get("memory", {})
    kept = [memory.get(f"{library} {family}", {}).get("kept") for library in ("fastvit", "timm")]
    if kept == [None, None]:
        return NOTHING
    return " / ".join(f"{k / 1e9:,.2f}" if k is not None else NOTHING for k in kept)


def epoch(records: Records) -> str:
    """The papers' rows with their own column beside ours."""
    rows = []
    for case in cases_of(records, "epoch"):
        paper = case["paper"]
        printed = paper["time_min"], paper["images_per_s"]
        rows.append(
            [
                case["name"], f"{case['batch']} / {paper['batch']}",
                f"{printed[0]} min" if printed[0] else f"{printed[1]} images/s",
                _figure(case["minutes_reference"], ".1f"), _ours(case, "minutes_fastvit", ".1f"),
                _times(case["speedup"]), str(case["steps"]),
                _figure(case["images_per_s_reference"], ".0f"),
                _ours(case, "images_per_s_fastvit", ".0f"), _times(case["inference_speedup"]),
            ]
        )  # fmt: skip
    heads = ["model", "batch, here / paper", "paper", "library min", "fastvit min", "speed-up",
             "steps", "library images/s", "fastvit images/s", "speed-up"]  # fmt: skip
    note = (
        "Minutes for the training images of ImageNet-1k on this one GPU without a loader; the "
        "papers' minutes are on eight V100, their images/s on one Quadro GP100, in inference."
    )
    return f"{markdown(heads, rows)}\n\n{note}" if rows else ""


def _ours(case: dict[str, Any], key: str, digits: str) -> str:
    return _figure(case[key], digits) if case["status"] == "ok" else case["status"]


def _figure(value: float | None, digits: str) -> str:
    return NOTHING if value is None else format(value, f",{digits}")


def _times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}x"

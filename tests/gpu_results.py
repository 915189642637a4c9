# SPDX-License-Identifier: Apache-2.0
"""Records of a run of ``make gpu`` on a GPU that does not exist, with every stage filled in."""

from __future__ import annotations

import statistics
from typing import Any

MACHINE = {
    "gpu": "NVIDIA H999", "cpu": "A CPU, 16 cores", "threads": 16, "commit": "0123456789ab",
    "dirty": False, "versions": {"fastvit": "0.1.0", "torch": "2.11.0", "triton": "3.6.0"},
}  # fmt: skip
_SIZES = {"S": (9, 48), "B": (16, 48), "S+": (9, 64), "Ti": (4, 48)}
_PEAK, _BANDWIDTH = 800e12, 4e12


def times(seconds: float, **more: Any) -> dict[str, Any]:
    """Five samples around a median, as a contest records them."""
    samples = [seconds * (1 + 0.01 * i) for i in (-2, -1, 0, 1, 2)]
    cuts = statistics.quantiles(samples, n=5, method="inclusive")
    found = {"median": statistics.median(samples), "q20": cuts[0], "q80": cuts[3]}
    return {**found, "samples": samples, "share": 0.5, "how": "events", **more}


def records() -> dict[str, dict[str, Any]]:
    """By stage, as ``gpu.record.read_all`` gives them."""
    stages = {
        "ceilings": {
            "cases": [],
            "ceilings": {"bandwidth": _BANDWIDTH, "rates": {"bfloat16": _PEAK, "tf32": _PEAK / 2}},
        },
        "peers": {"cases": _compiled()},
        "kernels": {"cases": [*_attention("core"), *_attention("module")]},
        "patch_embed": {"cases": _embeddings()},
        "stem": {"cases": _stems()},
        "models": {"cases": [*_convits(), *_vits()]},
    }
    more = {"status": "ok", "problems": [], "missed": [], "date": "2026-11-30T12:00:00+0000"}
    return {name: {**stage, **more, "machine": MACHINE} for name, stage in stages.items()}


def _shape(label: str, N: int, B: int) -> dict[str, Any]:
    H, d = _SIZES[label]
    side = round(N**0.5)
    return {"label": label, "B": B, "H": H, "d": d, "N": N, "grid": [side, side]}


def _seconds(shape: dict[str, Any], mode: str) -> float:
    """At 60 % of a floor that is about right."""
    B, N, H, d = (shape[name] for name in "BNHd")
    tensors, products = (4, 2) if mode == "forward" else (11, 7)
    moved, flops = tensors * B * N * H * d * 2, 2 * products * B * H * N * N * d
    return max(moved / _BANDWIDTH, flops / _PEAK) / 0.6 + 2e-6


def _attention(what: str) -> list[dict[str, Any]]:
    cases = []
    problems = [(label, 196, 256) for label in _SIZES]
    problems += [(label, N, 32) for N in (576, 1024) for label in ("S", "B")]
    problems += [(label, 196, B) for B in (64, 8, 1) for label in ("S", "B")]
    for label, N, B in problems:
        shape = _shape(label, N, B)
        for mode in ("forward", "forward+backward"):
            ours = _seconds(shape, mode) * (1 if what == "core" else 4)
            contenders = {"fastvit": times(ours)}
            if what == "core":
                # The first has the lead at 196 tokens only.
                contenders["flash"] = times(ours * (1.3 if N == 196 else 0.7))
                contenders["math"] = times(9 * ours)
                contenders["cudnn"] = {"error": "RuntimeError: no kernel"}
            else:
                contenders["timm eager"] = times(6 * ours)
            cases.append(
                {"shape": shape, "what": what, "mode": mode, "contenders": contenders, "host": 2e-5}
            )
    plain = {**_shape("S", 196, 256), "N": 197, "grid": None}
    found = {"fastvit": times(1e-4), "flash": times(1e-4)}
    cases.append({"shape": plain, "what": "core", "mode": "forward", "contenders": found})
    return cases


def _compiled() -> list[dict[str, Any]]:
    shape = _shape("S", 196, 256)
    found = {"timm compiled": times(10 * _seconds(shape, "forward"))}
    return [{"shape": shape, "what": "module", "mode": "forward", "contenders": found}]


def _embeddings() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = [{"what": "agreement", "ok": True, "dtype": "bfloat16"}]
    for D, B in ((768, 256), (384, 256), (1024, 256), (768, 1)):
        for pixels in ("float", "uint8"):
            for mode in ("forward", "forward+backward"):
                ours = 4e-7 * B * D / 768 * (1 if mode == "forward" else 2)
                found = {
                    "fastvit": times(ours),
                    "timm": times(ours * (1.8 if pixels == "float" else 4.5)),
                    "linear": times(2.1 * ours),
                    "conv alone": times(0.9 * ours),
                }
                shape = {"B": B, "D": D, "patch": 16, "size": [224, 224]}
                cases.append(
                    {"what": "eager", "shape": shape, "dtype": "bfloat16", "pixels": pixels,
                     "mode": mode, "contenders": found}
                )  # fmt: skip
    return cases


def _stems() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = [{"what": "agreement", "ok": True}]
    four, six = (48, 96, 192, 384), (64, 128, 128, 256, 256, 512)
    for label, channels, D, us in (("4GF", four, 384, 500), ("18GF", six, 768, 1700)):
        strides = [2, 2, 2, 2] if len(channels) == 4 else [2, 2, 1, 2, 1, 2]
        shape = {"label": label, "B": 256, "size": [224, 224], "D": D,
                 "channels": list(channels), "strides": strides}  # fmt: skip
        for mode, factor in (("forward", 1), ("forward+backward", 3.5)):
            ours = us * factor * 1e-6
            found = {"fastvit": times(ours), "eager channels_last": times(1.7 * ours)}
            cases.append({"what": "eager", "shape": shape, "mode": mode, "contenders": found})
            # In this contest ours met faster clocks.
            found = {"fastvit": times(0.8 * ours), "compiled channels_last": times(1.2 * ours)}
            cases.append({"what": "compiled", "shape": shape, "mode": mode, "contenders": found})
    return cases


def _model(rate: float, batch: int) -> dict[str, Any]:
    return times(batch / rate, images_per_s=rate)


def _convits() -> list[dict[str, Any]]:
    cases = []
    rates = {"tiny": 90e3, "small": 33e3, "small+": 20e3, "base": 12e3, "base+": 7e3}
    settings = [(size, 256, 224) for size in rates] + [("small", B, 224) for B in (1, 8, 64)]
    settings += [("small", 64, 384), ("small", 32, 512)]
    for size, batch, side in settings:
        rate = rates[size] * min(1.0, (batch + 2) / 66) * (224 / side) ** 2.5
        found = {
            "timm convit": _model(0.3 * rate, batch),
            "timm deit": _model(0.9 * rate, batch),
            "timm deit flash": _model(rate, batch),
            "fastvit convit": _model(0.96 * rate, batch),
            "fastvit convit graph": _model((1.5 if batch == 1 else 0.99) * rate, batch),
            "fastvit deit": _model(0.95 * rate, batch),
        }
        cases.append(
            {"pair": "ConViT ÷ DeiT", "size": size, "batch": batch, "mode": "inference",
             "dtype": "bfloat16", "image_size": side, "way": "eager", "contenders": found}
        )  # fmt: skip
    return cases


def _vits() -> list[dict[str, Any]]:
    cases = []
    for size, rate in (("1GF", 100e3), ("4GF", 36e3), ("18GF", 11e3), ("36GF", 6e3)):
        found = {
            "library vit_c": _model(0.85 * rate, 256),
            "library vit_p": _model(rate, 256),
            "fastvit vit_c": _model(1.02 * rate, 256),
            "fastvit vit_p": _model(0.98 * rate, 256),
        }
        cases.append(
            {"pair": "ViT_C ÷ ViT_P", "size": size, "batch": 256, "mode": "inference",
             "dtype": "bfloat16", "image_size": 224, "way": "eager", "contenders": found}
        )  # fmt: skip
    return cases

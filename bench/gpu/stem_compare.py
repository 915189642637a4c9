# SPDX-License-Identifier: Apache-2.0
"""Stems against float64: ``python -m gpu.stem_compare INDEX`` prints a line of JSON for each
comparison of a problem: in training and in eval, output, gradients and running statistics.
"""

from __future__ import annotations

import argparse
import copy
import json
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.testing import agreement, poisoned_allocations
from gpu.device import Device, open_device, tf32
from gpu.patch_compare import TF32, number
from gpu.shapes import Stem
from gpu.stem_layers import our_layer, plain_layer, stem_images
from gpu.timing import first_line
from gpu.verify import verified

Case = tuple[Stem, str, str, str, str]


def cases(device: Device, index: int) -> list[Case]:
    """(problem, layout, dtype, pixels, mode) of every comparison."""
    problem, layouts = device.plan.stems_checked[index]
    return [
        (problem, layout, dtype, pixels, mode)
        for layout in layouts
        for dtype in device.plan.embedding_dtypes
        for pixels in ("float", "uint8")
        for mode in ("training", "eval")
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("index", type=int)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    device = open_device(dry=options.dry)
    for case in cases(device, options.index):
        problem, layout, dtype, pixels, mode = case
        found = {
            "group": f"{problem.name}, {pixels} pixels, {mode}",
            "what": "agreement",
            "layout": layout,
            "dtype": dtype,
        }
        try:
            with tf32(dtype == "tf32"):
                found |= _compare(device, *case)
        # One case that fails is a result; the others still run.
        except Exception as error:
            found |= {"ok": False, "error": first_line(error)}
        print(json.dumps(found), flush=True)
        device.release()
    try:
        print(json.dumps({"verified": verified()}), flush=True)
    # The comparisons above stand without a record of verdicts.
    except Exception as error:
        print(json.dumps({"unverified": first_line(error)}), flush=True)


def _compare(
    device: Device, problem: Stem, layout: str, dtype: str, pixels: str, mode: str
) -> dict[str, Any]:
    dtype_of_layer = number(dtype)
    plain = plain_layer(device, problem, dtype_of_layer).train(mode == "training")
    ours = our_layer(plain, "triton")
    pixel = torch.uint8 if pixels == "uint8" else dtype_of_layer
    x = stem_images(device, problem, pixel, layout=layout)
    wide = x if pixels == "uint8" else x.double()
    expected = _results(copy.deepcopy(plain).double(), wide)
    theirs = _results(copy.deepcopy(plain), x)
    with poisoned_allocations():
        actual, again = (_results(copy.deepcopy(ours), x) for _ in range(2))
    found, ok = [], True
    for name, tensor in actual.items():
        # Rounding near zero decides single elements behind a ReLU, not their mean square; of a
        # batch norm's parameters there are few, and their mean square is chance, too.
        floor = 4 * torch.finfo(tensor.dtype).eps if tensor.ndim == 1 else 0.0
        result = agreement(
            tensor, theirs[name], expected[name], name=name, rms=True,
            floor=TF32 if dtype == "tf32" else floor,
        )  # fmt: skip
        same = torch.equal(tensor, again[name])
        ok = ok and result.ok and same
        found.append({**result._asdict(), "ok": result.ok, "deterministic": same})
    return {"ok": ok, "tensors": found}


def _results(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, every gradient and every running statistic of one call."""
    x = x.detach().requires_grad_(x.is_floating_point())
    out = layer(x)
    generator = torch.Generator(out.device).manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, device=out.device)
    # Values that all dtypes hold.
    out.backward(cotangent.bfloat16().to(out.dtype))
    found = {"output": out.detach()}
    found |= {"images": x.grad} if x.grad is not None else {}
    found |= {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    statistics = {n: b for n, b in layer.named_buffers() if b.is_floating_point()}
    return found | {name: buffer.clone() for name, buffer in statistics.items()}


if __name__ == "__main__":
    main()

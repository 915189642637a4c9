# SPDX-License-Identifier: Apache-2.0
"""One group of comparisons with float64: ``python -m gpu.compare INDEX`` prints a line of JSON
for each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvit import functional, reference
from fastvit.ops import gpsa_dropout, gpsa_dropout_torch
from fastvit.testing import CANCELLING, agreement, poisoned_allocations
from gpu.device import Device, open_device, tf32
from gpu.shapes import Group
from gpu.timing import draws, first_line
from gpu.verify import verified

_CANCELLING = ("pos_weight", "gating_param")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("index", type=int)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    device = open_device(dry=options.dry)
    group = device.plan.groups[options.index]
    for layout in group.layouts:
        for dtype in group.dtypes:
            case = {"group": group.label, "op": group.op, "layout": layout, "dtype": dtype}
            try:
                case |= _compare(device, group, layout, dtype)
            # One case that fails is a result; the others still run.
            except Exception as error:
                case |= {"ok": False, "error": first_line(error)}
            print(json.dumps(case), flush=True)
            device.release()
    try:
        print(json.dumps({"verified": verified()}), flush=True)
    # The comparisons above stand without a record of verdicts.
    except Exception as error:
        print(json.dumps({"unverified": first_line(error)}), flush=True)


def _compare(device: Device, group: Group, layout: str, dtype: str) -> dict[str, Any]:
    inputs = _inputs(device, group, layout, _dtype(dtype))
    ours, plain = _functions(group)
    with tf32(dtype == "tf32"):
        expected = _gradients(plain, {n: x.double() for n, x in inputs.items()})
        theirs = _gradients(plain, inputs)
        with poisoned_allocations():
            actual = _gradients(ours, inputs)
            again = _gradients(ours, inputs)
    found, ok = [], True
    for name, tensor in actual.items():
        result = agreement(
            tensor, theirs[name], expected[name], name=name,
            floor=CANCELLING if name in _CANCELLING else 0.0,
        )  # fmt: skip
        same = torch.equal(tensor, again[name])
        ok = ok and result.ok and same
        found.append({**result._asdict(), "ok": result.ok, "deterministic": same})
    return {"ok": ok, "tensors": found}


def _functions(group: Group) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    if group.op == "mhsa":
        return lambda **t: functional.attention(**t, backend="triton"), reference.attention
    if group.op == "gpsa_dropout":
        return _with_dropout(group)
    grid = {"grid_size": group.grid}
    return (
        lambda **t: functional.gpsa_attention(**t, **grid, backend="triton"),
        lambda **t: reference.gpsa_attention(**t, **grid),
    )


def _with_dropout(group: Group) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The reference drops what the kernels drop."""
    probability, scale = 0.25, group.d**-0.5

    def seed(x: Tensor) -> Tensor:
        return torch.tensor([hash_of(group, "seed") << 32 | 1], device=x.device)

    def ours(q: Tensor, *others: Tensor) -> Tensor:
        return gpsa_dropout.gpsa_dropout(
            q, *others, seed(q), *group.grid, scale, probability, "triton"
        )

    def plain(q: Tensor, *others: Tensor) -> Tensor:
        kept = gpsa_dropout_torch.kept(seed(q), q.shape[:3], probability)
        return reference.gpsa_attention(q, *others, group.grid, dropout_p=probability, kept=kept)

    return lambda **t: ours(*t.values()), lambda **t: plain(*t.values())


def _gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output, and the gradient of every input, for one cotangent that all dtypes hold."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = function(**leaves)
    generator = torch.Generator(out.device).manual_seed(1)
    shape = {"device": out.device, "generator": generator, "dtype": torch.float32}
    cotangent = torch.randn(out.shape, **shape).bfloat16().to(out.dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return {"output": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def _inputs(device: Device, group: Group, layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    N, seed = group.grid[0] * group.grid[1], hash_of(group, layout)
    inputs = {
        name: _laid_out(device, layout, group, N, dtype, seed + i)
        for i, name in enumerate(("q", "k", "v"))
    }
    if group.op != "mhsa":
        # Negative on the squared distance, as trained heads are: a Gaussian around an offset.
        slope = torch.tensor([1.0, 1.0, 0.25], device=device.device)
        offset = torch.tensor([0.0, 0.0, 1.0], device=device.device)
        weight = draws(device, group.H, 3, dtype=torch.float32, seed=seed + 3) * slope - offset
        inputs["pos_weight"] = weight.to(dtype)
        inputs["gating_param"] = draws(device, group.H, dtype=dtype, seed=seed + 4)
    return inputs


def hash_of(group: Group, layout: str) -> int:
    """A seed that is the same in every run; Python's own hash is not."""
    return sum(map(ord, group.label + layout))


def _laid_out(
    device: Device, layout: str, group: Group, N: int, dtype: torch.dtype, seed: int
) -> Tensor:
    """(B, H, N, d) with strides that callers have."""
    B, H, d = group.B, group.H, group.d
    if layout == "permuted":
        return draws(device, H, d, B, N, dtype=dtype, seed=seed).permute(2, 0, 3, 1)
    if layout == "expanded":
        return draws(device, 1, H, N, d, dtype=dtype, seed=seed).expand(B, H, N, d)
    if layout == "misaligned":
        # One element behind an aligned address, rows of an odd number of elements.
        wide = draws(device, B * N * H * (d + 1) + 1, dtype=dtype, seed=seed)[1:]
        return wide.view(B, N, H, d + 1)[..., :d].transpose(1, 2)
    return draws(device, B, N, H, d, dtype=dtype, seed=seed).transpose(1, 2)


def _dtype(name: str) -> torch.dtype:
    return torch.float32 if name == "tf32" else getattr(torch, name)


if __name__ == "__main__":
    main()

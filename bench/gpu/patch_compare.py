# SPDX-License-Identifier: Apache-2.0
"""Patch embeddings against float64: ``python -m gpu.patch_compare PATH`` prints a line of JSON
for each. PATH is auto, what a call of backend ``native`` runs, forward and backward; or one of
its kernels, which run forward.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastvit import _native, functional, reference
from fastvit.testing import agreement, poisoned_allocations
from gpu.device import Device, open_device, tf32
from gpu.shapes import Embedding
from gpu.timing import draws, first_line
from gpu.verify import verified

STATISTICS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
#: Two units in the last place of tf32: PyTorch may choose a convolution without it.
TF32 = 2 * 2.0**-10

#: Name, and whether with tf32, the kernel of capability 9.0, the small tile.
_KERNELS: dict[str, tuple[bool, bool | None]] = {
    "wgmma": (True, None),
    "mma, large tile": (False, False),
    "mma, small tile": (False, True),
}


def backend(device: Device) -> str:
    """``native``; where a dry run has no extension, what shares its interface."""
    return "torch" if device.note and _native.reason() else "native"


def paths(device: Device) -> list[str]:
    """Whose agreement is to be shown on a device."""
    if device.device.type == "cpu":
        return ["auto"]
    return ["auto", *(name for name in _KERNELS if name != "wgmma" or has_wgmma(device))]


def has_wgmma(device: Device) -> bool:
    """Whether the kernel for capability 9.0 is built and runs here.

    Raises:
        RuntimeError: the extension is not there.
    """
    if device.device.type == "cpu" or "90a" not in _native.load().build_info()["cuda_archs"]:
        return False
    return torch.cuda.get_device_capability(device.device) == (9, 0)


def kernels(name: str, dtype: str) -> Any:
    """One of the kernels, with the methods of an implementation."""
    from fastvit.ops.patch_embed_cuda import Kernels

    hopper, small_tile = _KERNELS[name]
    return Kernels(dtype == "tf32", hopper=hopper, small_tile=small_tile)


def number(dtype: str) -> torch.dtype:
    """What tensors have whose products are made in ``dtype``."""
    return torch.float32 if dtype == "tf32" else getattr(torch, dtype)


def cases(device: Device, path: str) -> list[tuple[Embedding, str, str, str]]:
    """(problem, layout, dtype, pixels) of every comparison."""
    dtypes = device.plan.embedding_dtypes
    if path == "wgmma":
        dtypes = tuple(dtype for dtype in dtypes if dtype in ("bfloat16", "float16"))
    return [
        (problem, layout, dtype, pixels)
        for problem, layouts in device.plan.embedded
        for layout in layouts
        for dtype in dtypes
        for pixels in ("float", "uint8")
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", choices=["auto", *_KERNELS])
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    device = open_device(dry=options.dry)
    for problem, layout, dtype, pixels in cases(device, options.path):
        group = f"{options.path}, {problem.name}, {pixels} pixels"
        case = {"group": group, "what": "agreement", "path": options.path}
        case |= {"layout": layout, "dtype": dtype}
        try:
            with tf32(dtype == "tf32"):
                case |= _compare(device, options.path, problem, layout, dtype, pixels)
        # One case that fails is a result; the others still run.
        except Exception as error:
            case |= {"ok": False, "error": first_line(error)}
        print(json.dumps(case), flush=True)
        device.release()
    if options.path == "auto":
        try:
            _prove(device)
            print(json.dumps({"verified": verified()}), flush=True)
        # The comparisons above stand without a record of verdicts.
        except Exception as error:
            print(json.dumps({"unverified": first_line(error)}), flush=True)


def _prove(device: Device) -> None:
    """The kernels' own checks, also of those that no call takes while a faster one is trusted."""
    if device.device.type == "cpu":
        return
    from fastvit.ops import patch_embed_trust as proofs
    from fastvit.ops import trust

    for dtype in device.plan.embedding_dtypes:
        of_call = (device.device, number(dtype))
        with tf32(dtype == "tf32"):
            for direction in ("forward", "backward"):
                for kernel in proofs._choices(direction, of_call[1], of_call[0], dtype == "tf32"):
                    for raw in (False, True):
                        trust.trusts(proofs._candidate(direction, kernel, *of_call, raw), "auto")


def _compare(
    device: Device, path: str, problem: Embedding, layout: str, dtype: str, pixels: str
) -> dict[str, Any]:
    pixel = torch.uint8 if pixels == "uint8" else number(dtype)
    inputs = {"images": images(device, problem, pixel, layout=layout)}
    inputs |= parameters(device, problem, number(dtype))
    statistics: dict[str, Any] = STATISTICS if pixels == "uint8" else {}

    def run(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(_results(lambda **t: function(**t, **statistics), inputs, path == "auto"))

    wide = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    expected = run(reference.patch_embed, wide)
    theirs = run(reference.patch_embed, inputs)
    ours = _function(device, path, dtype)
    with poisoned_allocations():
        actual, again = run(ours, inputs), run(ours, inputs)
    found, ok = [], True
    for name, tensor in actual.items():
        result = agreement(
            tensor, theirs[name], expected[name], name=name,
            floor=TF32 if dtype == "tf32" else 0.0,
        )  # fmt: skip
        same = torch.equal(tensor, again[name])
        ok = ok and result.ok and same
        found.append({**result._asdict(), "ok": result.ok, "deterministic": same})
    # Which kernel takes a call does not depend on the layout, and profiling takes time.
    ran = _ran(device, lambda: run(ours, inputs)) if layout == "planar" else []
    case = {"ok": ok, "tensors": found, "ran": ran}
    # Rows of the weight that are not whole pieces of 16 bytes go to the other kernel.
    taken = problem.problem[2] * number(dtype).itemsize % 16 == 0
    if path == "wgmma" and taken and isinstance(ran, list) and ran and "hopper" not in str(ran):
        return {**case, "ok": False, "error": f"other kernels ran: {', '.join(ran)}"}
    return case


def _function(device: Device, path: str, dtype: str) -> Callable[..., Tensor]:
    if path == "auto":
        return lambda **t: functional.patch_embed(**t, backend=backend(device))
    order = ("images", "weight", "bias", "pos_embed", "cls_token", "mean", "std")
    return lambda **t: kernels(path, dtype).forward(*(t.get(name) for name in order))


def _results(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], backward: bool
) -> Iterator[tuple[str, Tensor]]:
    """The output, and the gradient of every input that can have one."""
    leaves = {n: x.detach() for n, x in inputs.items()}
    floating = {n: x.requires_grad_(backward) for n, x in leaves.items() if x.is_floating_point()}
    out = function(**leaves)
    yield "output", out.detach()
    if backward:
        generator = torch.Generator(out.device).manual_seed(1)
        cotangent = torch.randn(out.shape, generator=generator, device=out.device)
        # Values that all dtypes hold.
        cotangent = cotangent.bfloat16().to(out.dtype)
        yield from zip(
            floating, torch.autograd.grad(out, list(floating.values()), cotangent), strict=True
        )


def _ran(device: Device, call: Callable[[], Any]) -> list[str] | str:
    """Our kernels by the profiler's names: which of the paths a call took."""
    try:
        return sorted(name[:80] for name in device.kernels(call) if "patch" in name)
    # The comparison stands without it.
    except Exception as error:
        return first_line(error)


def images(
    device: Device, problem: Embedding, dtype: torch.dtype, *, layout: str = "planar", seed: int = 0
) -> Tensor:
    """Images (B, 3, H, W), float ones as if normalised."""
    shape = [problem.B, 3, *problem.size]
    if layout == "cropped":
        # Rows that begin one element behind an aligned address.
        shape[-1] += 1
    if dtype == torch.uint8:
        generator = torch.Generator(device.device).manual_seed(seed)
        options = {"generator": generator, "device": device.device, "dtype": dtype}
        found = torch.randint(256, shape, **options)
    else:
        found = draws(device, *shape, dtype=dtype, seed=seed)
    if layout == "channels_last":
        return found.contiguous(memory_format=torch.channels_last)
    return found[..., 1:] if layout == "cropped" else found


def parameters(device: Device, problem: Embedding, dtype: torch.dtype) -> dict[str, Tensor]:
    """By name, as :func:`fastvit.functional.patch_embed` has them."""
    _, N, K, D = problem.problem
    shapes = {
        "weight": (D, 3, problem.patch, problem.patch),
        "bias": (D,),
        "pos_embed": (1, N + 1, D),
        "cls_token": (1, 1, D),
    }
    drawn = {
        n: draws(device, *s, dtype=dtype, seed=i + 1) for i, (n, s) in enumerate(shapes.items())
    }
    drawn["weight"] *= K**-0.5
    return drawn


if __name__ == "__main__":
    main()

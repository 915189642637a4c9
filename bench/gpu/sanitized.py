# SPDX-License-Identifier: Apache-2.0
"""What the sanitizer watches: one small call of each path, forward and backward; all, or those
whose numbers are given.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fastvit.functional import attention, gpsa_attention
from gpu.device import Device, open_device
from gpu.patch_peers import Portable, Tokens
from gpu.shapes import Embedding, Stem
from gpu.stem_layers import our_layer, plain_layer, stem_images


def main() -> None:
    device = open_device(dry="--dry" in sys.argv)
    chosen = [int(argument) for argument in sys.argv[1:] if argument.isdecimal()]
    calls = device.plan.sanitized
    for op, dtype, B, H, grid, d in [calls[i] for i in chosen] or calls:
        torch.manual_seed(0)
        if op.startswith("patch_embed"):
            problem = Embedding(B, d, H, (H * grid[0], H * grid[1]))
            _patches(device, problem, dtype, raw="uint8" in op)
        elif op.startswith("conv_stem"):
            stem = Stem(op, B, grid, (H, 2 * H), (2, 2), d)
            _stem(device, stem, getattr(torch, dtype), raw="uint8" in op)
        else:
            _attention(device, op, dtype, B, H, grid, d)
        device.synchronize()
        print(f"ran {op} {dtype} {B} {H} {grid} {d}", flush=True)


def _draw(device: Device, *shape: int, dtype: str) -> Tensor:
    # On the processor: the fewer kernels run that are not ours, the better.
    return torch.randn(shape).to(getattr(torch, dtype)).to(device.device)


def _attention(
    device: Device, op: str, dtype: str, B: int, H: int, grid: tuple[int, int], d: int
) -> None:
    shape = (B, H, grid[0] * grid[1], d)
    shapes = [shape, shape, shape, *([(H, 3), (H,)] if op != "mhsa" else [])]
    leaves = [_draw(device, *s, dtype=dtype).requires_grad_() for s in shapes]
    if op != "mhsa":
        p = 0.25 if op == "gpsa_dropout" else 0.0
        out = gpsa_attention(*leaves, grid, dropout_p=p, backend="triton")
    else:
        out = attention(*leaves, backend="triton")
    torch.autograd.grad(out, leaves, _draw(device, *shape, dtype=dtype))


def _patches(device: Device, problem: Embedding, dtype: str, *, raw: bool) -> None:
    """A training step, and on a GPU both tiles of the kernel for every capability."""
    number = getattr(torch, dtype)
    size = (problem.B, 3, *problem.size)
    images = torch.randint(256, size, dtype=torch.uint8) if raw else torch.randn(size).to(number)
    images = images.to(device.device)
    layer = Tokens(device, problem, number)
    out = layer(images)
    torch.autograd.grad(out, list(layer.parameters()), torch.ones_like(out))
    if device.device.type == "cuda":
        for small_tile in (True, False):
            Portable(device, problem, dtype, small_tile=small_tile)(images)


def _stem(device: Device, problem: Stem, dtype: torch.dtype, *, raw: bool) -> None:
    """A training step, and a call in eval."""
    layer = our_layer(plain_layer(device, problem, dtype).train(), "triton")
    x = stem_images(device, problem, torch.uint8 if raw else dtype)
    layer(x).float().sum().backward()
    with torch.no_grad():
        layer.eval()(x)


if __name__ == "__main__":
    main()

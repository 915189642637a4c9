# SPDX-License-Identifier: Apache-2.0
"""What the sanitizer watches: one small call of each path, forward and backward; all, or those
whose numbers are given.
"""

from __future__ import annotations

import sys

import torch

from fastvit.functional import attention, gpsa_attention
from gpu.device import open_device


def main() -> None:
    device = open_device(dry="--dry" in sys.argv)
    chosen = [int(argument) for argument in sys.argv[1:] if argument.isdecimal()]
    calls = device.plan.sanitized
    for op, dtype, B, H, grid, d in [calls[i] for i in chosen] or calls:
        N = grid[0] * grid[1]
        torch.manual_seed(0)

        # Drawn on the processor: the fewer kernels run that are not ours, the better.
        def draw(*shape: int, dtype: str = dtype) -> torch.Tensor:
            x = torch.randn(shape).to(getattr(torch, dtype))
            return x.to(device.device).requires_grad_()

        leaves = [draw(B, H, N, d) for _ in range(3)]
        cotangent = draw(B, H, N, d).detach()
        if op == "gpsa":
            leaves += [draw(H, 3), draw(H)]
            out = gpsa_attention(*leaves, grid, backend="triton")
        else:
            out = attention(*leaves, backend="triton")
        torch.autograd.grad(out, leaves, cotangent)
        device.synchronize()
        print(f"ran {op} {dtype} {B} {H} {grid} {d}", flush=True)


if __name__ == "__main__":
    main()

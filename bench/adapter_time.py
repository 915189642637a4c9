# SPDX-License-Identifier: Apache-2.0
"""What an adapter of ``fastvit.accelerate`` asks before each call of its op, in Python.

    python bench/adapter_time.py

The best of many rounds on one thread, and beside it the time that ``accelerate`` takes for timm's
ConViT-base.
"""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable
from typing import Any

import timm
import torch
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

import fastvit
from fastvit.layers import gpsa

CALLS, ROUNDS = 500, 40


def microseconds(call: Callable[[], Any]) -> float:
    """The best of the rounds: whatever else the machine does only adds."""
    return min(timeit.repeat(call, number=CALLS, repeat=ROUNDS)) / CALLS * 1e6


def questions() -> dict[str, Callable[[], Any]]:
    """What the forward of each adapter asks."""
    convit: Any = timm.create_model("convit_tiny", img_size=32).eval()
    channels = (8, 16, 24, 32)
    stages = [ConvStemConfig(c, 3, 2) for c in channels]
    vit_c: Any = VisionTransformer(32, 16, 1, 3, 48, 96, conv_stem_configs=stages).eval()
    for model in (convit, vit_c):
        fastvit.accelerate(model)
    local, plain = convit.blocks[0].attn, convit.blocks[11].attn
    tokens, images = torch.randn(1, 4, 192), torch.randn(1, 3, 32, 32)
    return {
        "GPSA": lambda: (local._serves(tokens, 3), gpsa.is_fusible(local), local._stack()),
        "attention": lambda: (plain._serves(tokens, 3), plain._refusal(plain)),
        "patch embedding": lambda: convit.patch_embed._fits(images),
        "stem of four stages": lambda: vit_c.conv_proj._fits(images),
    }


def main() -> None:
    torch.set_num_threads(1)
    with torch.inference_mode():
        for name, call in questions().items():
            print(f"{name:20} {microseconds(call):6.1f} us")
    model = timm.create_model("convit_base")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        report = fastvit.accelerate(model)
        seconds.append(time.perf_counter() - start)
        report.undo()
    print(f"{'ConViT-base, once':20} {min(seconds) * 1e3:6.1f} ms")


if __name__ == "__main__":
    main()

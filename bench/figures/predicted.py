# SPDX-License-Identifier: Apache-2.0
"""A block of what the compiler says and a model predicts of the Triton kernels on Hopper."""

from __future__ import annotations

import json
from pathlib import Path

_ARCH, _CARD = "sm_90", "H200"
#: What the text speaks of: kernel, case, and its name in words.
_ROWS = (
    ("forward_tile", "bfloat16 B256 H9 14x14 d48", "GPSA forward, ConViT-S"),
    ("backward_tile", "bfloat16 B256 H9 14x14 d48", "GPSA backward, ConViT-S"),
    ("factor_gradient", "bfloat16 B256 H9 14x14 d48", "gradients of position weights, ConViT-S"),
    ("stem_pair", "bfloat16 B256 224x224 c3-48-96 s2-2", "stem, first two layers, ViT_C-4GF"),
    ("stem_conv", "bfloat16 B256 56x56 c96-192 s2", "stem, third layer, ViT_C-4GF"),
    ("stem_tokens", "bfloat16 B256 14x14 c384-384 train", "stem, last layer, ViT_C-4GF"),
    ("stem_input_gradient", "bfloat16 B256 56x56 c96-192 s2 train", "gradient of its third input"),
    ("stem_weight_gradient", "float16 B256 56x56 c96-192 s2 train", "gradient of its weight"),
)


def _version(path: Path) -> list[int]:
    return [int(number) for number in path.stem.removeprefix("triton-").split(".")]


def table(root: Path) -> str:
    """Of the newest version of Triton that has a table."""
    folder = root / "bench" / "results" / "resources"
    newest = max(
        folder.glob("triton-*.json"), key=lambda p: [int(n) for n in p.stem[7:].split(".")]
    )
    content = json.loads(newest.read_text("utf-8"))
    rows = {(r["kernel"], r["case"]): r for r in content["rows"] if r["arch"].startswith(_ARCH)}
    lines = [
        f"*Predicted for {_CARD} by `kernels/ahead/model.py`, compiled by Triton "
        f"{content['triton']} for compute capability 9.0, half precision, batch 256; "
        "`make resources`.*",
        "",
        "| what | kernel | registers | blocks | predicted µs | floor of bytes µs | of floor |",
        "| :--- | :--- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kernel, case, name in _ROWS:
        row = rows[kernel, case]
        time, floor = row["predicted_us"], row["predicted_floor_us"]
        lines.append(
            f"| {name} | `{kernel}` | {row['registers']} | {row['blocks_per_sm']} | {time:.3g} | "
            f"{floor:.3g} | {100 * floor / time:.0f} % |"
        )
    return "\n".join(lines)

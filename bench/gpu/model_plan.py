# SPDX-License-Identifier: Apache-2.0
"""Which models are timed against which, the most valuable contests first.

Imports nothing that has to be built: the summary reads names from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

#: The two families of a pair; the question is how much speed the first one costs.
PAIRS = {"ConViT ÷ DeiT": ("convit", "deit"), "ViT_C ÷ ViT_P": ("vit_c", "vit_p")}
CONVIT, VIT_C = PAIRS

#: Heads and channels of a head of both models of a pair.
CONVITS = {
    "tiny": (4, 48), "small": (9, 48), "small+": (9, 64), "base": (16, 48), "base+": (16, 64),
}  # fmt: skip
STEMS = ("1GF", "4GF", "18GF", "36GF")

EAGER, COMPILED, AUTOTUNED = "eager", "compiled", "max-autotune-no-cudagraphs"

# Training images per step and GPU: of 1024 on 8 in arXiv 2103.10697, of 2048 to 512 in 2106.14881.
_PAPERS = {"4GF": 256, "1GF": 256, "18GF": 128, "36GF": 64}


class Contest(NamedTuple):
    """Models of both families and libraries at one setting, timed in turns."""

    pair: str
    size: str
    mode: str = "inference"
    batch: int = 256
    dtype: str = "bfloat16"
    image_size: int = 224
    #: How PyTorch runs the models; inference is also replayed from CUDA graphs.
    way: str = EAGER

    @property
    def name(self) -> str:
        side = self.image_size
        return (
            f"{self.pair} {self.size} {self.mode} B={self.batch} {self.dtype} {side}x{side} "
            f"{self.way}"
        )

    @property
    def least(self) -> float:
        """Seconds that have to be left for it to be begun."""
        # Four models of twelve blocks to compile; autotuning tries each product's tiles.
        return {EAGER: 0.0, COMPILED: 90.0, AUTOTUNED: 150.0}[self.way]


def _full() -> Iterator[Contest]:
    convits = ("small", "base", "small+", "base+", "tiny")
    stems = ("4GF", "1GF", "18GF", "36GF")
    main = ((CONVIT, "small"), (VIT_C, "4GF"))
    # What the targets ask for.
    yield Contest(CONVIT, "small")
    yield Contest(VIT_C, "4GF")
    yield Contest(CONVIT, "small", batch=1)
    yield from (Contest(CONVIT, size) for size in convits[1:])
    yield from (Contest(VIT_C, size) for size in stems[1:])
    # Training, with the papers' batches.
    yield Contest(CONVIT, "small", "training", 128)
    yield Contest(VIT_C, "4GF", "training", 256)
    yield from (Contest(CONVIT, size, "training", 128) for size in convits[1:])
    yield from (Contest(VIT_C, size, "training", _PAPERS[size]) for size in stems[1:])
    # Compiled.
    yield from (Contest(*which, way=COMPILED) for which in main)
    yield Contest(CONVIT, "small", "training", 128, way=COMPILED)
    yield Contest(VIT_C, "4GF", "training", 256, way=COMPILED)
    yield Contest(CONVIT, "small", way=AUTOTUNED)
    # Other batches, numbers and resolutions of the two main models, then of all.
    yield Contest(VIT_C, "4GF", batch=1)
    yield from (Contest(*which, batch=batch) for batch in (64, 8) for which in main)
    yield from (Contest(*which, dtype=dtype) for dtype in ("float16", "tf32") for which in main)
    larger = ((384, 64), (512, 32))
    yield from (
        Contest(*which, mode, batch, image_size=side)
        for mode, (side, batch), which in product(("inference", "training"), larger, main)
    )
    yield from (Contest(*which, "training", batch) for batch in (64, 256) for which in main)
    yield from (Contest(*which, "training", 128, dtype="float16") for which in main)
    yield from (Contest(*which, "training", 64, dtype="tf32") for which in main)
    yield from (Contest(*which, batch=64, dtype="float32") for which in main)
    others = [(CONVIT, size) for size in convits[1:]] + [(VIT_C, size) for size in stems[1:]]
    yield from (Contest(*which, batch=batch) for batch in (1, 8, 64) for which in others)
    yield from (Contest(*which, batch=64, image_size=384) for which in others)
    yield from (Contest(*which, dtype="float16") for which in others)
    yield from (Contest(*which, batch=1, way=COMPILED) for which in main)
    yield Contest(CONVIT, "base", way=COMPILED)
    yield from (Contest(*which, "training", 8) for which in main)


FULL = tuple(dict.fromkeys(_full()))

# Every way through the code once: modes, ways, numbers with and without tf32, a larger image.
_DRY = {"batch": 2, "image_size": 32}
DRY = (
    Contest(CONVIT, "dry", **_DRY),
    Contest(VIT_C, "dry", **_DRY),
    Contest(CONVIT, "dry", "training", **_DRY),
    Contest(VIT_C, "dry", "training", **_DRY),
    Contest(CONVIT, "dry", way=COMPILED, **_DRY),
    Contest(VIT_C, "dry", "training", way=COMPILED, **_DRY),
    Contest(CONVIT, "dry", batch=2, image_size=48, dtype="tf32"),
)


def contests(*, dry: bool) -> tuple[Contest, ...]:
    """All of a run; those that the time does not reach are recorded as missed."""
    return DRY if dry else FULL

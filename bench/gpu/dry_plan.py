# SPDX-License-Identifier: Apache-2.0
"""The same in sizes that a processor and an interpreter of kernels take seconds for."""

from __future__ import annotations

from gpu.plan import Plan
from gpu.shapes import Embedding, Group, Shape, Stem


def _dry() -> Plan:
    shape = Shape("S", 1, 1, 16, 16, (4, 4))
    stem = Stem("tiny", 2, (8, 8), (8, 16), (2, 2), 16)
    return Plan(
        groups=(
            Group("4x5", "gpsa", 1, 1, 16, (4, 5), ("tokens", "misaligned"), ("float32",)),
            Group("plain 17", "mhsa", 1, 1, 16, (1, 17), dtypes=("bfloat16",)),
            Group("dropout", "gpsa_dropout", 1, 1, 16, (3, 4), dtypes=("bfloat16",)),
        ),
        shapes=(shape, Shape("S", 1, 1, 16, 17, None)),
        timed=(
            (shape, "bfloat16"),
            (Shape("S", 1, 1, 16, 17, None), "bfloat16"),
            (shape, "tf32"),
        ),
        compiled=(shape,),
        autotuned=(shape,),
        copied=2**18,
        products=((64, 64, 64), (2, 32, 32, 32)),
        exponents=1024,
        rounds=2,
        hosted=1,
        far=4096 + 64,
        embedded=((Embedding(2, 24, 4, (8, 12)), ("planar", "cropped")),),
        embedding_dtypes=("float32", "bfloat16"),
        embeddings=((Embedding(2, 16, 4, (8, 8)), "bfloat16"),),
        stems_checked=((Stem("tiny", 1, (9, 7), (8, 16), (2, 2), 24), ("planar",)),),
        stems=(stem,),
        # A stage less takes a quarter of the time.
        stems_timed=(
            (stem, "bfloat16"),
            (stem._replace(channels=(8,), strides=(2,)), "tf32"),
        ),
        stems_compiled=(stem,),
        sanitized=(
            ("gpsa", "float32", 1, 1, (2, 3), 16),
            ("patch_embed uint8", "bfloat16", 1, 4, (2, 3), 16),
            ("conv_stem", "bfloat16", 1, 8, (5, 6), 16),
        ),
    )


DRY = _dry()

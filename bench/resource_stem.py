# SPDX-License-Identifier: Apache-2.0
"""What ``bench/resources.py`` compiles of the convolutional stem, one launch each."""

from __future__ import annotations

from kernels.ahead.stem import Case

# At most 40 pairs of a kernel and a case. Batches are 256, but 1 where a small call is the case.
CASES = (
    # The first two layers of ViT_C 1GF, 4GF, and 18GF and 36GF, and the widths around them.
    Case("stem_pair", "bfloat16", 256, (224, 224), (3, 24, 48), (2, 2)),
    Case("stem_pair", "bfloat16", 256, (224, 224), (3, 48, 96), (2, 2)),
    Case("stem_pair", "float16", 256, (224, 224), (3, 48, 96), (2, 2), pixels=True),
    Case("stem_pair", "bfloat16", 256, (224, 224), (3, 64, 128), (2, 2)),
    Case("stem_pair", "float16", 256, (224, 224), (3, 64, 128), (2, 2), pixels=True),
    Case("stem_pair", "bfloat16", 256, (224, 224), (4, 64, 128), (2, 1), pixels=True),
    Case("stem_pair", "bfloat16", 1, (224, 224), (4, 16, 40), (1, 2), pixels=True),
    # The first layer, and the later ones, by themselves.
    Case("stem_first", "bfloat16", 256, (224, 224), (3, 48), (2,), training=True),
    Case("stem_first", "float16", 256, (224, 224), (4, 72), (1,), pixels=True),
    Case("stem_first", "tf32", 256, (224, 224), (3, 64), (2,), training=True, pixels=True),
    Case("stem_first", "ieee", 256, (224, 224), (4, 24), (2,)),
    Case("stem_conv", "bfloat16", 256, (56, 56), (48, 96), (2,)),
    Case("stem_conv", "bfloat16", 256, (56, 56), (96, 192), (2,)),
    Case("stem_conv", "bfloat16", 256, (56, 56), (128, 128), (1,)),
    Case("stem_conv", "float16", 256, (28, 28), (256, 256), (1,)),
    Case("stem_conv", "bfloat16", 1, (28, 28), (192, 384), (2,)),
    Case("stem_conv", "float16", 256, (112, 112), (24, 48), (2,), training=True),
    Case("stem_conv", "bfloat16", 256, (112, 112), (48, 96), (2,), training=True),
    Case("stem_conv", "bfloat16", 256, (56, 56), (96, 192), (2,), training=True),
    Case("stem_conv", "float16", 256, (28, 28), (256, 512), (2,), training=True),
    Case("stem_conv", "tf32", 256, (56, 56), (96, 192), (2,), training=True),
    Case("stem_conv", "ieee", 256, (56, 56), (128, 256), (2,)),
    # Tokens.
    Case("stem_tokens", "bfloat16", 256, (14, 14), (192, 192)),
    Case("stem_tokens", "bfloat16", 256, (14, 14), (384, 384), training=True),
    Case("stem_tokens", "float16", 256, (14, 14), (512, 1024)),
    Case("stem_tokens", "bfloat16", 1, (14, 14), (512, 768)),
    Case("stem_tokens", "tf32", 256, (14, 14), (512, 768), training=True),
    Case("stem_tokens", "ieee", 256, (14, 14), (384, 384)),
    # Channels that are no multiple of 8, and images of more than four.
    Case("stem_first", "float16", 256, (224, 224), (7, 50), (2,), pixels=True),
    Case("stem_first", "bfloat16", 256, (224, 224), (6, 20), (2,), training=True),
    Case("stem_conv", "bfloat16", 256, (112, 112), (20, 36), (2,), training=True),
    Case("stem_conv", "bfloat16", 256, (224, 224), (13, 48), (2,)),
    Case("stem_conv", "float16", 256, (56, 56), (191, 191), (1,)),
    Case("stem_conv", "tf32", 256, (56, 56), (37, 101), (2,), training=True),
    Case("stem_tokens", "bfloat16", 256, (14, 14), (36, 100), training=True),
    # Statistics.
    Case("stem_statistics", "bfloat16", 256, (112, 112), (48,), training=True),
    Case("stem_affine", "bfloat16", 256, (112, 112), (48,), training=True),
)

# SPDX-License-Identifier: Apache-2.0
"""What ``bench/resources.py`` compiles of GPSA and plain attention."""

from __future__ import annotations

from kernels.ahead.attention import Case

_STREAM = ("backward_query", "backward_key")
_ALL_BACKWARD = ("backward_tile", *_STREAM)
_BOTH = ("forward_tile", "forward_stream")
_DROPOUT = ("dropout_query", "dropout_key")

# At most 48 pairs of a kernel and a case; an architecture compiles those that it chooses. Batches
# are 256 for grids like 14x14 and 64 above, but 1 or 2 where a small call is the case.
CASES = (
    # ConViT-S at 224 pixels, ViT at 224 pixels, and the widths around them.
    Case("forward", "bfloat16", 256, 9, (14, 14), 48, ("position_table", "forward_tile")),
    Case("forward", "bfloat16", 1, 4, (14, 14), 48, ("forward_tile",)),
    Case("forward", "bfloat16", 256, 12, 197, 64, ("forward_tile",)),
    Case("forward", "bfloat16", 256, 12, (16, 16), 64, ("forward_tile",)),
    Case("forward", "bfloat16", 2, 6, (16, 16), 64, _BOTH),
    Case("forward", "float16", 256, 12, (7, 7), 16, ("forward_tile",)),
    Case("forward", "bfloat16", 256, 6, (7, 28), 40, ("forward_tile",)),
    Case("forward", "bfloat16", 256, 8, (14, 14), 80, _BOTH),
    Case("forward", "float16", 256, 6, (16, 16), 128, _BOTH),
    # More tokens than a tile has.
    Case("forward", "bfloat16", 64, 9, (24, 24), 48, ("kronecker", "forward_stream")),
    Case("forward", "bfloat16", 64, 6, (64, 64), 64, ("kronecker", "forward_stream")),
    # float32.
    Case("forward", "tf32", 256, 9, (14, 14), 48, ("forward_stream",)),
    Case("forward", "ieee", 256, 6, 197, 128, ("forward_stream",)),
    # Backward.
    Case("backward", "bfloat16", 256, 9, (14, 14), 48, (*_ALL_BACKWARD, "factor_gradient")),
    Case("backward", "float16", 256, 12, 197, 64, _ALL_BACKWARD),
    Case("backward", "bfloat16", 256, 12, (7, 7), 64, ("backward_tile",)),
    Case("backward", "bfloat16", 256, 8, (14, 14), 112, _STREAM),
    Case("backward", "float16", 64, 6, (24, 24), 128, (*_STREAM, "factor_gradient")),
    Case(
        "backward",
        "bfloat16",
        64,
        6,
        (64, 64),
        64,
        ("position_factors", "factor_gradient", "parameter_gradient"),
    ),
    Case("backward", "tf32", 64, 6, (24, 24), 128, (*_STREAM, "factor_gradient")),
    Case("backward", "ieee", 256, 6, (14, 14), 128, _STREAM),
    Case("backward", "ieee", 64, 6, (64, 64), 64, ("kronecker", "factor_gradient")),
    # Attention dropout.
    Case("forward", "bfloat16", 256, 9, (14, 14), 48, ("dropout_forward",), dropout=True),
    Case("forward", "ieee", 64, 6, (24, 24), 128, ("dropout_forward",), dropout=True),
    Case("backward", "bfloat16", 256, 9, (14, 14), 48, _DROPOUT, dropout=True),
    Case("backward", "tf32", 64, 6, (24, 24), 128, _DROPOUT, dropout=True),
)

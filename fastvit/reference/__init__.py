# SPDX-License-Identifier: Apache-2.0
"""The papers' arithmetic as written, in plain PyTorch: the oracle for everything else.

Nothing here is clever: N x N maps are formed, positions are an (N, N, 3) tensor, images are
normalised before they are convolved. Tests, benchmarks and the ``reference`` backend all use
these definitions and no others.
"""

from fastvit.reference.conv_stem import (
    ConvBNReLU,
    ConvStage,
    ConvStem,
    Projection,
    conv_stem,
    stage_grids,
)
from fastvit.reference.gpsa import (
    GPSA,
    gpsa_attention,
    mixed_attention_map,
    relative_positions,
)
from fastvit.reference.mhsa import MHSA, attention, attention_map
from fastvit.reference.patch_embed import (
    PatchEmbed,
    assemble_tokens,
    normalize_images,
    patch_embed,
    resample_patch_weight,
)

__all__ = [
    "GPSA",
    "MHSA",
    "ConvBNReLU",
    "ConvStage",
    "ConvStem",
    "PatchEmbed",
    "Projection",
    "assemble_tokens",
    "attention",
    "attention_map",
    "conv_stem",
    "gpsa_attention",
    "mixed_attention_map",
    "normalize_images",
    "patch_embed",
    "relative_positions",
    "resample_patch_weight",
    "stage_grids",
]

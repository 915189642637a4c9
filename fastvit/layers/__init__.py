# SPDX-License-Identifier: Apache-2.0
"""The layers: the reference modules, with a forward that takes the fastest backend."""

from fastvit.layers.conv_stem import ConvStem
from fastvit.layers.gpsa import GPSA
from fastvit.layers.mhsa import MHSA
from fastvit.layers.patch_embed import PatchEmbed

__all__ = ["GPSA", "MHSA", "ConvStem", "PatchEmbed"]

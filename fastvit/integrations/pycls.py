# SPDX-License-Identifier: Apache-2.0
"""pycls: both stems of its vision transformer, whose tokens the model makes itself."""

from __future__ import annotations

from fastvit.integrations.adapter import Accelerated
from fastvit.integrations.stem import AcceleratedStem

ADAPTERS: dict[str, type[Accelerated]] = {"pycls.models.vit.ViTStemConv": AcceleratedStem}
#: Convolutions that make patches, by the model and the place in it.
PATCH_CONVOLUTIONS = {"pycls.models.vit.ViTStemPatchify": "patchify"}

# SPDX-License-Identifier: Apache-2.0
"""pycls: both stems of its vision transformer. The model puts its tokens sequence first before it
adds class token and positions, so that these stay its own.
"""

from __future__ import annotations

from typing import Any

from fastvit.integrations.adapter import Accelerated
from fastvit.integrations.stem import AcceleratedStem


class StemConv(AcceleratedStem):
    """With pycls' name of the argument."""

    def forward(self, x: Any) -> Any:
        return super().forward(x)


ADAPTERS: dict[str, type[Accelerated]] = {"pycls.models.vit.ViTStemConv": StemConv}
#: Convolutions that make patches, by the model and the place in it.
PATCH_CONVOLUTIONS = {"pycls.models.vit.ViTStemPatchify": "patchify"}

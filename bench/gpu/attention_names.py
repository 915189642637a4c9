# SPDX-License-Identifier: Apache-2.0
"""Names that tables need where there is no torch."""

from __future__ import annotations

#: Backends of PyTorch's attention.
SDPA = ("flash", "efficient", "cudnn", "math")

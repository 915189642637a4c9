# SPDX-License-Identifier: Apache-2.0
"""``kernels/ahead/model.py`` for the scripts of this folder that run without fastvit."""

from __future__ import annotations

import runpy
from pathlib import Path

# By its path: the clone's root on sys.path would shadow the installed package.
_MODEL = Path(__file__).resolve().parents[1] / "kernels" / "ahead" / "model.py"
globals().update({k: v for k, v in runpy.run_path(str(_MODEL)).items() if not k.startswith("__")})

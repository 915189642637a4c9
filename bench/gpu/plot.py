# SPDX-License-Identifier: Apache-2.0
"""The pictures of a run: those that it has data for, light and dark."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

#: What stood in a picture when it was drawn, by path. The report is written after every stage, and
#: drawing takes seconds of the GPU's time.
_drawn: dict[Path, str] = {}


def write(out: Path, records: dict[str, dict[str, Any]], *, dry: bool) -> str:
    """Draw what there is to draw; the Markdown that shows it, and says why there is no more."""
    # The driver runs where fastvit need not be installed; its pictures need nothing that is built.
    sys.path.insert(1, str(ROOT))
    try:
        import matplotlib  # noqa: F401
        from figures import gpu

        from fastvit.benchmark.pictures import theme
    except ImportError as error:
        return f"No pictures: {error}."
    finally:
        # Its `kernels` and others would be top-level names.
        sys.path.remove(str(ROOT))

    shown, missing = [], []
    for name, draw in gpu.pictures(records, _epoch_rows(out), dry=dry).items():
        path, data = out / f"{name}.svg", gpu.data_of(draw)
        try:
            if _drawn.get(path) != data or not path.exists():
                theme.write(out, name, draw)
                _drawn[path] = data
            shown.append(theme.shown(name, name.replace("_", " ")))
        except theme.NothingToDraw as reason:
            missing.append(f"- {name}: {reason}")
        # One that fails must not take the others along.
        except Exception as error:
            missing.append(f"- {name}: {type(error).__name__}: {error}")
    if missing:
        shown.append("No picture:\n\n" + "\n".join(missing))
    return "\n\n".join(shown)


def _epoch_rows(out: Path) -> list[dict[str, Any]]:
    try:
        return json.loads((out / "epoch.json").read_text("utf-8"))["rows"]
    except (OSError, ValueError, KeyError):
        return []

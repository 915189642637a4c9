# SPDX-License-Identifier: Apache-2.0
"""summary.svg: how near each core comes to its floor, beside the fastest plain attention."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

_OURS, _PEER = "#0969da", "#8c959f"


def write(out: Path, records: dict[str, dict[str, Any]], *, dry: bool) -> str:
    """Draw it if there is something to draw; the line of Markdown that shows it or says why not."""
    cases = [
        case
        for case in records.get("kernels", {}).get("cases", [])
        if case["what"] == "core" and "share" in case["contenders"]["fastvit"]
    ]
    if not cases:
        return "No picture: no core was timed against known ceilings."
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "No picture: matplotlib is not installed."
    figure = Figure(figsize=(8.3, 1.2 + 0.25 * len(cases)), facecolor="white", layout="tight")
    axes = figure.add_subplot()
    for y, case in enumerate(cases):
        found = case["contenders"]
        peers = [t for n, t in found.items() if n != "fastvit" and "share" in t]
        axes.plot(100 * found["fastvit"]["share"], y, "o", color=_OURS)
        if peers:
            axes.plot(100 * max(t["share"] for t in peers), y, "o", color=_PEER, fillstyle="none")
    axes.set_yticks(range(len(cases)), [_label(case) for case in cases], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(axis="x", color="#d8dee4")
    title = "% of the floor's speed: fastvit (filled), fastest plain attention (hollow)"
    axes.set_title(f"dry run, not a measurement: {title}" if dry else title, fontsize=9)
    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    (out / "summary.svg").write_text(content.getvalue(), "utf-8")
    return "![Share of the floor](summary.svg)"


def _label(case: dict[str, Any]) -> str:
    shape = case["shape"]
    return f"{shape['label']} N={shape['N']} B={shape['B']} {case['mode']}"

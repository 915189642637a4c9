# SPDX-License-Identifier: Apache-2.0
"""The Python in the README and in the pages of docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def examples(document: Path) -> list[tuple[int, str]]:
    """The blocks that are marked as Python, each with its first line."""
    text = text_of(document)
    found = re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


def run(document: Path) -> dict[str, Any]:
    """Run the blocks one after the other in one namespace, as somebody reads them."""
    namespace: dict[str, Any] = {"__name__": "documentation"}
    for line, code in examples(document):
        # Blank lines in front, so that a traceback has the line of the page.
        exec(compile("\n" * line + code, str(document), "exec"), namespace)
    return namespace

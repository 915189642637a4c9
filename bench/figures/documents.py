# SPDX-License-Identifier: Apache-2.0
"""Blocks of figures in documents: ``<!-- figures: NAME -->`` to ``<!-- end figures -->``.

A block is lines of its own, or stands within a sentence; it is filled as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

Make = Callable[[str], str]

_BLOCK = re.compile(
    r"(?P<open><!-- figures: (?P<name>[^\n]+?) -->)(?P<text>.*?)(?P<close><!-- end figures -->)",
    re.DOTALL,
)


def filled(text: str, make: Make) -> str:
    """The text with every block made anew.

    Args:
        make: gives the content for a name.
    """

    def one(match: re.Match[str]) -> str:
        return match["open"] + _framed(match["text"], make(match["name"])) + match["close"]

    return _BLOCK.sub(one, text)


def differing(text: str, make: Make) -> dict[str, tuple[str, str]]:
    """Blocks whose text is not what is made now: both, by name."""
    found: dict[str, tuple[str, str]] = {}
    for match in _BLOCK.finditer(text):
        expected = _framed(match["text"], make(match["name"]))
        if match["text"] != expected:
            found[match["name"]] = (match["text"].strip(), expected.strip())
    return found


def names(text: str) -> list[str]:
    """Of the blocks, in their order."""
    return [match["name"] for match in _BLOCK.finditer(text)]


def _framed(old: str, new: str) -> str:
    """A block that stood in lines of its own still does."""
    return f"\n\n{new}\n\n" if old.startswith("\n") else new


def write(path: Path, make: Make) -> bool:
    """Fill the blocks of a file; whether it changed."""
    text = path.read_text("utf-8")
    made = filled(text, make)
    if made != text:
        path.write_text(made, "utf-8")
    return made != text


def maker(blocks: Mapping[str, Callable[[], str]], figure: Make) -> Make:
    """What gives a block by its name, or a single figure by a name with slashes.

    Raises:
        KeyError: no block is called so; the message has the names.
    """

    def make(name: str) -> str:
        if "/" in name:
            return figure(name)
        if name not in blocks:
            raise KeyError(f"no block is called {name!r}; there are {', '.join(blocks)}")
        return blocks[name]()

    return make

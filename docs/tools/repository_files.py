# SPDX-License-Identifier: Apache-2.0
"""Hook of MkDocs: files of the repository that pages link to become part of the site.

Pages are read in two places, as files of a repository and as a site. In the first a link such as
``../bench/results/x.md`` leads out of ``docs/``; for the second the file it names is put under
``repository/``, with what it links to in turn, and the link is changed. A link to what does not
exist stays as it is, and the strict build refuses it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# Of Markdown, and of the HTML of pictures that have a dark variant.
_LINK = re.compile(r"(\]\(|\bsrc(?:set)?=\")([^)\s#:\"]+)")


def _target(source: Path, link: str) -> Path | None:
    """The file of the repository that a link in another names, or None."""
    target = Path(os.path.normpath(source.parent / link))
    return target if target.is_file() and target.is_relative_to(ROOT) else None


def _outside(source: Path) -> set[Path]:
    """Files that a page links to and that are not in ``docs/``."""
    links = _LINK.finditer(source.read_text(encoding="utf-8"))
    found = {_target(source, match[2]) for match in links}
    return {path for path in found if path is not None and not path.is_relative_to(DOCS)}


def _place(path: Path) -> str:
    """Where the site has a file."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"repository/{path.relative_to(ROOT).as_posix()}"


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add what is linked."""
    waiting = set().union(*map(_outside, DOCS.rglob("*.md")))
    added: set[Path] = set()
    while waiting:
        path = waiting.pop()
        added.add(path)
        files.append(File.generated(config, _place(path), abs_src_path=str(path)))
        if path.suffix == ".md":
            waiting |= _outside(path) - added
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Change the links of a page to the places of the site."""
    source = Path(page.file.abs_src_path or "")
    here = PurePosixPath(page.file.src_uri).parent

    def changed(match: re.Match[str]) -> str:
        path = _target(source, match[2])
        return match[0] if path is None else match[1] + os.path.relpath(_place(path), here)

    return _LINK.sub(changed, markdown)

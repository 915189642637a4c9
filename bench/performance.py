# SPDX-License-Identifier: Apache-2.0
"""Fills the figures of the documents and draws their pictures, from the results in bench/results.

    python bench/performance.py --write   fill the blocks of README.md and docs/performance.md, and
                                          draw docs/pictures
    python bench/performance.py --check   print each block and picture that differs; 1 if one does

Blocks are described in ``figures/documents.py``. A file whose figures do not follow from its
samples is refused.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from figures import cited, documents, drawn, graphics, load, predicted, processor  # noqa: E402

DOCUMENTS = ("README.md", "docs/performance.md")


def maker(root: Path, document: str) -> documents.Make:
    """What makes the blocks of a document."""
    base = (root / document).parent
    blocks = processor.blocks(root, base) | {
        "gpu": lambda: graphics.tables(root, base),
        "gpu state": lambda: graphics.state(root),
        "published": cited.published_table,
        "published range": cited.published_range,
        "published gpu range": cited.published_gpu_range,
        "predicted": lambda: predicted.table(root),
    }
    return documents.maker(blocks, lambda name: processor.figure(root, name))


def check(root: Path) -> list[str]:
    """What differs, in words: for each block the lines that are there and should be."""
    found = []
    for document in DOCUMENTS:
        text = (root / document).read_text("utf-8")
        for name, (old, new) in documents.differing(text, maker(root, document)).items():
            lines = difflib.unified_diff(
                old.splitlines(), new.splitlines(), "in the document", "from the results",
                lineterm="", n=0,
            )  # fmt: skip
            found.append(f"{document}, block {name}:\n" + "\n".join(lines))
    try:
        found += [f"{file} is not what the results give" for file in drawn.differing(root)]
    except ImportError as error:
        print(f"pictures are not compared: {error}")
    return found


def write(root: Path) -> None:
    """Fill all blocks and draw all pictures."""
    for document in DOCUMENTS:
        if documents.write(root / document, maker(root, document)):
            print(f"{document}: filled anew")
    for sentence in drawn.write(root):
        print(f"no picture: {sentence}")


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="fill the documents, draw")
    action.add_argument("--check", action="store_true", help="print what differs; 1 if something")
    options = parser.parse_args()
    try:
        if options.write:
            write(ROOT)
            return 0
        found = check(ROOT)
    except load.Doctored as problem:
        print(f"refused: {problem}")
        return 1
    print("\n\n".join(found) or "documents and pictures are those of the results")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

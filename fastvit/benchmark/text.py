# SPDX-License-Identifier: Apache-2.0
"""Plain and Markdown tables, and the sentences around the benchmark's tables."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from fastvit.benchmark.result import FORMULA, IMAGES_PER_EPOCH, Result

NOTHING = "–"

#: A cell: its text, or what was counted or measured beside what the paper prints.
Cell = str | tuple[str, str]


@dataclass(frozen=True)
class Column:
    """Heading of a column; figures are right-aligned, names are not."""

    heading: str
    left: bool = False


def render_text(
    columns: Sequence[Column], groups: Sequence[tuple[str, Sequence[Sequence[Cell]]]]
) -> str:
    """Fixed-width table. Each group is a title line and its rows; an empty title shows none.

    The two halves of a paired cell line up, the second in square brackets.
    """
    rows = [row for _, group in groups for row in group]
    halves = [_half_widths([row[i] for row in rows]) for i in range(len(columns))]
    widths = [
        max(len(column.heading), first + second)
        for column, (first, second) in zip(columns, halves, strict=True)
    ]

    def line(cells: Sequence[Cell]) -> str:
        texts = (_pad(c, h) for c, h in zip(cells, halves, strict=True))
        aligned = (
            text.ljust(width) if column.left else text.rjust(width)
            for text, width, column in zip(texts, widths, columns, strict=True)
        )
        return "  ".join(aligned).rstrip()

    lines = [
        "  ".join(
            c.heading.ljust(w) if c.left else c.heading.rjust(w)
            for c, w in zip(columns, widths, strict=True)
        ).rstrip(),
        "-" * (sum(widths) + 2 * (len(widths) - 1)),
    ]
    for title, group in groups:
        if title:
            lines.append(title)
        lines.extend(line(row) for row in group)
    return "\n".join(lines)


def render_markdown(
    columns: Sequence[Column], groups: Sequence[tuple[str, Sequence[Sequence[Cell]]]]
) -> str:
    """The same table in Markdown; a group's title is a row of its own, in italics."""
    lines = [
        _markdown_line([c.heading for c in columns]),
        _markdown_line([":---" if c.left else "---:" for c in columns]),
    ]
    for title, group in groups:
        if title:
            lines.append(_markdown_line([f"*{title}*", *[""] * (len(columns) - 1)]))
        lines.extend(_markdown_line([_flat(cell) for cell in row]) for row in group)
    return "\n".join(lines)


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _flat(cell: Cell) -> str:
    return cell if isinstance(cell, str) else f"{cell[0]} [{cell[1]}]"


def _half_widths(cells: Sequence[Cell]) -> tuple[int, int]:
    pairs = [cell for cell in cells if not isinstance(cell, str)]
    singles = [len(cell) for cell in cells if isinstance(cell, str)]
    second = max((len(printed) + 3 for _, printed in pairs), default=0)
    first = max([len(value) for value, _ in pairs] + singles, default=0)
    return first, second


def _pad(cell: Cell, halves: tuple[int, int]) -> str:
    first, second = halves
    if isinstance(cell, str):
        return cell.rjust(first) + " " * second if second else cell
    return cell[0].rjust(first) + f" [{cell[1]}]".ljust(second)


def notes(results: Sequence[Result], *, device: str, interrupted: bool = False) -> list[str]:
    """What a reader must know to read the tables, one sentence or two per note."""
    said = [
        f"{FORMULA}, with {IMAGES_PER_EPOCH:,} images, b = images per measured step, t_fb = "
        "seconds of forward, cross-entropy and backward, t_opt = seconds of one optimiser step, "
        "B = the paper's training batch / 8 GPUs. Medians of the steps shown, library and "
        "fastvit in turns, synthetic images, no loader.",
        "Library: timm or torchvision as a user has it today, eager, fused attention on. "
        "Optimisers: fused AdamW for transformers, SGD with momentum for convolutional "
        "networks, which are measured once.",
        "Flops (multiply-adds), parameters and activations are counted on the built models; "
        "square brackets hold what the paper prints, in the column batch the training batch. "
        "The ConViT paper prints no activations; its parameters are those without the classifier, "
        "its flops mostly those without the attention's two products.",
        "Paper: minutes per epoch on 8 V100 GPUs in mixed precision, or images per second on "
        "one Quadro GP100 at batch 128. Measured: one device, this machine.",
    ]
    if any(result.row.matched for result in results):
        said.append(
            "matched: the authors' configuration is not public; this one was chosen to meet the "
            "printed flops, parameters and activations."
        )
    if device == "cpu":
        said.append(
            "Measured on a CPU: minutes are extrapolated from a few steps of one or two images "
            "and are no GPU figures."
        )
    if interrupted:
        said.append("The run was interrupted: rows that were not measured are missing.")
    return said


def bullets(lines: Sequence[str], *, width: int = 100) -> str:
    """Lines as a list, wrapped for a terminal."""
    wrapped = (textwrap.wrap(line, width - 2) for line in lines)
    return "\n".join("- " + "\n  ".join(parts) for parts in wrapped)


def failures(results: Sequence[Result]) -> list[str]:
    """One line per row that was not measured, with the figures or the error."""
    return [f"{r.row.name}: {r.status}: {r.reason}" for r in results if r.status != "ok"]

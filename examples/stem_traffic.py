# SPDX-License-Identifier: Apache-2.0
"""Draw what a convolutional stem moves to and from memory, before and after fusion.

Bytes are counted from the shapes of ViT_C's stem: every tensor that a kernel reads or writes, once.
The weights, 2 MB for all images of a batch, are left out. Nothing is measured.

    python examples/stem_traffic.py --out stem_traffic.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

import fastvit

mpl.use("Agg")

from matplotlib import pyplot as plt

# The panel brings its own light background, so that it reads the same on a dark page.
PAPER, INK, MUTED, GRID = "#ffffff", "#1f2328", "#656d76", "#d8dee4"
COLOURS = ("#0969da", "#54aeff", "#8c959f", "#b7bdc5", "#d8dee4")


class Layer(NamedTuple):
    """Bytes of what one image reads and writes, in 16 bits a number."""

    read: int
    written: int


def layers(model: str = "vit_c_4gf", image_size: int = 224) -> list[Layer]:
    """The stem of a model, its 3x3 convolutions and the last 1x1."""
    stem = fastvit.create_model(model).patch_embed.backbone
    convolutions = [*(stage.conv for stage in stem.stages), stem.projection.conv]
    sides = [(image_size, image_size)]
    sides += fastvit.reference.stage_grids(sides[0], [conv.stride[0] for conv in convolutions])
    return [
        Layer(
            2 * conv.in_channels * height * width,
            2 * conv.out_channels * rows * columns,
        )
        for conv, (height, width), (rows, columns) in zip(
            convolutions, sides[:-1], sides[1:], strict=True
        )
    ]


def separate(stem: Sequence[Layer]) -> list[int]:
    """Bytes of each layer: convolution, batch norm and ReLU as kernels of their own."""
    *body, last = stem
    return [x.read + 5 * x.written for x in body] + [last.read + last.written]


def one_kernel_a_layer(stem: Sequence[Layer]) -> list[int]:
    """Batch norm and ReLU at the end of the convolution."""
    return [x.read + x.written for x in stem]


def first_two_together(stem: Sequence[Layer]) -> list[int]:
    """As fastvit's kernels do in inference: what is between the first two layers is not stored."""
    first, second, *others = stem
    return [first.read, second.written, *(x.read + x.written for x in others)]


def draw(stem: Sequence[Layer], title: str) -> plt.Figure:
    plans = (
        ("convolution, batch norm, ReLU\na kernel each", separate(stem)),
        ("one kernel a layer", one_kernel_a_layer(stem)),
        ("one kernel a layer,\nthe first two together", first_two_together(stem)),
    )
    figure, axes = plt.subplots(figsize=(8.3, 3.3), layout="constrained", facecolor=PAPER)
    axes.set_facecolor(PAPER)
    for y, (_, moved) in enumerate(plans):
        left = 0.0
        for layer, count in enumerate(moved):
            width = count / 1e6
            axes.barh(y, width, left=left, height=0.55, color=COLOURS[layer], edgecolor=PAPER)
            if width > 0.28:
                style = {"ha": "center", "va": "center", "fontsize": 9}
                colour = PAPER if layer == 0 else INK
                axes.text(left + width / 2, y, f"{layer + 1}", color=colour, **style)
            left += width
        axes.text(left + 0.15, y, f"{left:.2f} MB", va="center", color=INK, fontsize=10)
    axes.set_yticks(range(len(plans)), [name for name, _ in plans])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * sum(plans[0][1]) / 1e6)
    axes.set_xlabel("MB read and written for one image, by layer", color=MUTED)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    return figure


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("stem_traffic.svg"))
    path = parser.parse_args(argv).out
    # The same bytes every time; text as text, which browsers search and readers select.
    style = {"svg.hashsalt": "fastvit", "svg.fonttype": "none", "font.family": "sans-serif"}
    with mpl.rc_context(style):
        title = "The stem of ViT_C-4GF in inference, 224 x 224, 16 bits a number (counted)"
        figure = draw(layers(), title)
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)
    return path


if __name__ == "__main__":
    main()

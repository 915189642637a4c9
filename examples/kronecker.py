# SPDX-License-Identifier: Apache-2.0
"""Draw why GPSA's position map needs no N x N matrix: it is a Kronecker product.

With the maps of a real layer, ConViT-S's first at its initial weights: the full map of one head as
the reference computes it, and the two small factors whose product it is.

    python examples/kronecker.py --out kronecker.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor

import fastvit

mpl.use("Agg")

from matplotlib import pyplot as plt


def position_map(pos_weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, N) as the paper writes it: a softmax over all pairs of patches."""
    return (fastvit.reference.relative_positions(grid)[0] @ pos_weight).softmax(-1)


def axis_factor(linear: Tensor, square: Tensor, side: int) -> Tensor:
    """(side, side): the softmax along one axis of the grid."""
    i = torch.arange(float(side))
    offset = i[None, :] - i[:, None]
    return (linear * offset + square * offset.square()).softmax(-1)


def draw(pos_weight: Tensor, grid: tuple[int, int], query: tuple[int, int]) -> plt.Figure:
    rows, columns = grid
    full = position_map(pos_weight, grid)
    a, b, c = pos_weight
    py, px = axis_factor(b, c, rows), axis_factor(a, c, columns)
    error = float((full - torch.kron(py, px)).abs().max())

    figure, axes = plt.subplots(1, 5, figsize=(15, 3.9), layout="constrained")
    # The square root, so that what is small shows.
    style = {"cmap": "inferno", "norm": mpl.colors.PowerNorm(0.5, vmin=0.0, vmax=1.0)}
    N = rows * columns
    for axis, values, title in (
        (axes[0], full, f"position map P\n{N} × {N} = {N * N:,} numbers"),
        (axes[1], py, f"= Py  ⊗\n{rows} × {rows}, vertical"),
        (axes[2], px, f"Px\n{columns} × {columns}, horizontal"),
    ):
        axis.imshow(values.numpy(), **style)
        axis.set_title(title, fontsize=12)
        axis.set_xlabel("key")
        axis.set_ylabel("query")
    row = full[query[0] * columns + query[1]].view(grid)
    product = torch.outer(py[query[0]], px[query[1]])
    for axis, values, title in (
        (axes[3], row, f"one row of P, query {query}\non the {rows} × {columns} patches"),
        (axes[4], product, "the same from Py and Px:\na row of each, multiplied"),
    ):
        axis.imshow(values.numpy(), **style)
        axis.plot(query[1], query[0], "s", markerfacecolor="none", color="cyan", markersize=11)
        axis.set_title(title, fontsize=12)
        axis.set_xlabel("column")
        axis.set_ylabel("row")
    figure.suptitle(
        f"softmax(a dx + b dy + c (dx² + dy²)) = Py ⊗ Px: {rows**2 + columns**2} numbers a head "
        f"instead of {N * N:,}; largest difference here {error:.1e}",
        fontsize=13,
    )
    return figure


def main(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--head", type=int, default=8, help="of ConViT-S's nine")
    parser.add_argument("--out", type=Path, default=Path("kronecker.png"))
    args = parser.parse_args(argv)
    model = fastvit.create_model("convit_small")
    pos_weight = model.blocks[0].attn.pos_proj.weight.detach()[args.head]
    figure = draw(pos_weight, model.grid_size, (5, 6))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=80)
    print(args.out)
    return args.out


if __name__ == "__main__":
    main()

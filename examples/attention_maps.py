# SPDX-License-Identifier: Apache-2.0
"""Draw where the heads of a ConViT look, on real photographs.

For each photograph a PNG: the chosen patch; of each head of one GPSA layer what that patch attends
to, drawn over the photograph, with the head's gate (its share of position) and its mean distance;
and below it the position map alone. After figures 1 and 5 of arXiv 2103.10697.

    pip install 'fastvit[examples]'
    python examples/attention_maps.py --out pictures
    python examples/attention_maps.py --pretrained --block 3 --patch 4 8 --photo my.jpg

Without ``--pretrained`` (weights from timm, over the network) or ``--checkpoint`` the weights are
the initial ones, in which every head starts as one pixel of a convolution.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from skimage import color, data, io, transform
from torch import Tensor

import fastvit

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

#: Photographs that come with scikit-image.
PHOTOS = {"astronaut": data.astronaut, "cat": data.chelsea, "coffee": data.coffee}
HEADS_PER_ROW = 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_photo(name: str, size: int) -> np.ndarray:
    """The middle square of a photograph, (size, size, 3) in 0..1."""
    photo = PHOTOS[name]() if name in PHOTOS else io.imread(name)
    photo = (color.gray2rgb(photo) if photo.ndim == 2 else photo)[..., :3]
    side = min(photo.shape[:2])
    top, left = ((length - side) // 2 for length in photo.shape[:2])
    square = photo[top : top + side, left : left + side]
    return transform.resize(square, (size, size), anti_aliasing=True)


def normalized(photo: np.ndarray) -> Tensor:
    image = torch.from_numpy((photo - MEAN) / STD)
    return image.permute(2, 0, 1)[None].float()


@torch.no_grad()
def position_map(layer: fastvit.GPSA, grid: tuple[int, int]) -> Tensor:
    """What position alone attends to, (H, N, N)."""
    positions = layer.get_rel_indices(grid[0] * grid[1], grid)
    return layer.pos_proj(positions)[0].permute(2, 0, 1).softmax(-1)


def draw(
    photo: np.ndarray,
    attention: fastvit.AttentionMap,
    position: Tensor,
    grid: tuple[int, int],
    patch: tuple[int, int],
    title: str,
) -> plt.Figure:
    """One figure: the photograph at the left, two pictures a head beside it."""
    heads = attention.map.shape[1]
    query = patch[0] * grid[1] + patch[1]
    columns = min(heads, HEADS_PER_ROW)
    bands = math.ceil(heads / columns)
    figure, axes = plt.subplots(
        2 * bands, columns + 1, figsize=(2.0 * (columns + 1), 4.5 * bands), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].imshow(photo)
    axes[0, 0].set_title("patch", fontsize=10)
    outline(axes[0, 0], photo, grid, patch)
    gray = color.rgb2gray(photo)
    for head in range(heads):
        band, column = divmod(head, columns)
        above, below = axes[2 * band, column + 1], axes[2 * band + 1, column + 1]
        gate, distance = float(attention.gate[head]), float(attention.distance[head])
        above.set_title(f"head {head}, gate {gate:.2f}\ndistance {distance:.1f}", fontsize=10)
        above.imshow(gray, cmap="gray", vmin=0, vmax=1)
        paint(above, attention.map[0, head, query], grid, photo, see_through=True)
        outline(above, photo, grid, patch)
        below.set_title("position alone", fontsize=10)
        paint(below, position[head, query], grid, photo, see_through=False)
        outline(below, photo, grid, patch)
    figure.suptitle(title, fontsize=11)
    return figure


def paint(
    axis: plt.Axes, row: Tensor, grid: tuple[int, int], photo: np.ndarray, see_through: bool
) -> None:
    """One row of a map, brightest where it is largest, and clear where it is small if
    ``see_through``.
    """
    height, width = photo.shape[:2]
    values = row.reshape(grid).float().numpy()
    alpha = np.sqrt(values / values.max()) if see_through else 1.0
    axis.imshow(values, cmap="inferno", alpha=alpha, extent=(0, width, height, 0), vmin=0)


def outline(
    axis: plt.Axes, photo: np.ndarray, grid: tuple[int, int], patch: tuple[int, int]
) -> None:
    height, width = photo.shape[0] / grid[0], photo.shape[1] / grid[1]
    corner = (patch[1] * width, patch[0] * height)
    axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="cyan", linewidth=1.5))


def make_model(args: argparse.Namespace) -> tuple[fastvit.models.ConViT, str]:
    """The model and in words where its weights come from."""
    model = fastvit.create_model(args.model).eval()
    if args.pretrained:
        import timm

        source = timm.create_model(args.model, pretrained=True)
        fastvit.models.load_checkpoint(model, source.state_dict())
        return model, "timm's weights"
    if args.checkpoint:
        fastvit.models.load_checkpoint(model, args.checkpoint)
        return model, Path(args.checkpoint).name
    return model, "initial weights"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="convit_tiny", help="a ConViT of fastvit's")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="timm's weights (network)")
    weights.add_argument("--checkpoint", help="a file of weights")
    parser.add_argument("--photo", nargs="+", default=list(PHOTOS), help="names or files")
    parser.add_argument("--block", type=int, default=0, help="which block's attention")
    parser.add_argument("--patch", type=int, nargs=2, default=(5, 6), metavar=("ROW", "COLUMN"))
    parser.add_argument("--out", type=Path, default=Path("attention_maps"), help="a folder")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[Path]:
    args = parse(argv)
    torch.manual_seed(args.seed)
    model, weights = make_model(args)
    layer, grid, patch = f"blocks.{args.block}.attn", model.grid_size, tuple(args.patch)
    gated = [i for i, b in enumerate(model.blocks) if isinstance(b.attn, fastvit.GPSA)]
    if args.block not in gated:
        raise SystemExit(f"--block: expected a block with GPSA, {gated}, got {args.block}")
    if not all(0 <= p < side for p, side in zip(patch, grid, strict=True)):
        raise SystemExit(f"--patch: expected a row and a column within {grid}, got {patch}")
    args.out.mkdir(parents=True, exist_ok=True)
    written = []
    for name in args.photo:
        photo = load_photo(name, model.img_size[0])
        attention = fastvit.attention_maps(model, normalized(photo))[layer]
        position = position_map(model.get_submodule(layer), grid)
        title = f"{args.model}, {weights}, {layer}"
        figure = draw(photo, attention, position, grid, patch, title)
        path = args.out / f"{Path(name).stem}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        print(path)
        written.append(path)
    return written


if __name__ == "__main__":
    main()

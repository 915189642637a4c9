# SPDX-License-Identifier: Apache-2.0
"""The examples run, and their pictures show what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from matplotlib import image
from matplotlib import pyplot as plt

import fastvit

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_picture(path: Path) -> bool:
    """Wide enough to read, and neither blank nor of one colour."""
    pixels = image.imread(path)[..., :3]
    colours = np.unique(pixels.reshape(-1, 3), axis=0)
    return min(pixels.shape[:2]) > 250 and len(colours) > 50


def test_attention_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = load("attention_maps").main(["--out", str(tmp_path), "--photo", "astronaut", "cat"])
    assert [p.name for p in paths] == ["astronaut.png", "cat.png"]
    assert capsys.readouterr().out.split() == [str(p) for p in paths]
    assert all(is_picture(p) for p in paths)


def test_a_local_head_looks_local() -> None:
    """What is drawn: at the start each head has the share of its gate around its own centre."""
    example = load("attention_maps")
    torch.manual_seed(0)
    model = fastvit.create_model("convit_small").eval()
    photo = example.load_photo("coffee", 224)
    maps = fastvit.attention_maps(model, example.normalized(photo))["blocks.0.attn"]
    position = example.position_map(model.blocks[0].attn, model.grid_size)
    query = (5, 6)
    figure = example.draw(photo, maps, position, model.grid_size, query, "title")
    titles = [axis.get_title() for axis in figure.axes]
    plt.close(figure)
    for head in range(9):
        assert any(t.startswith(f"head {head}, gate {maps.gate[head]:.2f}") for t in titles)
        # Section 3 of the paper: nine heads are the nine pixels of a 3 x 3 convolution.
        row, column = query[0] + head % 3 - 1, query[1] + head // 3 - 1
        on_grid = position[head, query[0] * 14 + query[1]].view(14, 14)
        assert on_grid.argmax() == row * 14 + column
        near = maps.map[0, head, query[0] * 14 + query[1]].view(14, 14)
        assert near[row - 1 : row + 2, column - 1 : column + 2].sum() > 0.95 * maps.gate[head]


def test_bad_arguments_are_named() -> None:
    example = load("attention_maps")
    with pytest.raises(SystemExit, match="--block: expected a block with GPSA"):
        example.main(["--block", "11"])
    with pytest.raises(SystemExit, match="--patch: expected a row and a column"):
        example.main(["--patch", "3", "14"])


def test_a_checkpoint_is_drawn(tmp_path: Path) -> None:
    torch.save(fastvit.create_model("convit_tiny").state_dict(), tmp_path / "weights.pth")
    (path,) = load("attention_maps").main(
        ["--checkpoint", str(tmp_path / "weights.pth"), "--photo", "coffee", "--block", "9",
         "--patch", "0", "0", "--out", str(tmp_path)]
    )  # fmt: skip
    assert is_picture(path)


def test_kronecker(tmp_path: Path) -> None:
    example = load("kronecker")
    path = example.main(["--out", str(tmp_path / "kronecker.png")])
    assert is_picture(path)
    weight, grid = torch.tensor([0.7, -1.3, -0.4]), (4, 6)
    factors = (
        example.axis_factor(weight[1], weight[2], 4),
        example.axis_factor(weight[0], weight[2], 6),
    )
    torch.testing.assert_close(torch.kron(*factors), example.position_map(weight, grid))


def test_the_quickstart_is_the_example_of_the_readme() -> None:
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    code = (EXAMPLES / "quickstart.py").read_text(encoding="utf-8").split('"""', 2)[2].lstrip()
    assert f"```python\n{code}```" in readme

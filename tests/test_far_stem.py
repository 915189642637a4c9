# SPDX-License-Identifier: Apache-2.0
"""The stem's kernels behind 2^31 elements, without the memory: tensors of reserved addresses, and
of a kernel's programs only the last, which must give what they give for the last image by itself.
In the interpreter, whose int32 wraps around as a GPU's does.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import (
    stem_conv,
    stem_first,
    stem_image_gradient,
    stem_input_gradient,
    stem_pair,
    stem_raw_gradient,
    stem_tokens,
    stem_weight_gradient,
)
from fastvit.kernels.configs import Config
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="make gpu looks at large tensors themselves"
)

#: Sides of the maps, whose positions are those of one tile.
SIDE = 8
TILE = SIDE * SIDE
EPS = 1e-5
# Linux's number, which Python has no name for before 3.13.
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def reserved(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros of which a page takes memory when it is written, between 2^31 elements of room, in
    which a wrapped offset hits nothing else.
    """
    count, room = torch.Size(shape).numel(), 2**31
    size = (count + 2 * room) * dtype.itemsize
    try:
        region = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    except OSError as error:
        pytest.skip(f"no {size / 2**30:.0f} GiB of addresses here: {error}")
    return torch.frombuffer(region, dtype=dtype)[room : room + count].view(shape)


class Problem(NamedTuple):
    """``B`` images, of which the last has numbers, in tensors that ``zeros`` makes."""

    B: int
    zeros: Callable[..., Tensor]

    def maps(self, C: int, seed: int | None = None) -> Tensor:
        """(B, C, SIDE, SIDE) with channels innermost; without a seed all zero."""
        found = self.zeros(self.B, SIDE, SIDE, C).permute(0, 3, 1, 2)
        if seed is not None:
            found[-1].copy_(drawn(C, SIDE, SIDE, seed=seed))
        return found

    def config(self, **sizes: Any) -> Config:
        """A tile for each image, and in the sums a program for each tile."""
        return Config(rows=TILE, groups=self.B, **sizes)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(out: int, C: int, seed: int) -> Tensor:
    """3x3 with its input channels innermost."""
    return drawn(out, 3, 3, C, seed=seed).permute(0, 3, 1, 2)


def norm(C: int) -> list[Tensor]:
    return [*(drawn(C, seed=seed) for seed in (7, 8, 9)), drawn(C, seed=10).square() + 0.5]


def first(p: Problem, C: int) -> list[Tensor]:
    x, out, partials = p.maps(3, 1), p.maps(C), p.zeros(2, p.B, C)
    stem_first.stem_first(
        x, drawn(C, 3, 3, 3, seed=2), None, EPS, out, partials, None, 1, "ieee",
        p.config(keys=(16,)),
    )  # fmt: skip
    return [out[-1], partials[:, -1]]


def pair(p: Problem, C: int) -> list[Tensor]:
    x, out, weights = p.maps(3, 1), p.maps(C), (drawn(16, 3, 3, 3, seed=2), weight(C, 16, 3))
    config = p.config(keys=(C,), channels=(16,))
    stem_pair.stem_pair(x, weights, (norm(16), norm(C)), EPS, out, None, (1, 1), "ieee", config)
    return [out[-1]]


def conv(p: Problem, C: int, out: int) -> list[Tensor]:
    x, y, partials = p.maps(C, 1), p.maps(out), p.zeros(2, p.B, out)
    affine = torch.stack((drawn(C, seed=3), drawn(C, seed=4)))
    config = p.config(keys=(16,), channels=(32,))
    stem_conv.stem_conv(x, weight(out, C, 2), affine, None, EPS, y, partials, 1, "ieee", config)
    return [y[-1], partials[:, -1]]


def tokens(p: Problem, C: int, D: int) -> list[Tensor]:
    x, out = p.maps(C, 1), p.zeros(p.B, TILE + 1, D)
    position, first = drawn(1, TILE + 1, D, seed=3), drawn(1, 1, D, seed=4)
    config = p.config(keys=(16,), channels=(32,))
    stem_tokens.stem_tokens(
        x, drawn(D, C, 1, 1, seed=2), None, None, position, first, out, "ieee", config
    )
    return [out[-1]]


def input_gradient(p: Problem, C: int, out: int) -> list[Tensor]:
    grad, below, dx = p.maps(out, 1), p.maps(C, 2), p.maps(C)
    config = p.config(keys=(16,), channels=(32,))
    partials = stem_input_gradient.stem_input_gradient(
        grad, weight(out, C, 3), 1, below, norm(C), EPS, dx, True, "ieee", config
    )
    return [dx[-1], partials[:, -1]]


def gradient_of_tokens(p: Problem, C: int, D: int) -> list[Tensor]:
    below, dx, grad = p.maps(C, 2), p.maps(C), p.zeros(p.B, TILE, D)
    grad[-1].copy_(drawn(TILE, D, seed=1))
    config = p.config(keys=(16,), channels=(32,))
    stem_input_gradient.stem_input_gradient(
        grad, drawn(D, C, seed=3), 1, below, norm(C), EPS, dx, True, "ieee", config
    )
    return [dx[-1]]


def gradient_of_images(p: Problem, C: int, out: int) -> list[Tensor]:
    grad, dx = p.maps(out, 1), p.zeros(p.B, C, SIDE, SIDE)
    stem_input_gradient.stem_input_gradient(
        grad, weight(out, C, 3), 1, None, None, EPS, dx, False, "ieee",
        p.config(keys=(16,), channels=(32,)),
    )  # fmt: skip
    return [dx[-1]]


def weight_gradient(p: Problem, C: int, out: int) -> list[Tensor]:
    grad, below = p.maps(out, 1), p.maps(C, 2)
    partials = stem_weight_gradient.stem_weight_gradient(
        grad, 1, 9, below, norm(C), EPS, torch.float32, "ieee",
        p.config(keys=(16,), channels=(16,), taps=3),
    )  # fmt: skip
    # Of the last taps and channels.
    return [partials[-1].view(C, 9, out)[-16:, -3:, -16:]]


def image_gradient(p: Problem, out: int) -> list[Tensor]:
    dz, raw, x = p.maps(out, 1), p.maps(out, 2), p.maps(3, 3)
    partials = stem_image_gradient.stem_image_gradient(
        dz, raw, drawn(4, out, seed=4), x, None, 1, torch.float32, "ieee", p.config(keys=(16,))
    )
    return [partials[-1]]


def raw_gradient(p: Problem, C: int) -> list[Tensor]:
    dz, raw = p.maps(C, 1), p.maps(C, 2)
    stem_raw_gradient.stem_raw_gradient(dz, raw, drawn(4, C, seed=3), p.config(keys=(16,)))
    return [dz[-1]]


@pytest.mark.parametrize(
    ("module", "run", "sizes"),
    [
        (stem_first, first, (16,)),
        (stem_pair, pair, (16,)),
        (stem_conv, conv, (64, 16)),
        (stem_conv, conv, (16, 64)),
        (stem_tokens, tokens, (64, 16)),
        (stem_tokens, tokens, (16, 64)),
        (stem_input_gradient, input_gradient, (64, 16)),
        (stem_input_gradient, input_gradient, (16, 64)),
        (stem_input_gradient, gradient_of_tokens, (16, 64)),
        (stem_input_gradient, gradient_of_images, (6, 16)),
        (stem_weight_gradient, weight_gradient, (64, 16)),
        (stem_weight_gradient, weight_gradient, (16, 64)),
        (stem_image_gradient, image_gradient, (16,)),
        (stem_raw_gradient, raw_gradient, (64,)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)).rpartition(".")[2],
)
def test_the_last_programs(
    module: Any, run: Callable[..., list[Tensor]], sizes: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    name = f"{module.__name__.rpartition('.')[2]}_kernel"
    kernel, builder = getattr(module, name), interpreter.interpreter_builder
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    grids: list[tuple[int, ...]] = []

    class Last:
        """As many programs as the first launch had, under the numbers of the last."""

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            skipped = [n - few for n, few in zip(grid, grids[0], strict=True)] + [0, 0]

            def launch(**arguments: Any) -> None:
                with monkeypatch.context() as patch:
                    patch.setattr(builder, "set_grid_dim", lambda *_: set_dim(*[*grid, 1, 1][:3]))
                    patch.setattr(
                        builder,
                        "set_grid_idx",
                        lambda *i: set_index(*(a + b for a, b in zip(i, skipped, strict=False))),
                    )
                    kernel[grids[0]](**arguments)

            return launch

    monkeypatch.setattr(module, name, Last())
    # Kernels write where the tensors are; copying all back would touch all of it.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    expected = run(Problem(1, torch.zeros), *sizes)
    # The strides of tokens are counted by eights.
    B = 2**34 // (TILE * min(sizes)) + 3
    new_empty = Tensor.new_empty

    def far_empty(x: Tensor, *shape: int, **options: Any) -> Tensor:
        if torch.Size(shape).numel() < 2**31:
            return new_empty(x, shape, **options)
        return reserved(*shape, dtype=options.get("dtype") or x.dtype)

    # What a launcher makes by itself: sums in parts.
    monkeypatch.setattr(Tensor, "new_empty", far_empty)
    found = run(Problem(B, reserved), *sizes)
    assert max(grids[1]) >= B
    for value, wanted in zip(found, expected, strict=True):
        assert wanted.any()
        assert torch.equal(value, wanted)

# SPDX-License-Identifier: Apache-2.0
"""The models of a contest, with their weights and images."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastvit
from fastvit.benchmark.library import build_library, timm_vit
from fastvit.benchmark.rows import Row
from fastvit.benchmark.weights import fastvit_model, filled
from gpu.contests import with_positions
from gpu.device import Device
from gpu.model_plan import EAGER, VIT_C, Contest
from gpu.patch_compare import number
from gpu.timing import draws

#: Backends of PyTorch's attention that a plain transformer is pinned to.
PINNED = ("flash", "cudnn", "efficient")
#: Images whose outputs are compared.
COMPARED = 2


class Side(NamedTuple):
    """One family: the library's model, fastvit's with its weights, and what they should give."""

    family: str
    row: Row
    theirs: nn.Module
    ours: nn.Module
    #: Of the first two images, in evaluation: of the library in its own numbers, and in float64.
    reference: Tensor
    expected: Tensor


class Contender(NamedTuple):
    """One model as it is run."""

    name: str
    side: Side
    model: nn.Module
    #: Backend of PyTorch's attention; None leaves the choice to PyTorch.
    pinned: str | None = None
    #: Whether the library's model is accelerated for inference before it runs.
    frozen: bool = False


def laid_out(row: Row) -> nn.Module:
    """timm's model of a row on the meta device; of its ViT_P and ViT_C too, since timm is there
    wherever ConViT is.
    """
    build = timm_vit if row.family in ("ViT_P", "ViT_C") else build_library
    with torch.device("meta"):
        return build(row)


def library_model(row: Row, device: Device, dtype: torch.dtype) -> nn.Module:
    """The same with random weights, as after some training."""
    return _with_positions(filled(laid_out(row), device=device.device, dtype=dtype), row)


def side(device: Device, family: str, row: Row, images: Tensor) -> Side:
    """Both models of a family, and what the first images should give."""
    theirs = library_model(row, device, images.dtype)
    ours = fastvit_model(row, theirs)
    for module in ours.modules():
        # By name, so that the figures are the kernels' also where they have not proved themselves.
        if isinstance(module, fastvit.GPSA) or (
            isinstance(module, fastvit.MHSA) and family in ("deit", "vit_p")
        ):
            module.backend = "triton"
    few = images[:COMPARED]
    with torch.no_grad():
        exact = _with_positions(copy.deepcopy(theirs).double(), row).eval()
        return Side(family, row, theirs, ours, theirs.eval()(few), exact(few.double()))


def contenders(contest: Contest, sides: tuple[Side, Side]) -> Iterator[Contender]:
    """All of a contest, ours first."""
    first, second = sides
    yield Contender(f"fastvit {first.family}", first, first.ours)
    if contest.mode == "inference" and contest.way == EAGER:
        # Of both: a ratio is of the families, not of what else is done faster.
        for each in sides:
            copied = copy.deepcopy(each.theirs)
            yield Contender(f"fastvit {each.family} accelerated", each, copied, frozen=True)
    yield Contender(f"timm {second.family}", second, second.theirs)
    if contest.way == EAGER:
        for backend in PINNED:
            yield Contender(f"timm {second.family} {backend}", second, second.theirs, backend)
            # As many blocks attend in both models of this pair; few of ConViT's are plain.
            if contest.pair == VIT_C:
                yield Contender(f"fastvit {first.family} {backend}", first, first.ours, backend)
    yield Contender(f"timm {first.family}", first, first.theirs)
    yield Contender(f"fastvit {second.family}", second, second.ours)


def random_images(device: Device, contest: Contest, *, seed: int = 0) -> list[Tensor]:
    """Two batches, which take turns."""
    size, dtype = (contest.batch, 3, contest.image_size, contest.image_size), number(contest.dtype)
    # Other numbers than those of the weights.
    return [draws(device, *size, dtype=dtype, seed=1000 + 2 * seed + i) for i in range(2)]


def _with_positions(model: nn.Module, row: Row) -> nn.Module:
    return with_positions(model, (row.image_size // 16) ** 2)

# SPDX-License-Identifier: Apache-2.0
"""The models of a contest, and what calls them: each checked as it is timed."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit
from fastvit.benchmark.agreement import confirm
from fastvit.benchmark.library import build_library, timm_vit
from fastvit.benchmark.rows import Row
from fastvit.benchmark.weights import fastvit_model, filled
from fastvit.testing import Agreement, agreement
from gpu.contests import with_positions
from gpu.device import Call, Device
from gpu.model_plan import EAGER, VIT_C, Contest
from gpu.patch_compare import TF32, number
from gpu.timing import draws

#: Backends of PyTorch's attention that a plain transformer is pinned to.
PINNED = ("flash", "cudnn", "efficient")
_COMPARED = 2
# Batches on which a gradient must disagree before it counts.
_ATTEMPTS = 3
# Seconds of replays in one sample.
_LONG = 2e-3


class Disagreement(Exception):
    """What a contender computes is not what the library's model computes in float64."""


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
    few = images[:_COMPARED]
    with torch.no_grad():
        exact = _with_positions(copy.deepcopy(theirs).double(), row).eval()
        return Side(family, row, theirs, ours, theirs.eval()(few), exact(few.double()))


def contenders(contest: Contest, sides: tuple[Side, Side]) -> Iterator[Contender]:
    """All of a contest, ours first."""
    first, second = sides
    yield Contender(f"fastvit {first.family}", first, first.ours)
    if contest.mode == "inference" and contest.way == EAGER:
        copied = copy.deepcopy(first.theirs)
        yield Contender(f"fastvit {first.family} accelerated", first, copied, frozen=True)
    yield Contender(f"timm {second.family}", second, second.theirs)
    if contest.way == EAGER:
        for backend in PINNED:
            yield Contender(f"timm {second.family} {backend}", second, second.theirs, backend)
            # As many blocks attend in both models of this pair; few of ConViT's are plain.
            if contest.pair == VIT_C:
                yield Contender(f"fastvit {first.family} {backend}", first, first.ours, backend)
    yield Contender(f"timm {first.family}", first, first.theirs)
    yield Contender(f"fastvit {second.family}", second, second.ours)


def check_training(device: Device, side: Side, contest: Contest) -> list[Agreement]:
    """Output and gradients of a step on two images, by root mean squares."""
    few = contest._replace(batch=_COMPARED)
    batches = (random_images(device, few, seed=seed)[0] for seed in range(_ATTEMPTS))
    floor = TF32 if contest.dtype == "tf32" else 0.0
    return confirm(side.row, side.theirs, side.ours, batches, rms=True, floor=floor)


def inference(
    device: Device, contest: Contest, contender: Contender, forward: Callable[[Tensor], Tensor],
    images: list[Tensor], *, graph: bool, checks: list[Agreement],
) -> list[Call]:  # fmt: skip
    """The calls that are timed, whose first output has been compared.

    Args:
        graph: whether they replay a CUDA graph of one batch.
        checks: where the comparison is noted.

    Raises:
        Disagreement: the output is not what it should be.
    """
    contender.model.eval()

    def infer(x: Tensor) -> Tensor:
        with torch.no_grad(), pinned_to(contender.pinned):
            return forward(x)

    calls: list[Call] = [lambda x=x: infer(x) for x in images]
    if graph:
        calls = [_replay(device, calls[0])]
    name = f"{contender.name} graph" if graph else contender.name
    given, theirs = calls[0]()[:_COMPARED], contender.side
    floor = TF32 if contest.dtype == "tf32" else 0.0
    found = agreement(given, theirs.reference, theirs.expected, name=name, rms=True, floor=floor)
    checks.append(found)
    if not found.ok:
        raise Disagreement(str(found))
    return calls * _repeats(device, calls[0]) if graph else calls


def _replay(device: Device, call: Call) -> Call:
    replay, out = device.capture(call)
    with torch.no_grad():
        # Else a graph that writes nothing would show what its capture left.
        out.fill_(float("nan"))

    def replayed() -> Tensor:
        replay()
        return out

    return replayed


def _repeats(device: Device, call: Call) -> int:
    """How many replays take long against the launch of one, which stands before the first."""
    device.synchronize()
    start = time.perf_counter()
    call()
    device.synchronize()
    return max(1, min(16, math.ceil(_LONG / (time.perf_counter() - start))))


class Training:
    """Forward, cross-entropy, backward and a step of AdamW, as in the papers. Contenders that share
    a model share its optimizer.
    """

    def __init__(self, device: Device, images: list[Tensor]) -> None:
        self.images = images
        self.labels = torch.zeros(len(images[0]), dtype=torch.long, device=device.device)
        self._optimizers: dict[nn.Module, torch.optim.Optimizer] = {}

    def calls(self, contender: Contender, forward: Callable[[Tensor], Tensor]) -> list[Call]:
        model = contender.model.train()
        optimizer = self._optimizers.get(model)
        if optimizer is None:
            # Slow enough to leave the weights about where they were compared.
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
            self._optimizers[model] = optimizer

        def step(x: Tensor) -> Any:
            with pinned_to(contender.pinned):
                F.cross_entropy(forward(x).float(), self.labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return [lambda x=x: step(x) for x in self.images]


def pinned_to(backend: str | None) -> AbstractContextManager[Any]:
    """Leaves PyTorch's attention one backend, which raises where it takes no such call."""
    if backend is None:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, f"{backend.upper()}_ATTENTION"))


def random_images(device: Device, contest: Contest, *, seed: int = 0) -> list[Tensor]:
    """Two batches, which take turns."""
    size, dtype = (contest.batch, 3, contest.image_size, contest.image_size), number(contest.dtype)
    # Other numbers than those of the weights.
    return [draws(device, *size, dtype=dtype, seed=1000 + 2 * seed + i) for i in range(2)]


def _with_positions(model: nn.Module, row: Row) -> nn.Module:
    return with_positions(model, (row.image_size // 16) ** 2)

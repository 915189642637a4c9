# SPDX-License-Identifier: Apache-2.0
"""Training with fastvit's GPSA is training with timm's: the loss curves differ by no more than
timm's own differ from each other when only the order of summation changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit

timm = pytest.importorskip("timm", reason="timm is not installed")
data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")

STEPS, BATCH, SIZE = 50, 8, 48
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Photographs that scikit-image's wheel carries; which one a crop is from is what is learned.
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    """STEPS batches of random crops (BATCH, 3, SIZE, SIZE) with their labels."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.from_numpy(getattr(data, name)().copy()) for name in PHOTOGRAPHS]
    images = [x.permute(2, 0, 1).float() / 127.5 - 1.0 for x in images]
    found = []
    for _ in range(STEPS):
        labels = torch.randint(len(images), (BATCH,), generator=generator)
        crops = []
        for label in labels.tolist():
            _, height, width = images[label].shape
            top, left = (
                int(torch.randint(side - 2 * SIZE, (1,), generator=generator))
                for side in (height, width)
            )
            # Every second pixel: a crop shows more than texture.
            crops.append(images[label][:, top : top + 2 * SIZE : 2, left : left + 2 * SIZE : 2])
        found.append((torch.stack(crops).to(DEVICE), labels.to(DEVICE)))
    return found


def convit() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "convit_tiny", img_size=SIZE, patch_size=8, num_classes=len(PHOTOGRAPHS)
    )
    return model.to(DEVICE)


def with_our_gpsa() -> nn.Module:
    model = convit()
    swapped = 0
    for block in model.blocks:
        if type(block.attn).__name__ == "GPSA":
            block.attn = fastvit.GPSA.from_module(block.attn)
            swapped += 1
    assert swapped == 10
    return model


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], order: Tensor) -> Tensor:
    """The loss of every step, with the images of each batch in another ``order``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    losses = []
    for images, labels in batches:
        loss = F.cross_entropy(model(images[order]), labels[order])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@contextmanager
def threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def test_the_loss_curve_is_timm_s(batches, auto_backend) -> None:
    order = torch.arange(BATCH)
    runs = [(1, order), (2, order), (1, order.flip(0)), (2, order.roll(3)), (1, order.roll(5))]

    def curve(make: Callable[[], nn.Module], count: int, order: Tensor) -> Tensor:
        with threads(count):
            return train(make(), batches, order)

    curves = [curve(convit, *run) for run in runs]
    spread = max((a - b).abs().max().item() for a, b in itertools.combinations(curves, 2))
    ours = curve(with_our_gpsa, *runs[0])
    difference = (ours - curves[0]).abs().max().item()
    assert difference <= 2.0 * spread, (difference, spread)
    # It learns, so that the curves have something to differ in.
    assert ours[-10:].mean() < 0.8 * ours[:5].mean()

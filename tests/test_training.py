# SPDX-License-Identifier: Apache-2.0
"""Training with fastvit's GPSA is training with timm's, and with its stem training with PyTorch's
modules: the loss curves differ by no more than theirs differ from each other when only the order of
summation changes.
"""

from __future__ import annotations

import functools
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


Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def batches() -> Batches:
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


def train(model: nn.Module, batches: Batches, order: Tensor) -> Tensor:
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


def vit_c(backend: str = "reference") -> nn.Module:
    """A small ViT_C, whose stem runs on ``backend`` and all else as PyTorch's modules."""
    torch.manual_seed(0)
    model = fastvit.create_model(
        "vit_c_1gf", img_size=SIZE // 3, patch_size=4, num_classes=len(PHOTOGRAPHS), embed_dim=48,
        depth=2, num_heads=3, stem_channels=(8, 16), stem_strides=(2, 2), backend="reference",
    )  # fmt: skip
    model.patch_embed.backbone.backend = backend
    return model.to(DEVICE)


def curve(make: Callable[[], nn.Module], batches: Batches, count: int, shift: int) -> Tensor:
    """The losses of a model on ``count`` threads, the images of every batch moved by ``shift``."""
    with threads(count):
        return train(make(), batches, torch.arange(len(batches[0][1])).roll(shift))


def five_curves(make: Callable[[], nn.Module], batches: Batches) -> list[Tensor]:
    """Of runs that differ in threads and in the order of summation."""
    return [curve(make, batches, *run) for run in ((1, 0), (2, 0), (1, 1), (2, 3), (1, 2))]


def check_curves(curves: list[Tensor], ours: Tensor) -> None:
    spread = max((a - b).abs().max().item() for a, b in itertools.combinations(curves, 2))
    difference = (ours - curves[0]).abs().max().item()
    assert difference <= 2.0 * spread, (difference, spread)
    # It learns, so that the curves have something to differ in.
    assert ours[-10:].mean() < 0.8 * ours[:5].mean()


def test_the_loss_curve_is_timm_s(batches, auto_backend) -> None:
    check_curves(five_curves(convit, batches), curve(with_our_gpsa, batches, 1, 0))


@pytest.fixture(scope="module")
def small_batches(batches: Batches) -> Batches:
    """What the interpreter has time for."""
    return [(images[:4, :, ::3, ::3], labels[:4]) for images, labels in batches]


@pytest.fixture(scope="module")
def stem_curves(small_batches: Batches) -> list[Tensor]:
    return five_curves(vit_c, small_batches)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_loss_curve_of_the_stem_is_pytorch_s(
    backend: str, small_batches, stem_curves, auto_backend
) -> None:
    """A stem in training mode, by PyTorch's operators and by the kernels."""
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    check_curves(stem_curves, curve(functools.partial(vit_c, backend), small_batches, 1, 0))

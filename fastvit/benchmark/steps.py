# SPDX-License-Identifier: Apache-2.0
"""Timed steps: forward and backward, optimiser, inference, each on one fixed synthetic batch."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.benchmark.result import Samples
from fastvit.benchmark.rows import Row

_NUM_CLASSES = 1000


def synthetic_batch(
    row: Row, batch: int, *, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Normal images (B, 3, S, S) of the row's size, and random labels (B,)."""
    # Another stream than that of the weights.
    generator = torch.Generator(device).manual_seed(1000 + seed)
    size = (batch, 3, row.image_size, row.image_size)
    images = torch.randn(size, generator=generator, device=device).to(dtype)
    labels = torch.randint(_NUM_CLASSES, (batch,), generator=generator, device=device)
    return images, labels


def make_optimizer(row: Row, model: nn.Module) -> torch.optim.Optimizer:
    """The papers' optimisers: fused AdamW for transformers, SGD with momentum for CNNs.

    The learning rate is too small to move the weights far within a measurement; it does not
    change the cost of a step.
    """
    if row.fastvit is None:
        return torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-5)
    return torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.05, fused=True)


class Bench:
    """One model on one batch, whose steps append their seconds to ``samples``.

    The input exists before the clock starts, and on a GPU the clock is read only when all work
    that was queued is done.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
    ) -> None:
        self.samples = Samples()
        self._model = model
        self._optimizer = optimizer
        self._images = images
        self._labels = labels

    def train_step(self) -> None:
        """Forward, cross-entropy, backward; then the optimiser step, timed apart."""
        self._model.train()
        start = self._now()
        loss = F.cross_entropy(self._model(self._images), self._labels)
        loss.backward()
        stepped = self._now()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        end = self._now()
        self.samples.forward_backward.append(stepped - start)
        self.samples.optimizer.append(end - stepped)

    def inference_step(self) -> None:
        """Forward in evaluation mode, in ``torch.inference_mode``."""
        self._model.eval()
        with torch.inference_mode():
            start = self._now()
            self._model(self._images)
            self.samples.inference.append(self._now() - start)

    def forget(self) -> None:
        """Drop gradients and what was timed so far, which was warm-up."""
        self._optimizer.zero_grad(set_to_none=True)
        self.samples = Samples()

    def _now(self) -> float:
        if self._images.is_cuda:
            torch.cuda.synchronize(self._images.device)
        return time.perf_counter()

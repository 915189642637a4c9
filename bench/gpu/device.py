# SPDX-License-Identifier: Apache-2.0
"""What the stages run on: a GPU, or a processor in dry runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gpu.calls import Call, Sample
from gpu.cuda import GPU
from gpu.processor import Processor

__all__ = [
    "GPU", "Call", "Device", "Processor", "Sample", "fastest_convolutions", "open_device", "tf32",
]  # fmt: skip

Device = GPU | Processor


def open_device(*, dry: bool) -> Device:
    """The device of a run.

    Raises:
        RuntimeError: no GPU is there and the run is not dry.
    """
    if dry:
        return Processor()
    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no CUDA device; --dry walks the code on a processor")
    return GPU()


@contextmanager
def tf32(wanted: bool) -> Iterator[None]:
    """Whether float32 products and convolutions may be made of tf32 ones."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "tf32" if wanted else "ieee"
    try:
        yield
    finally:
        for setting, old in zip(settings, before, strict=True):
            setting.fp32_precision = old


@contextmanager
def fastest_convolutions() -> Iterator[None]:
    """cuDNN times its algorithms for a shape that it meets first, rather than guess."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before

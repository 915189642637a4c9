# SPDX-License-Identifier: Apache-2.0
"""What the torch backend makes and keeps: no map of 1024 x 1024 tokens, the inputs alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastvit
from fastvit import reference
from fastvit.ops import gpsa_torch, mhsa_torch

SIDE = 32
TOKENS = SIDE * SIDE


class LargestTensor(TorchDispatchMode):
    """Watches every tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k, v, pos_weight and gating_param, all far smaller than one map of N² elements."""
    heads = [torch.randn(1, 2, TOKENS, 4, dtype=dtype) for _ in range(3)]
    return [*heads, torch.randn(2, 3), torch.randn(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 64])
def test_no_map_of_all_pairs(
    dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    # Inside an op a mode sees nothing, so the implementations are called as they are.
    inputs = tensors(dtype)
    with LargestTensor() as watch:
        out = gpsa_torch.forward(*inputs, (SIDE, SIDE), 0.5)
        gpsa_torch.backward(torch.randn_like(out), *inputs, (SIDE, SIDE), 0.5, False)
        mhsa_torch.backward(out, *inputs[:3], 0.5)
    assert TOKENS < watch.elements < TOKENS**2


def test_the_watch_sees_maps_where_they_are_made() -> None:
    inputs = tensors()
    with LargestTensor() as watch:
        fastvit.functional.gpsa_attention(*inputs, (SIDE, SIDE), backend="reference")
    assert watch.elements >= 2 * TOKENS**2


def test_nothing_but_the_inputs_is_kept_for_the_backward() -> None:
    q, k, v = (torch.randn(1, 2, TOKENS, 4, requires_grad=True) for _ in range(3))
    parameters = [torch.randn(2, 3, requires_grad=True), torch.randn(2, requires_grad=True)]
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fastvit.functional.gpsa_attention(q, k, v, *parameters, (SIDE, SIDE), backend="torch")
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (q, k, v, *parameters)}


def test_the_stem_keeps_one_raw_tensor_a_stage() -> None:
    """PyTorch's modules keep the convolution's output and the ReLU's: twice as much."""

    def kept_elements(backend: str) -> int:
        stem = fastvit.ConvStem(3, (8, 16), (2, 2), 8, backend=backend)
        parameters = {p.data_ptr() for p in stem.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in parameters:
                kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            stem(torch.randn(2, 3, 64, 64))
        return sum(kept.values())

    image, raw = 2 * 3 * 64 * 64, 2 * (8 * 32 * 32 + 16 * 16 * 16)
    # Beside these, statistics of a few numbers a channel.
    assert image + raw <= kept_elements("torch") < image + 1.01 * raw
    assert kept_elements("reference") > image + 1.9 * raw


#: Channels and D of ViT_C (arXiv 2106.14881), and the most that is kept of what eager keeps.
KEPT = {
    "1GF": ((24, 48, 96, 192), 192, 0.57),
    "4GF": ((48, 96, 192, 384), 384, 0.54),
    "18GF": ((64, 128, 128, 256, 256, 512), 768, 0.53),
}


def kept_bytes(stem: torch.nn.Module, x: torch.Tensor, autocast: bool) -> int:
    """Of the storages that are kept for the backward. Without those of parameters and of their
    copies under autocast, which either keeps and which do not grow with the batch.
    """
    parameters = {p.untyped_storage().data_ptr() for p in stem.parameters()}
    shapes = {p.shape for p in stem.parameters() if p.ndim == 4}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tensor.shape not in shapes:
            kept[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        stem(x)
    return sum(storage.nbytes() for storage in kept.values())


def kept_of_eager(size: str, B: int, side: int, *, autocast: bool, uint8: bool) -> float:
    """What fastvit's stem keeps for its backward, of what PyTorch's modules keep in channels_last.

    What a step keeps does not depend on the backend: the op's tensors are the same.
    """
    channels, D, _ = KEPT[size]
    strides = (2, 2, 2, 2) if len(channels) == 4 else (2, 2, 1, 2, 1, 2)
    statistics = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    plain = reference.ConvStem(3, channels, strides, D, **statistics)
    ours = fastvit.ConvStem(3, channels, strides, D, **statistics, backend="torch")
    plain = plain.to(memory_format=torch.channels_last)
    x = torch.randint(256, (B, 3, side, side), dtype=torch.uint8)
    if not uint8:
        x = (x / 255).contiguous(memory_format=torch.channels_last)
    found, eager = (kept_bytes(stem, x, autocast) for stem in (ours, plain))
    return found / eager


@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("size", list(KEPT))
def test_what_a_stem_keeps_of_what_eager_keeps(size: str, autocast: bool, uint8: bool) -> None:
    share = kept_of_eager(size, 2, 128, autocast=autocast, uint8=uint8)
    assert 0.4 < share <= KEPT[size][2], share

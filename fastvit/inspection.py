# SPDX-License-Identifier: Apache-2.0
"""What the attention layers of a model look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvit.reference import attention_map, relative_positions


class AttentionMap(NamedTuple):
    """What one layer attended to.

    Attributes:
        map: (B, H, N, N), in the dtype of the model: row i is what token i takes from each
            token, and sums to one. Of GPSA the mixed map.
        gate: (H,), each head's share of position, the sigmoid of its gating parameter; None for
            plain attention.
        distance: (H,), in patches: the mean distance of what a patch attends to, over patches and
            images ("non-locality", section 4 of arXiv 2103.10697).
    """

    map: Tensor
    gate: Tensor | None
    distance: Tensor


@torch.no_grad()
def attention_maps(model: nn.Module, x: Tensor) -> dict[str, AttentionMap]:
    """The attention maps of every layer of a model, for one batch of images.

    The model runs once, as in ``eval()`` and without gradients; each map is formed in full, so B
    images need B·H·N² elements a layer. Afterwards every module is in the mode it was in.

    Args:
        model: with layers of fastvit, or timm's or the authors' GPSA, or plain attention with
            ``qkv``, ``num_heads`` and ``scale`` (timm's ``Attention``, ConViT's MHSA).
        x: what the model takes: images (B, C, H, W).

    Returns:
        By the layers' dotted names, in the order in which they ran.

    Raises:
        ValueError: the model has no such layer, or none ran.
    """
    readers = {name: reader for name, m in model.named_modules() if (reader := _reader(m))}
    if not readers:
        raise ValueError(
            f"model: expected attention layers (GPSA, MHSA, or one with qkv, num_heads and scale), "
            f"got a {type(model).__name__} without any"
        )
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    maps: dict[str, AttentionMap] = {}

    def watch(name: str) -> Callable[..., None]:
        def read(layer: Any, args: Any, kwargs: Any, _output: Any) -> None:
            attn = readers[name](layer, *args, **kwargs)
            gate = getattr(layer, "gating_param", None)
            maps[name] = AttentionMap(
                attn,
                None if gate is None else torch.sigmoid(gate.detach()),
                _distance(attn, _grid(layer, attn.shape[-1], grid, *args[1:], **kwargs)),
            )

        return read

    with evaluating(model):
        handles = [
            model.get_submodule(name).register_forward_hook(watch(name), with_kwargs=True)
            for name in readers
        ]
        try:
            model(x)
        finally:
            for handle in handles:
                handle.remove()
    if not maps:
        raise ValueError(f"model: none of its attention layers ran: {', '.join(readers)}")
    return maps


def _reader(module: nn.Module) -> Callable[..., Tensor] | None:
    """How to get the map of an attention layer after it ran: from the layer and its arguments."""
    if callable(getattr(module, "get_attention", None)):
        return lambda layer, *args, **kwargs: layer.get_attention(*args, **kwargs)
    if all(hasattr(module, name) for name in ("qkv", "num_heads", "scale")):
        return _map_of_qkv
    return None


def _map_of_qkv(layer: Any, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    B, N, _ = x.shape
    q, k, _ = layer.qkv(x).reshape(B, N, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = (getattr(layer, f"{n}_norm", nn.Identity())(t) for n, t in (("q", q), ("k", k)))
    return attention_map(q, k, scale=layer.scale)


def _grid(
    layer: Any,
    N: int,
    of_model: tuple[int, int] | None,
    grid_size: tuple[int, int] | None = None,
    **_: Any,
) -> tuple[int, int]:
    """The grid of N tokens, with or without one in front: that of the call, the layer, the model,
    or else a square.
    """
    for grid in (grid_size, getattr(layer, "grid_size", None), of_model):
        if grid is not None and N - grid[0] * grid[1] in (0, 1):
            return grid
    return math.isqrt(N), math.isqrt(N)


def _distance(attn: Tensor, grid: tuple[int, int]) -> Tensor:
    rows, columns = grid
    prefix = attn.shape[-1] - rows * columns
    distance = relative_positions(grid, attn.device)[0, :, :, 2].sqrt()
    patches = attn[..., prefix:, prefix:].float()
    return torch.einsum("nm,bhnm->h", distance, patches) / (attn.shape[0] * rows * columns)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode for the duration of a ``with`` block."""
    # Not by train(), which would wake what was frozen.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

# SPDX-License-Identifier: Apache-2.0
"""The ``vmap`` rule of attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Heads share nothing, so vmap's dimension becomes more of them, whatever it is mapped over.
_HEAD_AXES = {
    **dict.fromkeys(("grad", "q", "k", "v", "out"), 1),
    **dict.fromkeys(("qk", "qkv"), 3),
    **dict.fromkeys(("pos_weight", "gating_param"), 0),
}


def over_more_heads(
    call: Any, names: tuple[str, ...], results: tuple[str, ...], info: Any, in_dims: Any, args: Any
) -> tuple[Any, Any]:
    """The ``vmap`` rule of ``call`` whose first arguments and results are those named."""
    count = info.batch_size
    axes = [_HEAD_AXES[name] for name in names]
    tensors = zip(args[: len(names)], in_dims[: len(names)], axes, strict=True)
    folded = [_fold(x, dim, axis, count) for x, dim, axis in tensors]
    out = call(*folded, *args[len(names) :])
    out_axes = tuple(_HEAD_AXES[name] for name in results)
    if isinstance(out, Tensor):
        return out.unflatten(out_axes[0], (count, -1)), out_axes[0]
    return tuple(
        x.unflatten(axis, (count, -1)) for x, axis in zip(out, out_axes, strict=True)
    ), out_axes


def _fold(x: Tensor, dim: int | None, axis: int, count: int) -> Tensor:
    """Merge the dimension that ``vmap`` added at ``dim`` into ``axis``; None repeats ``x``."""
    if dim is None:
        x = x.unsqueeze(axis)
        return x.expand(*x.shape[:axis], count, *x.shape[axis + 1 :]).flatten(axis, axis + 1)
    return x.movedim(dim, axis).flatten(axis, axis + 1)

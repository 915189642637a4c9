# SPDX-License-Identifier: Apache-2.0
"""Plain attention and its gradients in PyTorch's operators, a tile at a time.

On a processor a tile is a few heads, in batched matrix products: PyTorch's fused attention
multiplies blocks so narrow that they run at half the rate. The maps of a tile stay in cache, and
all tiles of a call use the same memory, since fresh memory costs a page fault for every 4 KB,
which together take as long as the arithmetic. On a GPU one tile has everything, and
PyTorch's fused kernels serve it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.ops.tokens import wide

_aten = torch.ops.aten

#: Elements of the maps that are made at a time, for each core: about what its cache holds.
_MAPS_PER_CORE = 180_000
#: The same for a whole GPU.
_MAPS_PER_GPU = 1 << 26

#: Above this number of tokens PyTorch's fused forward is the faster one on a CPU in float32.
_FUSED_TOKENS = 256

#: A map of so many elements is made in two or more blocks of rows, whatever the cores hold.
_LARGE_MAP = 1 << 19


class Tiling(NamedTuple):
    """How (B, H, N, d) divides.

    ``images`` and ``heads`` are those of a tile: several images have all heads. Of their maps,
    ``maps`` are made at a time, or ``rows`` of one.
    """

    images: int
    heads: int
    maps: int
    rows: int

    def tiles(self, B: int, H: int) -> Iterator[tuple[slice, slice]]:
        """Images and heads of each tile, the largest first."""
        return itertools.product(_slices(B, self.images), _slices(H, self.heads))

    def parts(self, heads: int, N: int) -> Iterator[tuple[slice, slice]]:
        """Heads and rows of the maps of a tile that are made at a time, the largest first."""
        return itertools.product(_slices(heads, self.maps), _slices(N, self.rows))


def tiling(B: int, H: int, N: int, d: int, budget: int) -> Tiling:
    """The tiling of (B, H, N, d) that makes maps of at most ``budget`` elements at a time.

    The tokens of a tile, of which there are ten tensors at once, have half as many.
    """
    heads = max(1, budget // 2 // (N * d))
    images = _even(B, max(1, heads // H))
    heads = _even(H, heads)
    if N * N >= _LARGE_MAP:
        budget = min(budget, N * N // 2)
    maps = budget // (N * N)
    if maps == 0:
        return Tiling(images, heads, 1, _even(N, max(1, budget // N)))
    return Tiling(images, heads, _even(images * heads, maps), N)


def _even(count: int, limit: int) -> int:
    """The largest of as few parts as keep to ``limit``, if they are of one size."""
    parts = -(-count // limit)
    return -(-count // parts)


def _slices(count: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def _tiling_of(q: Tensor) -> Tiling:
    cpu = q.device.type == "cpu"
    budget = torch.get_num_threads() * _MAPS_PER_CORE if cpu else _MAPS_PER_GPU
    B, H, N, d = q.shape
    return tiling(B, H, N, d, budget)


class _Scratch:
    """Memory that the tiles of a call share, by name."""

    def __init__(self, like: Tensor) -> None:
        # Processors without float16 products take ten times as long for them.
        narrow = like.device.type == "cpu" and like.dtype == torch.float16
        self.dtype = torch.float32 if narrow else like.dtype
        self._device = like.device
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """The contiguous tensor of that name, with what the last tile left in it."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None:
            buffer = torch.empty(size, dtype=self.dtype, device=self._device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)

    def copy(self, name: str, x: Tensor) -> Tensor:
        return self(name, *x.shape).copy_(x)


class Content(NamedTuple):
    """``out`` is the attention of a tile, ``where`` its images and heads, ``v`` its values.

    Tensors (n, h, N, d), valid until the next tile; ``v`` may be the caller's.
    """

    where: tuple[slice, slice]
    out: Tensor
    v: Tensor


def contents(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Iterator[Content]:
    """softmax(scale q kᵀ) v of q, k, v (B, H, N, d), a tile at a time."""
    if q.numel() == 0:
        return
    B, H, N, _ = q.shape
    if q.device.type != "cpu" or (q.dtype == wide(q.dtype) and N > _FUSED_TOKENS):
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        yield Content((slice(None), slice(None)), out, v)
        return
    plan, scratch = _tiling_of(q), _Scratch(q)
    for where in plan.tiles(B, H):
        tile = [scratch.copy(name, x[where]) for name, x in (("q", q), ("k", k), ("v", v))]
        out = scratch("out", *tile[0].shape)
        flat_q, flat_k, flat_v, flat_out = (x.flatten(0, 1) for x in (*tile, out))
        _attend(scratch, flat_q, flat_k, flat_v, flat_out, scale, plan)
        yield Content(where, out, tile[2])


def _attend(
    scratch: _Scratch, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, plan: Tiling
) -> None:
    """Attention of q, k, v (G, N, d), contiguous as ``out`` is."""
    for h, rows in plan.parts(*q.shape[:2]):
        attn = _attention_map(scratch, q[h, rows], k[h], scale)
        _product(out[h, rows], attn, v[h])


def _attention_map(scratch: _Scratch, q: Tensor, k: Tensor, scale: float) -> Tensor:
    scores = _product(scratch("map", *q.shape[:2], k.shape[1]), q, k.mT, scale)
    return _aten._softmax.out(scores, -1, False, out=scores)


def _product(out: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


class ContentGradients(NamedTuple):
    """Gradients of the attention of a tile, beside its gradient and its values.

    Tensors (n, h, N, d), valid until the next tile; ``grad`` and ``v`` may be the caller's.
    """

    where: tuple[slice, slice]
    dq: Tensor
    dk: Tensor
    dv: Tensor
    grad: Tensor
    v: Tensor


def content_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Iterator[ContentGradients]:
    """Gradients of :func:`contents` for ``grad`` (B, H, N, d), from the inputs alone.

    Inside an op there is no autograd to ask (under a dispatch mode it is off for good), so
    PyTorch's own forward and backward operators are called by name.
    """
    if q.numel() == 0:
        return
    B, H, _, _ = q.shape
    if q.device.type == "cuda" and _memory_efficient_fits(q):
        gradients = _memory_efficient(grad, q, k, v, scale)
        yield ContentGradients((slice(None), slice(None)), *gradients, grad, v)
        return
    plan, scratch = _tiling_of(q), _Scratch(q)
    for where in plan.tiles(B, H):
        named = (("grad", grad), ("q", q), ("k", k), ("v", v))
        tile = [scratch.copy(name, x[where]) for name, x in named]
        flat_grad, flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in tile)
        gradients = _attend_backward(scratch, flat_grad, flat_q, flat_k, flat_v, scale, plan)
        dq, dk, dv = (x.view(tile[0].shape) for x in gradients)
        yield ContentGradients(where, dq, dk, dv, tile[0], tile[3])


def _attend_backward(
    scratch: _Scratch, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Tiling
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (G, N, d).

    With A = softmax(scale q kᵀ) and G = dO vᵀ: dv = Aᵀ dO, dS = A ∘ (G - Σ A ∘ G),
    dq = scale dS k, dk = scale dSᵀ q.
    """
    dq = scratch("dq", *q.shape)
    if plan.rows == q.shape[1]:
        dk, dv = scratch("dk", *q.shape), scratch("dv", *q.shape)
        put: Callable[..., Tensor] = _product
    else:
        # The sums over blocks of rows are in float32.
        dk, dv = (torch.zeros_like(q, dtype=wide(q.dtype)) for _ in range(2))
        put = _add_product
    for h, rows in plan.parts(*q.shape[:2]):
        attn = _attention_map(scratch, q[h, rows], k[h], scale)
        dmap = _product(scratch("dmap", *attn.shape), grad[h, rows], v[h].mT)
        put(dv[h], attn.mT, grad[h, rows])
        _aten._softmax_backward_data.out(dmap, attn, -1, dmap.dtype, grad_input=dmap)
        _product(dq[h, rows], dmap, k[h], scale)
        put(dk[h], dmap.mT, q[h, rows], scale)
    return dq, dk, dv


def _add_product(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    return total.add_(a @ b, alpha=scale)


def _memory_efficient_fits(q: Tensor) -> bool:
    # Its backward adds with atomics.
    repeatable = torch.are_deterministic_algorithms_enabled()
    return not repeatable and q.dtype != torch.float64 and q.shape[-1] % 8 == 0


def _memory_efficient(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # The fused kernels read rows of d consecutive elements.
    q, k, v, grad = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, grad))
    out, logsumexp, seed, offset = _aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, scale=scale
    )
    wanted = [True, True, True, False]
    dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, logsumexp, seed, offset, 0.0, wanted, scale=scale
    )
    return dq, dk, dv

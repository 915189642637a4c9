# SPDX-License-Identifier: Apache-2.0
"""Operators and bytes of a call in PyTorch's operators, by what the dispatcher is handed.

Counted under a ``TorchDispatchMode`` on real tensors of a processor, below autograd: an operator
that PyTorch composes of others counts as those (a matmul as the expansions, the copies and the
product that it comes to), any other is one entry, whatever runs inside it. Bytes follow from shapes
and dtypes alone, so the machine's speed, load and vector units play no part. What would depend on
the machine all the same is pinned: the number of threads, by which tiles are chosen, and oneDNN,
which is off, so that no layout and no choice of a library follows the processor. (Under a mode the
package asks for oneDNN's linear layers nowhere.) PyTorch 2.11 and 2.15 count the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

THREADS = 1

_COMPOSED = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Counter(TorchDispatchMode):
    """Counts what is dispatched while it is on.

    ``operators`` are all, ``views`` those of them that only look at memory; ``allocated`` are bytes
    of memory that was not there before, ``written`` those of all results that are no views.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.views = self.allocated = self.written = 0
        #: Calls and bytes written by name, views left out.
        self.by_operator: dict[str, list[int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastvit":
            # Opaque: what it consists of is to be counted.
            with self:
                return func.redispatch(_COMPOSED, *args, **kwargs)
        with self:
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        before = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **kwargs)
        self._count(func, before, [x for x in tree_leaves(out) if isinstance(x, Tensor)])
        return out

    def _count(self, func: Any, before: set[int], results: list[Tensor]) -> None:
        self.operators += 1
        new = [x for x in results if _storage(x) not in before]
        if results and not new and not func._schema.is_mutable:
            self.views += 1
            return
        written = sum(map(_bytes, results if func._schema.is_mutable else new))
        self.allocated += sum({_storage(x): _bytes(x) for x in new}.values())
        self.written += written
        entry = self.by_operator.setdefault(str(func), [0, 0])
        entry[0] += 1
        entry[1] += written


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


@contextmanager
def pinned() -> Iterator[None]:
    """What would differ between machines, the same on all."""
    threads, onednn = torch.get_num_threads, torch._C._get_mkldnn_enabled()
    # Not set_num_threads: it is asked for what the tiles follow, nothing is timed.
    torch.get_num_threads = lambda: THREADS
    try:
        # torch.backends.mkldnn.flags sets more, and warns about it on most machines.
        torch._C._set_mkldnn_enabled(False)
        yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)
        torch.get_num_threads = threads


def counted(
    forward: Callable[..., Tensor], inputs: Sequence[Tensor], learned: Sequence[Tensor]
) -> dict[str, Counter]:
    """What ``forward(*inputs)`` without gradients counts to, and forward and backward together.

    Args:
        inputs: tensors; the gradients of those that require one are wanted.
        learned: further tensors whose gradients are wanted.
    """
    found = {}
    with pinned():
        found["forward"] = Counter()
        with torch.no_grad(), found["forward"]:
            forward(*inputs)
        leaves = [x for x in (*inputs, *learned) if x.requires_grad]
        if leaves:
            found["forward+backward"] = Counter()
            with found["forward+backward"]:
                out = forward(*inputs)
                # As large as a loss would hand it down, and made outside of what is counted.
                torch.autograd.grad(out, leaves, torch.ones_like(out))
    return found

# SPDX-License-Identifier: Apache-2.0
"""Statistics of a batch from those of its parts, which several processes may have."""

from __future__ import annotations

import torch
from torch import Tensor


def pooled(counts: Tensor, means: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The number of all values (), their mean and their biased variance (C,).

    Of parts of ``counts`` (parts, 1) values with ``means`` and sums of squared deviations
    ``squares`` (parts, C). Chan, Golub and LeVeque 1983. Without values the statistics are NaN.
    """
    total = counts.sum()
    mean = (counts / total * means).sum(0)
    deviations = squares + counts * (means - mean).square()
    return total, mean, deviations.sum(0) / total


def exchanged(own: Tensor, group: str) -> Tensor:
    """What every process of a group has for ``own`` (n,), as rows (processes, n) in their order.

    One collective. All processes get the same bits.
    """
    # Only here, since a PyTorch without it runs everything else.
    from torch._C._distributed_c10d import _resolve_process_group

    processes = _resolve_process_group(group)  # type: ignore[arg-type, unused-ignore]
    rows = own.new_zeros(processes.size(), own.shape[0])
    rows[processes.rank()] = own
    # A sum with zeros is exact in any order, and every backend has it: gathering into one tensor
    # is not in gloo's, and into a list takes a copy a process in NCCL's.
    torch.distributed.all_reduce(rows, group=processes)
    return rows


def synchronized(
    count: int, mean: Tensor, variance: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The number of values, the mean and the biased variance over a group, from those of this
    process, (C,) each. The number comes as a tensor (): only the device knows it.
    """
    if count == 0:
        # Of no values they are NaN.
        mean = variance = torch.zeros_like(mean)
    own = torch.cat((mean.new_full((1,), count), mean, variance * count))
    C = mean.shape[0]
    return pooled(*exchanged(own, group).split((1, C, C), dim=1))

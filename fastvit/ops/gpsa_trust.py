# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of GPSA and plain attention must show before ``auto`` takes them.

Small inputs of the same sizes and the same launch configurations as the call, computed on the GPU
and, by PyTorch's operators, on the processor in float64 and in the call's dtype.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

import fastvit.kernels
from fastvit import testing
from fastvit.kernels import configs
from fastvit.kernels.blocks import INTERPRETED
from fastvit.kernels.kronecker import padded
from fastvit.ops import (
    gpsa_dropout_torch,
    gpsa_dropout_triton,
    gpsa_torch,
    gpsa_triton,
    mhsa_torch,
    trust,
)
from fastvit.ops.gpsa_triton import Grid, Plan
from fastvit.ops.trust import Candidate, source_hash
from fastvit.testing import CANCELLING, Agreement, agreement

_IMAGES, _HEADS = 2, 3
#: With bits in both halves.
_SEED, _DROPOUT = 0x0123456789ABCDEF, 0.25


#: Plans of calls whose kernels are trusted: they need not be named and looked up again.
_settled: dict[tuple[Any, ...], Plan] = {}


def trusted_plan(
    direction: str, q: Tensor, grid_size: Grid | None, asked: str, *, dropout: bool = False
) -> Plan | None:
    """The kernels to run in the "forward" or "backward" of q, or None if they are not trusted.

    Raises:
        RuntimeError: they failed their check, and were ``asked`` for by name.
    """
    if not trust.needs_proof(q.device):
        return gpsa_triton.plan(direction, q, grid_size, dropout)
    precision = gpsa_triton.precision()
    of_q = (q.device, q.dtype, q.shape)
    call = (trust.generation(), direction, *of_q, grid_size, precision, dropout)
    found = _settled.get(call)
    if found is None:
        op = "mhsa" if grid_size is None else "gpsa_dropout" if dropout else "gpsa"

        def named(plan: Plan) -> Candidate:
            return _candidate(op, direction, plan, q, grid_size)

        plans = (
            gpsa_triton.plan(direction, q, grid_size, dropout),
            gpsa_triton.plan(direction, q, grid_size, dropout, built_in=True),
        )
        trusted = trust.trusted(plans, named, asked)
        found, lasting = trusted
        if found is not None and lasting:
            _settled[call] = found
    return found


def _candidate(op: str, direction: str, plan: Plan, q: Tensor, grid_size: Grid | None) -> Candidate:
    """The kernels of ``plan`` for q (B, H, N, d); plain attention without a grid."""
    N, d = q.shape[2:]
    tokens, grid = _small(N, grid_size)
    capability = "interpreter"
    if not INTERPRETED:
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability(q.device))
    # How many groups the images form changes with their number. Here they are one, so that a
    # program has several images to go through.
    kernels = {name: config._replace(groups=1) for name, config in plan.kernels.items()}
    size = f"N={tokens}" if grid is None else "grid={}x{}".format(*grid)
    version = ".".join(triton.__version__.split(".")[:2])
    dtype = str(q.dtype).removeprefix("torch.")
    arithmetic = f"{dtype},{plan.precision}" if q.dtype == torch.float32 else dtype
    launch = ",".join(f"{name}{tuple(config)}".replace(" ", "") for name, config in kernels.items())
    key = f"{op}/{direction}/{arithmetic}/d={d}/{size}/{launch}/{code()}/{capability}/{version}"
    small = plan._replace(kernels=kernels)
    check = functools.partial(_check, op, direction, small, q.device, q.dtype, tokens, d, grid)
    return Candidate(key, check)


def _small(N: int, grid_size: Grid | None) -> tuple[int, Grid | None]:
    """Sizes for the check: the call's where a row of scores is one tile, else the smallest that
    take the same tiles, whole or with a rest.
    """
    whole = N % 64 == 0
    if N <= configs.TILE_TOKENS:
        return N, grid_size
    if grid_size is None:
        return (320 if whole else 257), None
    sides = [
        range(1 if padded(side) == 16 else padded(side) // 2 + 1, padded(side) + 1)
        for side in grid_size
    ]
    grids = [
        (rows, columns)
        for rows, columns in itertools.product(*sides)
        if rows * columns > configs.TILE_TOKENS and (rows * columns % 64 == 0) == whole
    ]
    grid = min(grids, key=math.prod)
    return math.prod(grid), grid


@functools.cache
def code() -> str:
    """The kernels at hand, as keys name them."""
    folder = Path(fastvit.kernels.__file__).parent
    own = [__file__, gpsa_triton.__file__, gpsa_dropout_triton.__file__, testing.__file__]
    # Which configuration a call takes stands in its key.
    others = ("stem_", "tuned")
    kernels = (file for file in folder.glob("*.py") if not file.name.startswith(others))
    return source_hash(*kernels, *map(Path, own))


def _inputs(dtype: torch.dtype, tokens: int, channels: int, gated: bool) -> list[Tensor]:
    """grad, q, k, v and, gated, pos_weight and gating_param, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(0)
    shape = (_IMAGES, tokens, _HEADS, channels)
    # Whatever the default dtype is.
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float32}
    drawn = [torch.randn(shape, **options).transpose(1, 2) for _ in range(4)]
    if gated:
        # The gradient follows the values, or the sums that are the parameters' gradients cancel.
        drawn[0] = drawn[0] + drawn[3]
        pos_weight = 0.3 * torch.randn(_HEADS, 3, **options)
        # A head that looks near its own place, as trained ones do, and gates open, half and shut.
        pos_weight[:, 2] = -pos_weight[:, 2].abs()
        drawn += [pos_weight, torch.tensor([4.0, 0.5, -4.0])]
    return [x.to(dtype) for x in drawn]


class _Pair(NamedTuple):
    """The kernels and PyTorch's operators of an op, and the names of their results."""

    kernels: Callable[..., Any]
    operators: Callable[..., Any]
    results: tuple[str, ...]


_PAIRS = {
    ("gpsa", "forward"): _Pair(gpsa_triton.forward, gpsa_torch.forward, ("out",)),
    ("gpsa", "backward"): _Pair(
        gpsa_triton.backward, gpsa_torch.backward, ("dqkv", "dpos_weight", "dgating_param")
    ),
    ("gpsa_dropout", "forward"): _Pair(
        gpsa_dropout_triton.forward, gpsa_dropout_torch.forward, ("out",)
    ),
    ("gpsa_dropout", "backward"): _Pair(
        gpsa_dropout_triton.backward,
        gpsa_dropout_torch.backward,
        ("dqk", "dv", "dpos_weight", "dgating_param"),
    ),
    ("mhsa", "forward"): _Pair(gpsa_triton.attention_forward, mhsa_torch.forward, ("out",)),
    ("mhsa", "backward"): _Pair(gpsa_triton.attention_backward, mhsa_torch.backward, ("dqkv",)),
}


#: The kernels round what goes into the products of these sums, PyTorch's operators do not.
_CANCELLING = {
    torch.float32: CANCELLING,
    torch.float16: 16 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 16 * torch.finfo(torch.bfloat16).eps,
}
#: The processor has no tf32 to compare with: four of its units in the last place.
_TF32 = 4 * 2.0**-10


def _check(
    op: str,
    direction: str,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    channels: int,
    grid: Grid | None,
) -> Iterator[Agreement]:
    kernels, operators, names = _PAIRS[op, direction]
    inputs = _inputs(dtype, tokens, channels, grid is not None)
    if direction == "forward":
        inputs = inputs[1:]
    sizes: list[Any] = [channels**-0.5] if grid is None else [grid, channels**-0.5]
    if (op, direction) == ("gpsa", "backward"):
        # All gradients in one piece.
        sizes.append(True)
    if op == "gpsa_dropout":
        inputs.append(torch.tensor([_SEED]))
        sizes.append(_DROPOUT)
    found = [
        kernels(*(x.to(device) for x in inputs), *sizes, plan),
        operators(*inputs, *sizes),
        operators(*(x.double() if x.is_floating_point() else x for x in inputs), *sizes),
    ]
    columns = ([x] if isinstance(x, Tensor) else x for x in found)
    for name, actual, reference, expected in zip(names, *columns, strict=True):
        floor = _CANCELLING[dtype] if name in ("dpos_weight", "dgating_param") else 0.0
        if dtype == torch.float32 and plan.precision == "tf32":
            floor = _TF32
        yield agreement(actual.cpu(), reference, expected, name=name, floor=floor)

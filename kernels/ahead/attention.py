# SPDX-License-Identifier: Apache-2.0
"""Calls of GPSA and plain attention, and the launches that they come to."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from .launch import Fake, Launch, module, recorded

#: Where every kernel lies in ``kernels``.
KERNELS = {
    "position_table": "position_table",
    "position_factors": "kronecker",
    "kronecker": "kronecker",
    "forward_tile": "forward_tile",
    "forward_stream": "forward_stream",
    "backward_tile": "backward_tile",
    "backward_query": "backward_query",
    "backward_key": "backward_key",
    "factor_gradient": "position_gradient",
    "parameter_gradient": "position_gradient",
    "dropout_forward": "dropout_forward",
    "dropout_query": "dropout_query",
    "dropout_key": "dropout_key",
}


class Case(NamedTuple):
    """A call, and those of its kernels that are compiled for it."""

    direction: str
    #: "float16", "bfloat16", or float32 as "tf32" or "ieee".
    precision: str
    images: int
    heads: int
    #: Sides of the grid, or tokens for plain attention.
    tokens: tuple[int, int] | int
    channels: int
    kernels: tuple[str, ...]
    dropout: bool = False
    #: Of all kernels in their order, in the place of those that ``configs`` chooses.
    chosen: tuple[tuple[str, Any], ...] = ()

    @property
    def grid(self) -> tuple[int, int] | None:
        return self.tokens if isinstance(self.tokens, tuple) else None

    @property
    def count(self) -> int:
        return self.tokens[0] * self.tokens[1] if isinstance(self.tokens, tuple) else self.tokens

    @property
    def dtype(self) -> str:
        return "float32" if self.precision in ("tf32", "ieee") else self.precision

    @property
    def arithmetic(self) -> str:
        return "half" if self.dtype != "float32" else self.precision

    @property
    def name(self) -> str:
        """For example "bfloat16 B256 H9 14x14 d48"; a bare number of tokens is plain attention."""
        tokens = "x".join(map(str, self.grid)) if self.grid else f"N{self.count}"
        name = f"{self.precision} B{self.images} H{self.heads} {tokens} d{self.channels}"
        return f"{name} dropout" if self.dropout else name


@cache
def launches(arch: str, case: Case) -> dict[str, Launch]:
    """The launches of a case on an architecture, by kernel, in their order."""
    chosen = dict(case.chosen)
    if not chosen:
        problem = module("configs").Problem(
            arch, case.arithmetic, case.images, case.heads, case.count, case.channels, case.grid,
            case.dropout,
        )  # fmt: skip
        chosen = getattr(module("configs"), case.direction)(problem)
    with recorded(KERNELS) as found:
        _CALLS[case.direction, case.dropout](case, chosen)
    taken = {kernel: Launch(kernel, grid, made, chosen[kernel]) for kernel, grid, made in found}
    assert list(taken) == list(chosen), f"{list(taken)} were launched, {list(chosen)} chosen"
    return taken


def _heads(case: Case, packed: int) -> Fake:
    """(B, H, N, d), one of ``packed`` that lie as (B, N, packed, H, d)."""
    B, H, N, D = case.images, case.heads, case.count, case.channels
    row = packed * H * D
    return Fake((B, H, N, D), case.dtype, (N * row, D, row, 1))


def _position(case: Case) -> tuple[Fake, Fake]:
    """``pos_weight`` and ``gating_param``."""
    return Fake((case.heads, 3), case.dtype), Fake((case.heads,), case.dtype)


def _arguments(case: Case) -> tuple[Fake, Fake, Fake]:
    """q, k and v as the layers hand them over: qk packed and v alone, or qkv packed."""
    if case.grid is None:
        return _heads(case, 3), _heads(case, 3), _heads(case, 3)
    return _heads(case, 2), _heads(case, 2), _heads(case, 1)


def _precision(case: Case) -> str:
    return "tf32" if case.precision == "tf32" else "ieee"


def _forward(case: Case, chosen: dict[str, Any]) -> None:
    """As ``fastvit/ops/gpsa_triton.py`` has it."""
    (q, k, v), out = _arguments(case), _heads(case, 1)
    scale, precision = case.channels**-0.5, _precision(case)
    weight, gating = _position(case)
    table, gate = None, None
    if case.grid is not None:
        gate = gating
        if "forward_tile" in chosen:
            table = module("position_table").position_table(weight, case.dtype, case.grid)
        else:
            made = module("kronecker")
            py, px = made.position_factors(weight, "float32", case.grid)
            made.kronecker(v, py, px, gating, out, case.grid, precision, chosen["kronecker"])
    if "forward_tile" in chosen:
        launch, config = module("forward_tile").forward_tile, chosen["forward_tile"]
        launch(q, k, v, table, gate, out, scale, precision, config)
    else:
        launch, config = module("forward_stream").forward_stream, chosen["forward_stream"]
        launch(q, k, v, gate, out, scale, precision, config)


def _backward(case: Case, chosen: dict[str, Any]) -> None:
    """As ``fastvit/ops/gpsa_triton.py`` has it."""
    (q, k, v), grad = _arguments(case), _heads(case, 1)
    (dq, dk, dv), gated = _arguments(case), case.grid is not None
    scale, precision = case.channels**-0.5, _precision(case)
    B, H, N, _ = q.shape
    weight, gating = _position(case)
    gate, table, content = gating if gated else None, None, None
    if gated:
        py, px = module("kronecker").position_factors(weight, "float32", case.grid)
    if "backward_tile" in chosen:
        if gated:
            table = module("position_table").position_table(
                weight, case.dtype, case.grid, transposed=True
            )
            content = Fake((H, B), "float32")
        module("backward_tile").backward_tile(
            grad, q, k, v, table, gate, dq, dk, dv, content,
            scale, precision, chosen["backward_tile"],
        )  # fmt: skip
    else:
        if gated:
            module("kronecker").kronecker(
                grad, py, px, gating, dv, case.grid, precision, chosen["kronecker"],
                transposed=True,
            )  # fmt: skip
            parts = B * -(-N // chosen["backward_query"].rows)
            content = Fake((H, parts), "float32")
        statistics = Fake((2, B, H, N), "float32")
        module("backward_query").backward_query(
            grad, q, k, v, gate, dq, statistics, content,
            scale, precision, chosen["backward_query"],
        )  # fmt: skip
        module("backward_key").backward_key(
            grad, q, k, v, gate, statistics, dk, dv, scale, precision, chosen["backward_key"]
        )
    if gated:
        made = module("position_gradient")
        dpy, dpx = made.factor_gradient(
            grad, v, py, px, case.grid, precision, chosen["factor_gradient"]
        )
        made.parameter_gradient(
            py, px, dpy, dpx, content, gating, *_position(case), chosen["parameter_gradient"]
        )


def _dropout_arguments(case: Case) -> tuple[Any, ...]:
    """Factors, gates and seed, as the kernels with dropout take them."""
    weight, gating = _position(case)
    py, px = module("kronecker").position_factors(weight, "float32", case.grid)
    return py, px, gating, Fake((1,), "int64")


def _dropout_forward(case: Case, chosen: dict[str, Any]) -> None:
    """As ``fastvit/ops/gpsa_triton.py`` has it."""
    (q, k, v), out = _arguments(case), _heads(case, 1)
    module("dropout_forward").dropout_forward(
        q, k, v, *_dropout_arguments(case), out,
        case.grid, case.channels**-0.5, 0.1, _precision(case), chosen["dropout_forward"],
    )  # fmt: skip


def _dropout_backward(case: Case, chosen: dict[str, Any]) -> None:
    """As ``fastvit/ops/gpsa_triton.py`` has it."""
    (q, k, v), (dq, dk, dv) = _arguments(case), _arguments(case)
    grad, (B, H, N, _) = _heads(case, 1), q.shape
    given = (grad, q, k, v, *_dropout_arguments(case))
    statistics = Fake((2, B, H, N), "float32")
    parts = Fake((H, B, -(-N // chosen["dropout_query"].rows), 4), "float32")
    sizes = (case.grid, case.channels**-0.5, 0.1, _precision(case))
    module("dropout_query").dropout_query(
        *given, dq, statistics, parts, *sizes, chosen["dropout_query"]
    )
    module("dropout_key").dropout_key(*given, statistics, dk, dv, *sizes, chosen["dropout_key"])


_CALLS = {
    ("forward", False): _forward,
    ("backward", False): _backward,
    ("forward", True): _dropout_forward,
    ("backward", True): _dropout_backward,
}

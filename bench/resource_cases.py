# SPDX-License-Identifier: Apache-2.0
"""What ``bench/resources.py`` compiles of GPSA and plain attention: cases, and the launches that
they come to.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from resource_launch import Fake, Launch, module, recorded

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


_STREAM = ("backward_query", "backward_key")
_ALL_BACKWARD = ("backward_tile", *_STREAM)
_BOTH = ("forward_tile", "forward_stream")
_DROPOUT = ("dropout_query", "dropout_key")

# At most 48 pairs of a kernel and a case; an architecture compiles those that it chooses. Batches
# are 256 for grids like 14x14 and 64 above, but 1 or 2 where a small call is the case.
CASES = (
    # ConViT-S at 224 pixels, ViT at 224 pixels, and the widths around them.
    Case("forward", "bfloat16", 256, 9, (14, 14), 48, ("position_table", "forward_tile")),
    Case("forward", "bfloat16", 1, 4, (14, 14), 48, ("forward_tile",)),
    Case("forward", "bfloat16", 256, 12, 197, 64, ("forward_tile",)),
    Case("forward", "bfloat16", 256, 12, (16, 16), 64, ("forward_tile",)),
    Case("forward", "bfloat16", 2, 6, (16, 16), 64, _BOTH),
    Case("forward", "float16", 256, 12, (7, 7), 16, ("forward_tile",)),
    Case("forward", "bfloat16", 256, 6, (7, 28), 40, ("forward_tile",)),
    Case("forward", "bfloat16", 256, 8, (14, 14), 80, _BOTH),
    Case("forward", "float16", 256, 6, (16, 16), 128, _BOTH),
    # More tokens than a tile has.
    Case("forward", "bfloat16", 64, 9, (24, 24), 48, ("kronecker", "forward_stream")),
    Case("forward", "bfloat16", 64, 6, (64, 64), 64, ("kronecker", "forward_stream")),
    # float32.
    Case("forward", "tf32", 256, 9, (14, 14), 48, ("forward_stream",)),
    Case("forward", "ieee", 256, 6, 197, 128, ("forward_stream",)),
    # Backward.
    Case("backward", "bfloat16", 256, 9, (14, 14), 48, (*_ALL_BACKWARD, "factor_gradient")),
    Case("backward", "float16", 256, 12, 197, 64, _ALL_BACKWARD),
    Case("backward", "bfloat16", 256, 12, (7, 7), 64, ("backward_tile",)),
    Case("backward", "bfloat16", 256, 8, (14, 14), 112, _STREAM),
    Case("backward", "float16", 64, 6, (24, 24), 128, (*_STREAM, "factor_gradient")),
    Case(
        "backward",
        "bfloat16",
        64,
        6,
        (64, 64),
        64,
        ("position_factors", "factor_gradient", "parameter_gradient"),
    ),
    Case("backward", "tf32", 64, 6, (24, 24), 128, (*_STREAM, "factor_gradient")),
    Case("backward", "ieee", 256, 6, (14, 14), 128, _STREAM),
    Case("backward", "ieee", 64, 6, (64, 64), 64, ("kronecker", "factor_gradient")),
    # Attention dropout.
    Case("forward", "bfloat16", 256, 9, (14, 14), 48, ("dropout_forward",), dropout=True),
    Case("forward", "ieee", 64, 6, (24, 24), 128, ("dropout_forward",), dropout=True),
    Case("backward", "bfloat16", 256, 9, (14, 14), 48, _DROPOUT, dropout=True),
    Case("backward", "tf32", 64, 6, (24, 24), 128, _DROPOUT, dropout=True),
)


@cache
def launches(arch: str, case: Case) -> dict[str, Launch]:
    """The launches of a case on an architecture, by kernel, in their order."""
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
        return (_heads(case, 3),) * 3
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
    (dq, dk, dv), gated = (q, k, v), case.grid is not None
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
            py, px, dpy, dpx, content, gating, weight, gating, chosen["parameter_gradient"]
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
    (q, k, v), grad = _arguments(case), _heads(case, 1)
    B, H, N, _ = q.shape
    given = (grad, q, k, v, *_dropout_arguments(case))
    statistics = Fake((2, B, H, N), "float32")
    parts = Fake((H, B, -(-N // chosen["dropout_query"].rows), 4), "float32")
    sizes = (case.grid, case.channels**-0.5, 0.1, _precision(case))
    module("dropout_query").dropout_query(
        *given, q, statistics, parts, *sizes, chosen["dropout_query"]
    )
    module("dropout_key").dropout_key(*given, statistics, k, v, *sizes, chosen["dropout_key"])


_CALLS = {
    ("forward", False): _forward,
    ("backward", False): _backward,
    ("forward", True): _dropout_forward,
    ("backward", True): _dropout_backward,
}

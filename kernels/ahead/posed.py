# SPDX-License-Identifier: Apache-2.0
"""The launches that a problem of :mod:`kernels.tuned` comes to, with whatever configurations."""

from __future__ import annotations

from typing import Any

from . import attention, stem, stem_gradient

#: What stands for an arithmetic where no dtype was asked for.
PRECISIONS = {"half": "bfloat16", "tf32": "tf32", "ieee": "ieee"}


def case_of(problem: Any, kernels: tuple[tuple[str, Any], ...] = (), precision: str = "") -> Any:
    """A problem with these kernels, else the built-in ones; ``precision`` as cases have it."""
    precision = precision or PRECISIONS[problem.arithmetic]
    if problem.op.startswith("stem_"):
        kind = stem.Case if problem.direction == "forward" else stem_gradient.Case
        config = kernels[0][1] if kernels else None
        return kind(problem.op, precision, *problem[3:], problem.direction, config)
    tokens = problem.grid or problem.tokens
    return attention.Case(
        problem.direction, precision, problem.images, problem.heads, tokens, problem.channels,
        tuple(name for name, _ in kernels), problem.op == "gpsa_dropout", kernels,
    )  # fmt: skip

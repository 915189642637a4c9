# SPDX-License-Identifier: Apache-2.0
"""Formulas for ``torch.utils.flop_counter``: the flops of an op are those of the products and
convolutions in the reference, however few its kernels need. A multiply-add is two.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from math import prod
from typing import Any

#: Gets shapes where the op gets tensors.
Formula = Callable[..., int]
Shape = tuple[int, ...]

_COUNTER = "torch.utils.flop_counter"
_formulas: list[tuple[Any, Formula]] = []


def count(op: Any, formula: Formula) -> None:
    """Give the op packet ``op`` its ``formula``: now, or once PyTorch's counter is imported, which
    imports Triton and takes longer than all of this package.
    """
    if _COUNTER in sys.modules:
        sys.modules[_COUNTER].register_flop_formula(op)(formula)
        return
    if not _formulas:
        sys.meta_path.insert(0, _AfterImport())
    _formulas.append((op, formula))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the counter as the other finders do, and registers the formulas when it has run."""

    def __init__(self) -> None:
        self._asking_others = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != _COUNTER or self._asking_others:
            return None
        self._asking_others = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking_others = False
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            for op, formula in _formulas:
                module.register_flop_formula(op)(formula)
            # Somebody may have asked for the spec alone, or the import may have failed, till now.
            if self in sys.meta_path:
                sys.meta_path.remove(self)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def product(rows: int, inner: int, columns: int) -> int:
    """Of a matrix product."""
    return 2 * rows * inner * columns


def convolution(weight: Shape, batch: int, positions: int) -> int:
    """Of a convolution with a ``weight`` (C_out, C_in, height, width) that has this many positions
    in its output, and of either of its gradients.
    """
    return 2 * prod(weight) * batch * positions

# SPDX-License-Identifier: Apache-2.0
"""What the layers are to the tracers that look into a module's Python: ``torch.fx`` takes them for
one node each, ``torch.jit.script`` is refused.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn


class Leaf:
    """Mixin of the modules whose forward asks for shapes and chooses between implementations."""

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by ``torch.jit.script``, for children too; it would fail somewhere inside."""
        raise RuntimeError(
            f"fastvit: torch.jit.script does not compile {type(self).__qualname__}; torch.compile, "
            "torch.export.export and torch.jit.trace take it"
        )


def fx_node(module: nn.Module, x: Any, *args: Any) -> Any:
    """The call of ``module`` as a node in the graph of the ``torch.fx`` tracer that made ``x``;
    None where ``x`` is a tensor.

    timm marks its GPSA as such a leaf in its own tracer, which a tracer of torch's does not know.

    Raises:
        TypeError: the module itself is what is traced.
    """
    if not isinstance(x, torch.fx.Proxy):
        return None
    tracer: Any = x.tracer
    try:
        name = tracer.path_of_module(module)
    except NameError:
        name = ""
    if not name:
        raise TypeError(
            f"fastvit: torch.fx does not trace the inside of {type(module).__qualname__}; in a "
            "module that holds it, it is one node"
        )
    return tracer.create_proxy("call_module", name, (x, *args), {})

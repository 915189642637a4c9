# SPDX-License-Identifier: Apache-2.0
"""The layers of a model that adapters serve or could serve, and those that only look like it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from fastvit.integrations.adapter import Accelerated
from fastvit.integrations.embedding import AcceleratedConv2d, AcceleratedModel
from fastvit.integrations.recognition import (
    adapter_of,
    likeness_of,
    patch_convolution_of,
)


class Candidate(NamedTuple):
    """A layer in question.

    Attributes:
        name: dotted, within the model.
        module: the layer.
        layer: its kind.
        adapter: that serves it or could; None if there is a reason why not.
        reason: in words, or empty.
    """

    name: str
    module: nn.Module
    layer: str
    adapter: type[Accelerated] | None
    reason: str


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Every layer in question, in the order of ``named_modules()``."""
    convolutions: set[str] = set()
    wrapped: list[tuple[str, str]] = []
    stems: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in stems):
            continue
        wrapper = _wrapper(module)
        if wrapper is not None:
            wrapped.append((f"{name}." if name else "", wrapper))
        place = patch_convolution_of(module)
        if place is not None:
            convolutions.add(f"{name}.{place}" if name else place)
        found = _candidate(name, module, name in convolutions)
        if found is None:
            continue
        if found.layer == "conv_stem":
            # What is inside a stem is part of it.
            stems.append(f"{name}." if name else "")
        for prefix, reason in wrapped:
            if f"{name}.".startswith(prefix):
                found = found._replace(adapter=None, reason=reason)
        yield found


def _candidate(name: str, module: nn.Module, makes_patches: bool) -> Candidate | None:
    if isinstance(module, Accelerated):
        if "_original" not in type(module).__dict__:
            kind = type(module).__qualname__
            reason = f"the class {kind} was put over it after it was accelerated"
            return Candidate(name, module, module._layer, None, reason)
        if isinstance(module, AcceleratedModel):
            return None
        return Candidate(name, module, module._layer, module._mixin, "")
    adapter = AcceleratedConv2d if makes_patches else adapter_of(module)
    if adapter is None:
        found = likeness_of(module)
        return None if found is None else Candidate(name, module, found.layer, None, found.reason)
    refusal = refusal_of(module, adapter)
    return Candidate(name, module, adapter._layer, None if refusal else adapter, refusal or "")


def refusal_of(module: nn.Module, adapter: type[Accelerated]) -> str | None:
    """Why an adapter cannot serve a module of the right class, or None."""
    if "forward" in module.__dict__:
        return "it was given a forward of its own"
    if not any(p.is_floating_point() for p in module.parameters()):
        return "it has no floating parameters: is it quantised?"
    return lenient_refusal(module, adapter)


def lenient_refusal(module: nn.Module, adapter: type[Accelerated]) -> str | None:
    """That of the adapter, also of a copy of the authors' file that somebody edited."""
    try:
        return adapter._refusal(module)
    except AttributeError as error:
        return f"it is not what its name says: {error}"


def _wrapper(module: nn.Module) -> str | None:
    """Why what is inside a module is better left alone, or None."""
    if is_compiled(module):
        return "it is compiled; accelerate the model before torch.compile"
    if type(module).__qualname__ == "FullyShardedDataParallel":
        return "it is sharded already; accelerate the model before FullyShardedDataParallel"
    return None


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is ``torch.compile``'s, or was compiled in place."""
    return (
        type(module).__qualname__ == "OptimizedModule"
        or getattr(module, "_compiled_call_impl", None) is not None
    )

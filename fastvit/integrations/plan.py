# SPDX-License-Identifier: Apache-2.0
"""What :func:`fastvit.accelerate` is going to change; the model is only looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import nn

from fastvit._report import Entry
from fastvit.integrations.adapter import Accelerated, Setting
from fastvit.integrations.embedding import AcceleratedEmbedding, AcceleratedModel
from fastvit.integrations.recognition import model_adapter_of
from fastvit.integrations.survey import Candidate, candidates
from fastvit.ops.backend import AUTO, choose, refusal, requested

#: Why a layer stays that ``where`` is false for.
LEFT_OUT = "left out by where"

Swaps = dict[str, tuple[nn.Module, type[Accelerated]]]


class Plan(NamedTuple):
    """Modules with their adapters by name, and what the report will say."""

    swaps: Swaps
    swapped: tuple[Entry, ...]
    skipped: tuple[Entry, ...]


def plan(
    model: nn.Module,
    layers: Sequence[str],
    setting: Setting,
    where: Callable[[str, nn.Module], bool] | None,
) -> Plan:
    """See :func:`fastvit.accelerate` for the arguments."""
    swaps: Swaps = {}
    swapped: dict[str, Entry] = {}
    skipped = []
    for found in candidates(model):
        if found.layer not in layers:
            continue
        reason = found.reason or _refusal(found, setting, where)
        if reason:
            skipped.append(entry(found, "", reason))
            continue
        assert found.adapter is not None
        swaps[found.name] = found.module, found.adapter
        backend = choose(found.adapter._call(found.module), requested(setting.backend))
        swapped[found.name] = entry(found, backend, "")
    for name, reason in _around(model, swaps):
        swapped[name] = swapped[name]._replace(reason=reason)
    return Plan(swaps, tuple(swapped.values()), tuple(skipped))


def entry(found: Candidate, backend: str, reason: str) -> Entry:
    """The line of the report on a layer."""
    kind = type(found.module)
    if isinstance(found.module, Accelerated):
        kind = found.module._original
    return Entry(found.name, kind.__qualname__, found.layer, backend, reason)


def _refusal(
    found: Candidate, setting: Setting, where: Callable[[str, nn.Module], bool] | None
) -> str:
    if where is not None and not where(found.name, found.module):
        return LEFT_OUT
    name = requested(setting.backend)
    assert found.adapter is not None
    reason = None if name == AUTO else refusal(found.adapter._call(found.module), name)
    return "" if reason is None else f"backend {name!r}: {reason}"


def _around(model: nn.Module, swaps: Swaps) -> Iterator[tuple[str, str]]:
    """Add the models that complete the tokens of an embedding among ``swaps``; yields what is to be
    said of that embedding.
    """
    embeddings = {name: name for name in swaps}
    # Those inside first, so that an embedding around an embedding is known.
    for name, module in reversed(list(model.named_modules())):
        adapter = _model_adapter(module)
        if adapter is None:
            continue
        child = f"{name}.{adapter._embedding}" if name else adapter._embedding
        layer, reason = embeddings.get(child), adapter._refusal(module)
        if layer is None:
            continue
        if reason is None:
            swaps[name] = module, adapter
            embeddings[name] = layer
        if not issubclass(adapter, AcceleratedEmbedding):
            yield layer, f"alone, since {reason}" if reason else adapter._note


def _model_adapter(module: nn.Module) -> type[AcceleratedModel] | None:
    if isinstance(module, AcceleratedModel):
        assert issubclass(module._mixin, AcceleratedModel)
        return module._mixin
    return model_adapter_of(module)

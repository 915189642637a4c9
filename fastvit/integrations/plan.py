# SPDX-License-Identifier: Apache-2.0
"""What :func:`fastvit.accelerate` is going to change; the model is only looked at."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from torch import nn

from fastvit._report import Entry
from fastvit.integrations.adapter import Accelerated, Setting
from fastvit.integrations.embedding import AcceleratedEmbedding, AcceleratedModel
from fastvit.integrations.recognition import model_adapter_of
from fastvit.integrations.survey import Candidate, candidates, lenient_refusal
from fastvit.ops.backend import choose, refusal_of_asked, requested

#: Why a layer stays that ``where`` is false for.
LEFT_OUT = "left out by where"

#: How the reason begins where a backend does not run a layer.
BACKEND = "backend"

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
        if where is not None and not where(found.name, found.module):
            reason = LEFT_OUT
        else:
            reason = found.reason or backend_refusal(found.module, found.adapter, setting.backend)
        if reason:
            skipped.append(entry(found, "", reason))
            continue
        assert found.adapter is not None
        swaps[found.name] = found.module, found.adapter
        backend = choose(found.adapter._call(found.module), requested(setting.backend))
        swapped[found.name] = entry(found, backend, "")
    for name, module, adapter, embedding in _around(model, swaps):
        refusal_of_model = lenient_refusal(module, adapter)
        if refusal_of_model is None:
            swaps[name] = module, adapter
        note = _note(adapter, refusal_of_model)
        if note:
            swapped[embedding] = swapped[embedding]._replace(reason=note)
    return Plan(swaps, tuple(swapped.values()), tuple(skipped))


def entry(found: Candidate, backend: str, reason: str) -> Entry:
    """The line of the report on a layer."""
    kind = type(found.module)
    if isinstance(found.module, Accelerated):
        kind = found.module._original
    return Entry(found.name, kind.__qualname__, found.layer, backend, reason)


def backend_refusal(module: nn.Module, adapter: type[Accelerated] | None, asked: str | None) -> str:
    """Why the backend that is asked for, or set for the process, does not run a layer, or empty."""
    reason = None if adapter is None else refusal_of_asked(adapter._call(module), asked)
    return "" if reason is None else f"{BACKEND} {requested(asked)!r}: {reason}"


def notes(model: nn.Module, swapped: Collection[str]) -> Iterator[tuple[str, str]]:
    """What the report says of the embeddings among layers that are swapped, by name."""
    for _, module, adapter, embedding in _around(model, swapped):
        note = _note(adapter, lenient_refusal(module, adapter))
        if isinstance(module, AcceleratedModel) and note:
            yield embedding, note


def _note(adapter: type[AcceleratedModel], refusal: str | None) -> str:
    if issubclass(adapter, AcceleratedEmbedding):
        return ""
    return adapter._note if refusal is None else f"alone, since {refusal}"


def _around(
    model: nn.Module, swapped: Collection[str]
) -> Iterator[tuple[str, nn.Module, type[AcceleratedModel], str]]:
    """The models that complete the tokens of an embedding that is swapped: name, module, adapter
    and the embedding's name.
    """
    embeddings = {name: name for name in swapped}
    # Those inside first, so that an embedding around an embedding is known.
    for name, module in reversed(list(model.named_modules())):
        adapter = _model_adapter(module)
        if adapter is None:
            continue
        embedding = embeddings.get(f"{name}.{adapter._embedding}" if name else adapter._embedding)
        if embedding is not None:
            if lenient_refusal(module, adapter) is None:
                embeddings[name] = embedding
            yield name, module, adapter, embedding


def _model_adapter(module: nn.Module) -> type[AcceleratedModel] | None:
    if isinstance(module, AcceleratedModel):
        assert issubclass(module._mixin, AcceleratedModel)
        return module._mixin
    return model_adapter_of(module)

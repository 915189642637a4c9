# SPDX-License-Identifier: Apache-2.0
"""Whether a call would run, asked without running it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastvit import functional
from fastvit.integrations.adapter import Accelerated
from fastvit.integrations.recognition import IS_OURS, adapter_of, likeness_of
from fastvit.integrations.survey import refusal_of
from fastvit.ops.backend import Call, checked, nearest, refusal_of_asked

_OPS = {
    "gpsa_attention": "gpsa",
    "gpsa_attention_qkpacked": "gpsa",
    "gpsa_attention_qkvpacked": "gpsa",
    "attention": "mhsa",
    "attention_qkvpacked": "mhsa",
    "patch_embed": "patch_embed",
    "conv_stem": "conv_stem",
}


def supports(
    layer_or_op: nn.Module | Callable[..., Any],
    *inputs: Any,
    backend: str | None = None,
    **options: Any,
) -> tuple[bool, str]:
    """Whether a layer or an op runs these inputs, and if not, why. Nothing is computed.

    Of a module of another library: whether :func:`fastvit.accelerate` would take it; what it does
    not take of the inputs, the library's own forward does.

    Args:
        layer_or_op: a layer of fastvit, a function of :mod:`fastvit.functional`, or a module that
            :func:`fastvit.accelerate` may know.
        inputs, options: what it would be called with. Without any the answer is about a plain
            float32 call on this machine.
        backend: by name; None asks for the one that the layer or the process would take.

    Returns:
        (True, "") or (False, reason).

    Raises:
        TypeError: ``layer_or_op`` is neither.
        ValueError: ``backend`` is unknown.
    """
    if backend is not None:
        checked(backend)
    if isinstance(layer_or_op, nn.Module):
        return _answer(_of_module(layer_or_op, inputs, backend, options))
    op = _OPS.get(getattr(layer_or_op, "__name__", ""))
    if op is None or getattr(functional, layer_or_op.__name__) is not layer_or_op:
        name = getattr(layer_or_op, "__name__", repr(layer_or_op))
        raise TypeError(
            "layer_or_op: expected a module or a function of fastvit.functional, got "
            f"{name!r}; {nearest(str(name), list(_OPS))}"
        )
    if not inputs:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return _answer(refusal_of_asked(Call(op, device, torch.float32), backend))
    return _answer(_dry_run(layer_or_op, inputs, {**options, "backend": backend}))


def _answer(reason: str | None) -> tuple[bool, str]:
    return reason is None, reason or ""


def _of_module(
    module: nn.Module, inputs: tuple[Any, ...], backend: str | None, options: dict[str, Any]
) -> str | None:
    likeness = likeness_of(module)
    if likeness is not None and likeness.reason == IS_OURS:
        if not inputs:
            first = next(module.parameters())
            call = Call(likeness.layer, first.device, first.dtype)
            return refusal_of_asked(call, backend or module.backend)  # type: ignore[arg-type]
        # A dry run counts batches all the same.
        module = copy.deepcopy(module) if list(module.buffers()) else copy.copy(module)
        if backend is not None:
            module.backend = backend  # type: ignore[assignment]
        return _dry_run(module, inputs, options)
    adapter = module._mixin if isinstance(module, Accelerated) else adapter_of(module)
    if adapter is None:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"{kind} is no layer that fastvit knows" if likeness is None else likeness.reason
    # Not on the inputs: a library's forward may keep what it makes of them.
    return refusal_of(module, adapter) or refusal_of_asked(adapter._call(module), backend)


def _dry_run(call: Callable[..., Any], inputs: tuple[Any, ...], options: Any) -> str | None:
    """What a call complains of when its tensors have shapes but no numbers."""
    if not inputs:
        return None
    # Takes time to import.
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            call(*inputs, **options)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        return str(error)
    return None

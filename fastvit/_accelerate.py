# SPDX-License-Identifier: Apache-2.0
"""Put fastvit's ops behind the layers of an existing model, and take them out again."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastvit._report import NotAccelerated, Report
from fastvit.inspection import evaluating
from fastvit.integrations.adapter import Accelerated, Setting, Undo, check_uncovered, put_back, swap
from fastvit.integrations.plan import BACKEND, LEFT_OUT, Plan, backend_refusal, entry, notes, plan
from fastvit.integrations.recognition import IS_OURS
from fastvit.integrations.survey import candidates, is_compiled
from fastvit.ops.backend import AUTO, OPS, checked, choose, nearest, requested

_MODES = ("train", "infer")

_logger = logging.getLogger("fastvit")


def accelerate(
    model: nn.Module,
    *,
    layers: Sequence[str] = OPS,
    mode: str = "train",
    backend: str = AUTO,
    where: Callable[[str, nn.Module], bool] | None = None,
    strict: bool = False,
    verify: Any = None,
) -> Report:
    """Run the layers of an existing model on fastvit's ops, in place.

    Known are timm's ConViT, vision transformers and their embeddings, the authors' ConViT,
    torchvision's and Hugging Face's vision transformers, the stems of pycls, and any
    ``nn.Sequential`` with the layers of a ViT_C stem. A layer keeps its parameters, buffers, keys,
    hooks and place: only its class becomes a subclass of what it was. Where somebody watches or
    replaced a part that the fused op would skip, the library's own forward runs, call by call.
    Do this before ``torch.compile``, DistributedDataParallel and ``fully_shard``.

    Args:
        model: of any kind.
        layers: the kinds to swap.
        mode: "train" serves ``train()`` and ``eval()``. "infer" is for a model in ``eval()`` and
            also keeps what derives from its parameters where that saves time (stacked projections
            on a GPU, batch norms folded into a stem's weights on a processor): a snapshot. It
            follows ``to()``; ``train()``, ``load_state_dict()``, gradients, and calls after the
            parameters have changed raise RuntimeError until :func:`restore`.
        backend: of the swapped layers; "auto" follows :func:`fastvit.set_backend`.
        where: called with the name and the module of each layer in question; those for which it is
            false stay.
        strict: refuse if anything that looks like a layer to swap cannot be.
        verify: example input (a tensor, a tuple of arguments or a mapping of keywords). The model
            runs on it before and after, in eval mode, and the outputs are compared.

    Returns:
        What was swapped and what was not, and why; ``undo()`` puts it back.

    Raises:
        TypeError: ``model`` is no module, or is compiled or scripted.
        ValueError: an unknown name of a layer, mode or backend; mode "infer" for a layer that is
            in ``train()``.
        NotAccelerated: the backend that was asked for by name runs none of the layers; with
            ``strict``, nothing was swapped or something was skipped; with ``verify``, the outputs
            differ by more than the square root of their dtype's eps, relative to the largest.

    Whatever is raised, the model is as it was.
    """
    _check_names(layers, mode, backend)
    model = _unwrapped(model)
    kind = type(model).__name__
    before = None if verify is None else _outputs(model, verify)
    setting = Setting(None if backend == AUTO else backend, mode)
    planned = plan(model, layers, setting, where)
    modules = [module for module, _ in planned.swaps.values()]
    call = object()
    found = Report(planned.swapped, planned.skipped, Undo(modules, call))
    _insist(found, model, strict, backend)
    try:
        for module, mixin in planned.swaps.values():
            swap(module, mixin, setting, call)
        if before is not None:
            found.max_error = _largest_difference(before, _outputs(model, verify), found)
        _warn_of_geometry(model, planned)
        _logger.info("accelerate(%s): %s", kind, found.counts())
    except BaseException:
        found.undo()
        raise
    return found


def restore(model: nn.Module) -> int:
    """Undo every :func:`accelerate` on a model.

    Returns:
        The number of modules whose class was put back.

    Raises:
        TypeError: ``model`` is no module.
        RuntimeError: a layer was wrapped by ``fully_shard`` since; nothing is changed.
    """
    found = [(name, m) for name, m in _modules(model) if isinstance(m, Accelerated)]
    for name, module in found:
        check_uncovered(module, repr(name))
    for _, module in found:
        put_back(module)
    return len(found)


def report(model: nn.Module) -> Report:
    """What runs on fastvit's ops in a model now, and why other layers do not.

    Raises:
        TypeError: ``model`` is no module.
    """
    _modules(model)
    swapped, skipped = {}, []
    for found in candidates(model):
        module = found.module
        reason = found.reason
        if not reason and isinstance(module, Accelerated):
            reason = backend_refusal(module, module._mixin, module._backend)
        if not isinstance(module, Accelerated):
            reason = reason or "fastvit.accelerate has not been called"
        if reason:
            skipped.append(entry(found, "", reason))
        elif isinstance(module, Accelerated):
            backend = choose(module._call(module), requested(module._backend))
            swapped[found.name] = entry(found, backend, "")
    for name, note in notes(model, swapped):
        swapped[name] = swapped[name]._replace(reason=note)
    return Report(tuple(swapped.values()), tuple(skipped))


def _modules(model: object) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return list(model.named_modules())


def _check_names(layers: Sequence[str], mode: str, backend: str) -> None:
    if isinstance(layers, str):
        raise ValueError(f"layers: expected a sequence of names, got the string {layers!r}")
    for name in layers:
        if name not in OPS:
            raise ValueError(f"layers: unknown name {name!r}; {nearest(str(name), OPS)}")
    if mode not in _MODES:
        raise ValueError(f"mode: unknown name {mode!r}; {nearest(str(mode), _MODES)}")
    checked(backend)


def _unwrapped(model: object) -> nn.Module:
    """The model within a data-parallel wrapper."""
    _modules(model)
    assert isinstance(model, nn.Module)
    if is_compiled(model):
        raise TypeError(
            f"model: expected one that is not compiled, got {type(model).__name__}; "
            "accelerate it first, then torch.compile"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"model: expected one that is not scripted, got {type(model).__name__} of "
            f"{model.original_name}"
        )
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        warnings.warn(
            f"fastvit.accelerate goes before {type(model).__name__}; it takes the model within",
            stacklevel=3,
        )
        return _unwrapped(model.module)
    return model


def _insist(found: Report, model: nn.Module, strict: bool, backend: str) -> None:
    """Raise, or warn, if too little can be swapped."""
    # Layers of fastvit have nothing to gain, and what the user left out is no surprise.
    wanted = [e for e in found.skipped if e.reason not in (IS_OURS, LEFT_OUT)]
    kind = type(model).__name__
    if strict and (wanted or not found):
        raise NotAccelerated(
            f"accelerate, strict: {kind} would not be swapped whole\n{found}", found
        )
    if found or len(wanted) < len(found.skipped):
        return
    if any(e.reason.startswith(BACKEND) for e in wanted) and backend != AUTO:
        raise NotAccelerated(
            f"backend: {backend!r} was asked for and runs no layer of this {kind}; "
            f"backend='auto' takes one that can\n{found}",
            found,
        )
    warnings.warn(
        f"fastvit.accelerate swapped nothing in this {kind}; print(fastvit.report(model)) says why",
        stacklevel=3,
    )


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Tensors that the model gives for the example inputs, in eval mode."""
    with evaluating(model), torch.no_grad():
        if isinstance(inputs, Mapping):
            out = model(**inputs)
        else:
            out = model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def _largest_difference(before: list[Tensor], after: list[Tensor], found: Report) -> float:
    """Relative to the largest magnitude of each output.

    Raises:
        NotAccelerated: it is more than the square root of the dtype's eps.
    """
    largest = 0.0
    for expected, got in zip(before, after, strict=True):
        if not expected.is_floating_point() or expected.numel() == 0:
            continue
        finite = expected[expected.isfinite()]
        scale = finite.abs().amax().double().item() if finite.numel() else 0.0
        same = (got == expected) | (got.isnan() & expected.isnan())
        difference = (got.double() - expected.double()).abs().masked_fill(same, 0.0)
        error = difference.nan_to_num(math.inf, math.inf).amax().item() / (scale or 1.0)
        limit = math.sqrt(torch.finfo(expected.dtype).eps)
        if error > limit:
            raise NotAccelerated(
                f"verify: expected outputs within {limit:.1e} of those before, relative to the "
                f"largest, got a difference of {error:.1e}; the model is as it was",
                found,
            )
        largest = max(largest, error)
    return largest


def _warn_of_geometry(model: nn.Module, planned: Plan) -> None:
    """ConViT's GPSA takes any square number of tokens for a square grid, and keeps doing so."""
    if not any(e.layer == "gpsa" for e in planned.swapped):
        return
    for name, module in model.named_modules():
        embed = getattr(module, "patch_embed", None)
        grid = _grid(embed)
        if (
            grid is None
            or grid[0] == grid[1]
            or math.isqrt(math.prod(grid)) ** 2 != math.prod(grid)
        ):
            continue
        side = math.isqrt(math.prod(grid))
        warnings.warn(
            f"{name or type(module).__name__}: its GPSA reads the {grid[0]} x {grid[1]} grid as "
            f"{side} x {side}, and gives the same numbers as before; fastvit.create_model makes "
            "ConViTs of any grid",
            stacklevel=3,
        )


def _grid(embed: Any) -> tuple[int, int] | None:
    """Rows and columns of an embedding built for one size of images."""
    sizes = getattr(embed, "img_size", None), getattr(embed, "patch_size", None)
    if not all(isinstance(size, (tuple, list)) and len(size) == 2 for size in sizes):
        return None
    (height, width), (ph, pw) = sizes  # type: ignore[misc]
    return height // ph, width // pw

# SPDX-License-Identifier: Apache-2.0
"""Loading weights of timm, torchvision and the authors' repositories into fastvit's models."""

from __future__ import annotations

import argparse
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.models.classifier import TokenClassifier
from fastvit.models.layouts import Translation, translate
from fastvit.reference.arguments import pair

# Entries of a training checkpoint that hold the plain weights.
_WEIGHT_ENTRIES = ("model", "state_dict", "model_state")


class LoadReport(NamedTuple):
    """What ``load_checkpoint`` found and did.

    Attributes:
        layout: ``"timm"`` (also facebookresearch/convit and deit), ``"torchvision"``,
            ``"pycls"`` or ``"pycls vitconfigs"``.
        entry: where in the checkpoint the weights were, such as ``"model"``; None if the
            checkpoint was the state dict itself.
        left_out: what the checkpoint holds besides: its other entries (optimizer, averaged
            weights, ...) and buffers that the model derives by itself.
        resized: grids (old, new) between which the position embedding was interpolated, or None.
    """

    layout: str
    entry: str | None
    left_out: tuple[str, ...]
    resized: tuple[tuple[int, int], tuple[int, int]] | None


def load_checkpoint(
    model: TokenClassifier,
    path_or_dict: str | os.PathLike[str] | Mapping[str, Any],
    *,
    grid_size: tuple[int, int] | None = None,
) -> LoadReport:
    """Load weights into a model, whichever of the known libraries wrote them.

    Known layouts: timm, facebookresearch/convit and deit (the same keys), torchvision, and
    facebookresearch/pycls (main and vitconfigs). Prefixes of DataParallel, FSDP and
    ``torch.compile`` are removed. Values are converted to the model's dtypes and devices.
    Position embeddings for another patch grid are interpolated as timm does (bicubic,
    antialiased, class token apart). A BatchNorm counter ``num_batches_tracked`` that the
    checkpoint lacks keeps the model's value. Averaged weights (``model_ema``, ``ema_state``)
    are never chosen: load such a checkpoint yourself and pass the entry.

    Args:
        model: a ``ConViT`` or ``VisionTransformer``, not wrapped or compiled.
        path_or_dict: a file of ``torch.save``, read with ``weights_only=True``; a
            ``.safetensors`` file, if that library is installed; a state dict; or a dict that
            holds one as ``"model"``, ``"state_dict"`` or ``"model_state"``.
        grid_size: patch grid (rows, columns) of the checkpoint's position embedding. None
            takes the model's own grid if the number of positions is the same, else a square.

    Returns:
        What was recognised, left out and resized.

    Raises:
        TypeError: if ``model`` or ``path_or_dict`` is of another type.
        ValueError: if the checkpoint holds no weights, or several sets of them.
        RuntimeError: if the file cannot be read safely, or its entries do not fit the model;
            the message lists every missing, unexpected and misshapen one. The model is as it
            was after any of these errors.
    """
    if not isinstance(model, TokenClassifier):
        raise TypeError(
            f"model must be a fastvit.models ConViT or VisionTransformer, got "
            f"{type(model).__name__}; unwrap a parallel or compiled model first "
            f"(model.module, model._orig_mod)"
        )
    target = model.state_dict()
    if any(value.is_meta for value in target.values()):
        raise ValueError("model must be materialised (model.to_empty), got parameters on meta")

    checkpoint = _read(path_or_dict)
    entry, state_dict, left_out = _find_weights(checkpoint)
    translation = translate(state_dict)
    entries = dict(translation.entries)
    # timm once kept GPSA's relative positions in a buffer; they follow from the grid.
    derived = [key for key in entries if key.endswith(".attn.rel_indices") and key not in target]
    left_out += [translation.origin[key] for key in derived]
    for key in derived:
        del entries[key]
    resized = _resize_positions(model, entries, grid_size)
    for key, value in target.items():
        if key.endswith(".num_batches_tracked"):
            entries.setdefault(key, value)
    _check_fit(model, target, entries, translation)
    model.load_state_dict(entries)
    layout = translation.layout
    assert layout is not None, "entries that fit every key are of a known layout"
    return LoadReport(layout.name, entry, tuple(left_out), resized)


def _read(path_or_dict: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    """The checkpoint as a mapping, its tensors on the CPU."""
    if isinstance(path_or_dict, Mapping):
        return path_or_dict
    if not isinstance(path_or_dict, (str, os.PathLike)):
        raise TypeError(f"path_or_dict must be a path or a dict, got {type(path_or_dict).__name__}")
    path = os.fspath(path_or_dict)
    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ModuleNotFoundError as error:
            raise RuntimeError(
                f"reading {path!r} needs the safetensors library: pip install safetensors"
            ) from error
        try:
            return load_file(path)
        except Exception as error:
            # The library has an exception class of its own, which names no path.
            raise RuntimeError(f"{path!r} is no safetensors file: {error}") from error
    # Training scripts of the authors (and of DeiT) save their parsed arguments beside the
    # weights; a Namespace is a plain record, so admitting it keeps the reading safe.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            # Only the zip format, which torch.save has used since 1.6, can be mapped.
            checkpoint = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
        except OSError:
            raise
        except Exception as error:
            # Text and truncated files make the reader of the old format raise almost anything.
            raise RuntimeError(
                f"{path!r} is no file of torch.save, or holds objects besides tensors and plain "
                f"containers; if you trust it, load it yourself and pass the state dict: "
                f"{type(error).__name__}: {error}"
            ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path!r} holds a {type(checkpoint).__name__}, expected a dict")
    return checkpoint


def _find_weights(
    checkpoint: Mapping[str, Any],
) -> tuple[str | None, Mapping[str, Any], list[str]]:
    """Find the state dict in a checkpoint: its entry, itself, and the entries left out."""
    if not all(isinstance(key, str) for key in checkpoint):
        keys = [key for key in checkpoint if not isinstance(key, str)]
        raise ValueError(f"checkpoint: expected keys of type str, got {keys[:3]}")
    nested = [key for key in _WEIGHT_ENTRIES if isinstance(checkpoint.get(key), Mapping)]
    if len(nested) > 1:
        raise ValueError(f"checkpoint holds several sets of weights, {nested}: pass one of them")
    if nested:
        left_out = [str(key) for key in checkpoint if key != nested[0]]
        return nested[0], checkpoint[nested[0]], left_out
    if not any(isinstance(value, Tensor) for value in checkpoint.values()):
        raise ValueError(
            f"checkpoint holds no weights: expected tensors, or a dict of them under one of "
            f"{_WEIGHT_ENTRIES}, got entries {list(checkpoint)}; to load another entry, such as "
            f"averaged weights, pass that entry"
        )
    return None, checkpoint, []


def _resize_positions(
    model: TokenClassifier, entries: dict[str, Any], grid_size: Sequence[int] | None
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Interpolate ``entries["pos_embed"]`` to the model's grid where that is needed and possible.

    What is not possible is left as it is, for the check of shapes to report.
    """
    positions = entries.get("pos_embed")
    if model.pos_embed is None or not isinstance(positions, Tensor) or positions.ndim != 3:
        return None
    new_grid = model.grid_size
    num_prefix = model.pos_embed.shape[1] - math.prod(new_grid)
    num_patches = positions.shape[1] - num_prefix
    if grid_size is not None:
        old_grid = pair(grid_size, "grid_size")
        if math.prod(old_grid) != num_patches:
            raise ValueError(
                f"grid_size {old_grid} must hold the checkpoint's {num_patches} patch positions"
            )
    elif num_patches == math.prod(new_grid):
        old_grid = new_grid
    else:
        side = math.isqrt(max(num_patches, 0))
        old_grid = (side, side)
    if old_grid == new_grid or not 0 < math.prod(old_grid) == num_patches:
        return None
    entries["pos_embed"] = resample_positions(positions, old_grid, new_grid, num_prefix)
    return old_grid, new_grid


def resample_positions(
    positions: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    num_prefix: int,
) -> Tensor:
    """Interpolate position embeddings to another patch grid, bicubic with antialiasing.

    Args:
        positions: (1, num_prefix + rows * columns, D).
        old_grid: rows and columns of the present patch grid.
        new_grid: rows and columns of the grid wanted.
        num_prefix: leading positions without a place on the grid, kept as they are.

    Returns:
        (1, num_prefix + new rows * new columns, D) in the dtype of ``positions``.
    """
    prefix, patches = positions[:, :num_prefix], positions[:, num_prefix:]
    maps = patches.to(torch.promote_types(positions.dtype, torch.float32))
    maps = maps.transpose(1, 2).unflatten(2, old_grid)
    maps = F.interpolate(maps, size=new_grid, mode="bicubic", antialias=True)
    resampled = maps.flatten(2).transpose(1, 2).to(positions.dtype)
    return torch.cat((prefix, resampled), dim=1)


def _check_fit(
    model: TokenClassifier,
    target: Mapping[str, Tensor],
    entries: Mapping[str, Any],
    translation: Translation,
) -> None:
    """Raise one error that lists every entry which does not fit the model."""

    def named(key: str) -> str:
        origin = translation.origin.get(key, key)
        return key if origin == key else f"{key} (in the checkpoint: {origin})"

    missing = [key for key in target if key not in entries]
    unexpected = [translation.origin.get(key, key) for key in entries if key not in target]
    wrong = [
        f"{named(key)}: {problem}"
        for key, expected in target.items()
        if key in entries and (problem := _difference(expected, entries[key]))
    ]
    if not (missing or unexpected or wrong):
        return
    layout = translation.layout.name if translation.layout else "unknown"
    lines = [
        f"checkpoint (layout: {layout}) does not fit {type(model).__name__}, "
        f"which was left unchanged"
    ]
    for title, found in (("missing", missing), ("unexpected", unexpected), ("wrong", wrong)):
        if found:
            lines.append(f"{title} ({len(found)}):")
            lines.extend(f"  {line}" for line in found)
    if _differ_in_length_only(entries.get("pos_embed"), target.get("pos_embed")):
        lines.append("positions of a grid that is not square need the argument grid_size")
    head_only = wrong and all(line.startswith("head.") for line in missing + unexpected + wrong)
    if head_only:
        lines.append(
            "to change the number of classes, create the model with the checkpoint's, load, "
            "then call model.reset_classifier"
        )
    raise RuntimeError("\n".join(lines))


def _differ_in_length_only(positions: Any, expected: Tensor | None) -> bool:
    """Whether position embeddings (1, L, D) agree in everything but L."""
    if expected is None or not isinstance(positions, Tensor) or positions.ndim != 3:
        return False
    return positions.shape[1] != expected.shape[1] and positions.shape[2] == expected.shape[2]


def _difference(expected: Tensor, value: Any) -> str | None:
    """Say why ``value`` cannot be copied to ``expected``; None if it can."""
    if not isinstance(value, Tensor):
        return f"expected a tensor, got {type(value).__name__}"
    if value.shape != expected.shape:
        return f"expected shape {tuple(expected.shape)}, got {tuple(value.shape)}"
    if value.is_floating_point() != expected.is_floating_point():
        return f"expected dtype {expected.dtype}, got {value.dtype}"
    if value.is_meta or value.is_quantized or value.layout != torch.strided:
        return "expected a dense tensor with data, got a meta, sparse or quantised one"
    return None

# SPDX-License-Identifier: Apache-2.0
"""Adapter of ViT_C stems: any chain of modules with the layers of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastvit.integrations.adapter import Frozen
from fastvit.integrations.embedding import AcceleratedEmbedding
from fastvit.layers.children import is_plain
from fastvit.layers.conv_stem import Stage, fused_conv_stem, is_fusible, stem_parts
from fastvit.ops.backend import AUTO, requested
from fastvit.ops.conv_stem_torch import Folded, Stages, fold, infer_folded
from fastvit.ops.library import autocast_dtype
from fastvit.reference import assemble_tokens, stage_grids

#: timm's batch norm with the activation inside.
_NORM_ACT = "timm.layers.norm_act.BatchNormAct2d"


class _Parts(NamedTuple):
    """The layers of a stem, and the place of every module within it, to see replacements."""

    stages: tuple[Stage, ...]
    projection: nn.Conv2d
    places: tuple[tuple[nn.Module | None, str, nn.Module], ...]
    #: Activations, and what only holds the others.
    rest: tuple[nn.Module, ...]
    norms: tuple[type[nn.BatchNorm2d], ...]


class AcceleratedStem(AcceleratedEmbedding):
    """A stem that gives (B, D, H', W')."""

    _layer = "conv_stem"

    @classmethod
    def _refusal(cls, module: nn.Module) -> str | None:
        try:
            stages, projection = stem_parts(module)
        except TypeError as error:
            return str(error).removeprefix("module: ")
        norms = _norm_classes(stages)
        if isinstance(norms, str):
            return norms
        if not is_fusible(stages, projection, *norms):
            return (
                "its batch norms differ in mode, eps or momentum, or somebody watches one of its "
                "layers"
            )
        return None

    def _parts(self) -> _Parts | None:
        """The layers, found again only after a replacement: the walk takes longer than the checks.
        None if they are a stem no more.
        """
        parts: _Parts | None = self.__dict__.get("_fastvit_parts")
        if parts is None or not all(
            (self if parent is None else parent)._modules.get(name) is child
            for parent, name, child in parts.places
        ):
            parts = None
            if self._refusal(self) is None:
                stages, projection = stem_parts(self)
                norms = _norm_classes(stages)
                assert not isinstance(norms, str)
                layers = {projection, *(layer for stage in stages for layer in stage)}
                places = tuple(_places(self))
                rest = tuple(child for _, _, child in places if child not in layers)
                parts = _Parts(tuple(stages), projection, places, rest, norms)
            self.__dict__["_fastvit_parts"] = parts
        return parts

    def _found(self) -> _Parts:
        """The layers, after :meth:`_fits` has looked."""
        return self.__dict__["_fastvit_parts"]

    def _last_weight(self) -> Tensor:
        return self._found().projection.weight

    def _fits(self, images: object) -> bool:
        parts = self._parts()
        if parts is None or not self._serves(images, 4):
            return False
        assert isinstance(images, Tensor)
        for part in parts.rest:
            if not is_plain(part, type(part)):
                return False
        weight: Any = parts.projection._parameters["weight"]
        return (
            images.shape[1] == parts.stages[0][0].in_channels
            and (images.dtype == weight.dtype or autocast_dtype(weight) is not None)
            and images.device == weight.device
            and is_fusible(parts.stages, parts.projection, *parts.norms)
        )

    @classmethod
    def _freeze(cls, module: nn.Module) -> Frozen | None:
        """The batch norms in the weights, on a processor; kernels scale what they have summed."""
        stages, projection = stem_parts(module)
        first: Any = stages[0][1]
        if projection.weight.device.type != "cpu" or first.running_mean is None:
            return None
        columns = [list(column) for column in zip(*map(_tensors, stages), strict=True)]
        strides = [conv.stride[0] for conv, _ in stages]
        folded = fold(Stages(*columns, strides), first.eps)  # type: ignore[call-arg]
        return Frozen.of(folded, *(x for stage in stages for x in _tensors(stage)))

    def _folded(self, parts: _Parts) -> Folded | None:
        """The snapshot, where it is to be used."""
        frozen: Frozen | None = self.__dict__["_fastvit_frozen"]
        if frozen is None or autocast_dtype(parts.projection.weight) is not None:
            return None
        if requested(self._backend) not in (AUTO, "torch"):
            return None
        if parts.stages[0][1].training:
            raise RuntimeError(
                "accelerated with mode='infer', which takes no statistics of a batch: "
                "fastvit.restore(model) first"
            )
        folded: Folded = frozen.get(*(x for stage in parts.stages for x in _tensors(stage)))
        return folded._replace(strides=[conv.stride[0] for conv, _ in parts.stages])

    def _fused(self, images: Tensor, **token_parameters: Any) -> Tensor:
        parts = self._found()
        folded, conv = self._folded(parts), parts.projection
        if folded is not None:
            tokens = infer_folded(images, folded, conv.weight, conv.bias)
            options = {"pos_embed": None, "cls_token": None, **token_parameters}
            return assemble_tokens(tokens, **options)
        return fused_conv_stem(
            parts.stages, parts.projection, images, backend=self._backend, **token_parameters
        )

    def forward(self, input: Any) -> Any:
        if not self._fits(input):
            return super().forward(input)
        strides = [conv.stride[0] for conv, _ in self._found().stages]
        grid = stage_grids(input.shape[-2:], strides)[-1]
        return self._fused(input).transpose(1, 2).unflatten(2, grid)


def _tensors(stage: Stage) -> tuple[Any, ...]:
    """What a stage in eval is computed with."""
    conv, norm = stage
    return conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var


def _places(module: nn.Module) -> Iterator[tuple[nn.Module | None, str, nn.Module]]:
    """Parent, name and child; None for the module itself, which is to keep no reference to it."""
    for parent in module.modules():
        for name, child in parent.named_children():
            yield None if parent is module else parent, name, child


def _norm_classes(stages: list[Stage]) -> tuple[type[nn.BatchNorm2d], ...] | str:
    """Classes besides PyTorch's whose batch norm is PyTorch's, or why there are others.

    timm's has the ReLU inside, which :func:`stem_parts` has found there.
    """
    found = []
    for _, norm in stages:
        kind = type(norm)
        if kind in (nn.BatchNorm2d, nn.SyncBatchNorm):
            continue
        if f"{kind.__module__}.{kind.__qualname__}" != _NORM_ACT:
            return f"a {kind.__qualname__} of {kind.__module__} in the place of a BatchNorm2d"
        found.append(kind)
    return tuple(dict.fromkeys(found))

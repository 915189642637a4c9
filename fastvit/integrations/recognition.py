# SPDX-License-Identifier: Apache-2.0
"""Which adapter serves a module, and in words why one that looks alike has none."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from fastvit import layers
from fastvit.integrations import convit, huggingface, pycls, timm, torchvision
from fastvit.integrations.adapter import Accelerated
from fastvit.integrations.embedding import AcceleratedModel
from fastvit.integrations.stem import AcceleratedStem
from fastvit.layers.conv_stem import stem_parts

_ADAPTERS = {
    **timm.ADAPTERS,
    **convit.ADAPTERS,
    **pycls.ADAPTERS,
    **huggingface.ADAPTERS,
}
_MODELS = {**timm.MODELS, **convit.MODELS, **torchvision.MODELS, **huggingface.MODELS}
_PATCH_CONVOLUTIONS = {**torchvision.PATCH_CONVOLUTIONS, **pycls.PATCH_CONVOLUTIONS}
#: Why a layer of this package is not swapped.
IS_OURS = "a layer of fastvit already"
_OWN = {
    layers.GPSA: "gpsa",
    layers.MHSA: "mhsa",
    layers.PatchEmbed: "patch_embed",
    layers.ConvStem: "conv_stem",
}


def qualified_name(kind: type) -> str:
    """Module and name of a class. The authors' ConViT is one file, wherever somebody put it."""
    path, _, file = kind.__module__.rpartition(".")
    if file == "convit" and path.partition(".")[0] not in ("timm", "fastvit"):
        return f"convit.{kind.__qualname__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def adapter_of(module: nn.Module) -> type[Accelerated] | None:
    """The adapter of exactly this class, or None. A Sequential is known by its layers."""
    if type(module) is nn.Sequential:
        return AcceleratedStem if _misfit_of_stem(module) is None else None
    return _ADAPTERS.get(qualified_name(type(module)))


def model_adapter_of(module: nn.Module) -> type[AcceleratedModel] | None:
    """The adapter of a model that completes the tokens of its embedding, or None."""
    return _MODELS.get(qualified_name(type(module)))


def patch_convolution_of(module: nn.Module) -> str | None:
    """Where a module keeps a bare convolution that makes patches, or None."""
    name = _PATCH_CONVOLUTIONS.get(qualified_name(type(module)))
    return name if name is not None and type(getattr(module, name)) is nn.Conv2d else None


class Likeness(NamedTuple):
    """A kind of layer that a module resembles, and why it is none that can be served."""

    layer: str
    reason: str


def likeness_of(module: nn.Module) -> Likeness | None:
    """What a module without an adapter resembles, or None."""
    for own, layer in _OWN.items():
        if isinstance(module, own):
            return Likeness(layer, IS_OURS)
    if isinstance(module, torch.jit.ScriptModule):
        return _scripted(module)
    for base in type(module).__mro__[1:]:
        adapter = _ADAPTERS.get(qualified_name(base))
        if adapter is not None:
            return Likeness(adapter._layer, _why_not_exact(module, base))
    if isinstance(module, nn.Sequential):
        misfit = _misfit_of_stem(module)
        return Likeness("conv_stem", misfit) if misfit and _resembles_stem(module) else None
    return _by_children(module)


def _why_not_exact(module: nn.Module, base: type) -> str:
    if nn.utils.parametrize.is_parametrized(module):
        return "its parameters are parametrised"
    kind = type(module)
    if any(c.__name__ == "FSDPModule" for c in kind.__mro__):
        return "it is sharded already; accelerate the model before fully_shard"
    return (
        f"{kind.__module__}.{kind.__qualname__} is a subclass of {base.__qualname__}, "
        "whose forward may differ"
    )


def _scripted(module: torch.jit.ScriptModule) -> Likeness | None:
    for name, adapter in _ADAPTERS.items():
        if name.rpartition(".")[2] == module.original_name:
            return Likeness(adapter._layer, "it is scripted; accelerate the model before")
    return None


def _by_children(module: nn.Module) -> Likeness | None:
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    children = module._modules.keys() | module._parameters.keys()
    if {"qk", "v", "proj", "pos_proj", "gating_param"} <= children:
        hint = "fastvit.GPSA.from_module takes it, if its arithmetic is GPSA's"
        return Likeness("gpsa", f"{kind} is no class that fastvit knows; {hint}")
    if isinstance(module, nn.MultiheadAttention):
        return Likeness("mhsa", "torch.nn.MultiheadAttention is left to PyTorch's own kernels")
    if {"qkv", "proj"} <= children and hasattr(module, "num_heads"):
        return Likeness("mhsa", f"{kind} is no class that fastvit knows")
    for name in ("proj", "projection"):
        conv = module._modules.get(name)
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == conv.stride != (1, 1):
            return Likeness("patch_embed", f"{kind} is no class that fastvit knows")
    return None


def _misfit_of_stem(module: nn.Module) -> str | None:
    try:
        stem_parts(module)
    except TypeError as error:
        return str(error).removeprefix("module: ")
    return None


def _resembles_stem(module: nn.Module) -> bool:
    """Whether a chain ends with the projection of a stem after normalised 3x3 convolutions."""
    leaves = [m for m in module.modules() if next(m.children(), None) is None]
    convolutions = [m for m in leaves if isinstance(m, nn.Conv2d)]
    return (
        len(convolutions) > 1
        and leaves[-1] is convolutions[-1]
        and convolutions[-1].kernel_size == (1, 1)
        and any(conv.kernel_size == (3, 3) for conv in convolutions[:-1])
        and not any(isinstance(m, (nn.Linear, nn.LayerNorm)) for m in leaves)
    )

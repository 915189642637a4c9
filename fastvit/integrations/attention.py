# SPDX-License-Identifier: Apache-2.0
"""Adapters of attention layers: gated positional, of timm and the authors of ConViT, and plain."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastvit.integrations.adapter import Accelerated, Frozen
from fastvit.layers import gpsa, mhsa
from fastvit.layers.children import dropout_rate, is_plain, stacked_parameters
from fastvit.ops.backend import Call


class AcceleratedGPSA(Accelerated):
    """A GPSA of N = side² tokens; both libraries know square grids only."""

    _layer = "gpsa"

    @classmethod
    def _refusal(cls, module: Any) -> str | None:
        if not is_plain(module.pos_proj, nn.Linear):
            return _watched("pos_proj", module.pos_proj, nn.Linear)
        if not gpsa.is_fusible(module):
            return _watched("attn_drop", module.attn_drop, nn.Dropout)
        return None

    @classmethod
    def _call(cls, module: Any) -> Call:
        return super()._call(module)._replace(channels=module.dim // module.num_heads)

    @classmethod
    def _freeze(cls, module: Any) -> Frozen | None:
        layers = (module.qk, module.v)
        if not all(is_plain(layer, nn.Linear) and layer.weight.is_cuda for layer in layers):
            return None
        made = stacked_parameters(layers)
        return None if made is None else Frozen.of(made, *_parameters(*layers))

    def forward(self, x: Tensor) -> Tensor:
        if not self._serves(x, 3) or not gpsa.is_fusible(self):
            return super().forward(x)
        # Not math.isqrt, which torch.compile cannot trace for a symbolic number of patches.
        side = int(x.shape[1] ** 0.5)
        if side * side != x.shape[1]:
            return super().forward(x)
        return gpsa.fused_gpsa(self, x, (side, side), self._backend, self._stack())

    def _stack(self) -> Any:
        """``qk`` and ``v`` as they were stacked in mode "infer"; None if they are to be called."""
        frozen: Frozen | None = self.__dict__["_fastvit_frozen"]
        layers: Any = (self.qk, self.v)
        if frozen is None or not all(is_plain(layer, nn.Linear) for layer in layers):
            return None
        if nn.modules.module._has_any_global_hook():
            return None
        return frozen.get(*_parameters(*layers))

    def get_attention(self, x: Tensor) -> Tensor:
        """The mixed attention map (B, H, N, N), by the library's own arithmetic."""
        self._keep_positions(x.shape[1])
        return super().get_attention(x)  # type: ignore[misc]

    def get_attention_map(self, x: Tensor, return_map: bool = False) -> Any:
        """The mean distance of each head (H,), and with ``return_map`` the map (H, N, N)."""
        self._keep_positions(x.shape[1])
        return super().get_attention_map(x, return_map)  # type: ignore[misc]

    def _keep_positions(self, N: int) -> None:
        """The relative positions, which the library's forward makes and keeps."""
        kept = getattr(self, "rel_indices", None)
        if kept is None or kept.shape[1] != N:
            made: Tensor | None = self.get_rel_indices(N)  # type: ignore[operator]
            # The authors' method keeps them by itself.
            if made is not None:
                self.rel_indices = made


class AcceleratedAttention(Accelerated):
    """Plain attention on one ``qkv``; with a mask it runs as the library's own."""

    _layer = "mhsa"

    @classmethod
    def _refusal(cls, module: Any) -> str | None:
        children = module._modules
        for name in ("q_norm", "k_norm", "norm"):
            child = children.get(name)
            if child is not None and not is_plain(child, nn.Identity):
                return f"its {name} is a {type(child).__name__}"
        if children.get("gate") is not None:
            return "its output is gated"
        if not mhsa.is_fusible(module):
            return _watched("attn_drop", module.attn_drop, nn.Dropout)
        return None

    @classmethod
    def _call(cls, module: Any) -> Call:
        width = getattr(module.qkv, "out_features", None)
        channels = None if width is None else width // (3 * module.num_heads)
        return super()._call(module)._replace(channels=channels)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        masked = any(a is not None and a is not False for a in (*args, *kwargs.values()))
        if masked or not self._serves(x, 3) or self._refusal(self) is not None:
            return super().forward(x, *args, **kwargs)
        scale: Any = self.scale
        dropout = dropout_rate(self.attn_drop)  # type: ignore[arg-type]
        if getattr(self, "fused_attn", False):
            # What timm gives to PyTorch's kernel is not what it takes for its own arithmetic.
            scale, dropout = None, self.attn_drop.p if self.training else 0.0  # type: ignore[union-attr, assignment]
        return mhsa.fused_mhsa(self, x, scale, dropout, self._backend)


def _parameters(*layers: nn.Module) -> tuple[Tensor, ...]:
    return tuple(p for layer in layers for p in layer._parameters.values() if p is not None)


def _watched(name: str, child: nn.Module, kind: type[nn.Module]) -> str:
    if type(child) is kind:
        return f"a hook sits on its {name}, or a forward of its own"
    return f"its {name} is a {type(child).__name__} in the place of a {kind.__name__}"

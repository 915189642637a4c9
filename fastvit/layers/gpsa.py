# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import reference
from fastvit.functional import gpsa_attention_qkpacked, gpsa_attention_qkvpacked
from fastvit.layers.children import dropout_rate, is_plain, project, stacked_projection
from fastvit.layers.documentation import with_backend
from fastvit.layers.tracing import Leaf, fx_node
from fastvit.ops.backend import checked, requested
from fastvit.ops.library import plain_ops_wanted
from fastvit.reference.arguments import check_tokens


class GPSA(Leaf, reference.GPSA):
    __doc__ = with_backend(reference.GPSA)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        locality_strength: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        qk_scale: float | None = None,
        use_local_init: bool = False,
        grid_size: tuple[int, int] | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            qkv_bias,
            attn_drop,
            proj_drop,
            locality_strength,
            device,
            dtype,
            qk_scale=qk_scale,
            use_local_init=use_local_init,
            grid_size=grid_size,
        )
        self.backend = None if backend is None else checked(backend)

    @classmethod
    def from_module(cls, module: Any, **kwargs: Any) -> GPSA:
        """A layer that shares the parameters of timm's or the authors' GPSA.

        Args:
            module: with ``qk``, ``v``, ``proj``, ``pos_proj``, ``gating_param``, ``num_heads``,
                ``scale``, ``attn_drop`` and ``proj_drop``. It keeps working.
            kwargs: ``grid_size`` and ``backend``.

        Raises:
            TypeError: ``module`` lacks some of these; the message names them.
        """
        parameters = ("qk", "v", "proj", "pos_proj", "gating_param")
        options = ("num_heads", "scale", "attn_drop", "proj_drop")
        missing = [name for name in (*parameters, *options) if not hasattr(module, name)]
        if missing:
            raise TypeError(
                f"module: expected a GPSA, got {type(module).__qualname__} "
                f"without {', '.join(missing)}"
            )
        layer = cls(
            module.v.in_features,
            module.num_heads,
            module.qk.bias is not None,
            module.attn_drop.p,
            module.proj_drop.p,
            getattr(module, "locality_strength", 1.0),
            device="meta",
            qk_scale=module.scale,
            **kwargs,
        )
        for name in parameters:
            setattr(layer, name, getattr(module, name))
        return layer.train(module.training)

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        if (node := fx_node(self, x, grid_size)) is not None:
            return node
        check_tokens(x, self.dim)
        # The zeros of the bias would be in a trace, and not in PyTorch's check of it, which has no
        # gradients.
        if requested(self.backend) == "reference" or not is_fusible(self) or plain_ops_wanted():
            return super().forward(x, grid_size)
        grid = self.resolve_grid_size(x.shape[1], grid_size)
        return fused_gpsa(self, x, grid, self.backend)


def is_fusible(layer: Any) -> bool:
    """Whether nobody watches or replaced the children of a GPSA that :func:`fused_gpsa` skips."""
    return is_plain(layer.attn_drop, nn.Dropout, nn.Identity) and is_plain(
        layer.pos_proj, nn.Linear
    )


def fused_gpsa(
    layer: Any,
    x: Tensor,
    grid: tuple[int, int],
    backend: str | None,
    stack: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """The forward of a GPSA, ours or another library's, on ``x`` (B, N, dim).

    ``stack`` are weights and biases of ``qk`` and ``v`` stacked beforehand.
    """
    B, N, dim = x.shape
    heads = (layer.num_heads, dim // layer.num_heads)
    parameters = (_pos_weight(layer.pos_proj), layer.gating_param, grid)
    options: dict[str, Any] = {
        "scale": layer.scale,
        "dropout_p": dropout_rate(layer.attn_drop),
        "backend": backend,
    }
    if stack is None:
        qkv = stacked_projection((layer.qk, layer.v), x)
    else:
        qkv = F.linear(x, *stack)
    if qkv is not None:
        out = gpsa_attention_qkvpacked(qkv.view(B, N, 3, *heads), *parameters, **options)
    else:
        qk = project(layer.qk, x).reshape(B, N, 2, *heads)
        v = project(layer.v, x).reshape(B, N, *heads).transpose(1, 2)
        out = gpsa_attention_qkpacked(qk, v, *parameters, **options)
    return layer.proj_drop(project(layer.proj, out.transpose(1, 2).flatten(2)))


def _pos_weight(pos_proj: nn.Linear) -> Tensor:
    """(H, 3). The bias cancels in the softmax, so its gradient is zero: zero, not None, which
    DistributedDataParallel would take for an unused parameter.
    """
    weight, bias = pos_proj.weight, pos_proj.bias
    if bias is None or not (torch.is_grad_enabled() and bias.requires_grad):
        return weight
    return weight + 0.0 * bias[:, None]

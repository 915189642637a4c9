# SPDX-License-Identifier: Apache-2.0
"""Flops, parameters and activations, counted on a built model by the papers' rule.

The rule is that of arXiv 2106.14881 (appendix D) as its authors' code applies it, for one image:

* flops are multiply-adds of convolutions, linear layers and the two matrix products of each
  attention, one more per output where there is a bias;
* activations are the elements of those layers' outputs, plus those of max pooling;
* normalisation, activation functions, softmax, additions and average pooling count nothing;
* parameters are all parameters; buffers are none.

The model runs once on the meta device, where no arithmetic happens. Torch functions are counted
as the model calls them, whatever module calls them. A matrix product in a form that has no rule
raises, so that nothing goes uncounted in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastvit.benchmark.library import meta_copy
from fastvit.benchmark.rows import Complexity

Counts = tuple[int, int]  # flops, activations


def count(model: nn.Module, image_size: int) -> Complexity:
    """Count ``model`` on one image of ``image_size`` x ``image_size`` pixels with 3 channels.

    The model itself is neither run nor changed. fastvit's models are counted with their
    ``reference`` backend, in which every product of the papers' arithmetic is a torch call.

    Raises:
        NotImplementedError: the model computes a product by a function that has no rule here.
    """
    from fastvit import backend

    # In evaluation mode, since BatchNorm trains on no single value per channel.
    shadow = meta_copy(model).eval()
    dtype = next(model.parameters()).dtype
    image = torch.empty(1, 3, image_size, image_size, device="meta", dtype=dtype)
    with backend("reference"), _Counter() as counter:
        shadow(image)
    params = sum(p.numel() for p in model.parameters())
    return Complexity(flops=counter.flops, params=params, acts=counter.acts)


def _conv(args: dict[str, Any], out: Tensor) -> Counts:
    per_output = prod(args["weight"].shape[1:]) + (args["bias"] is not None)
    return out.numel() * per_output, out.numel()


def _linear(args: dict[str, Any], out: Tensor) -> Counts:
    per_output = args["weight"].shape[-1] + (args["bias"] is not None)
    return out.numel() * per_output, out.numel()


def _matmul(args: dict[str, Any], out: Tensor) -> Counts:
    return out.numel() * args["input"].shape[-1], out.numel()


def _attention(args: dict[str, Any], out: Tensor) -> Counts:
    """The two products of ``scaled_dot_product_attention``; (B, H, N, d) operands."""
    query, key = args["query"], args["key"]
    scores = prod(query.shape[:-1]) * key.shape[-2]
    return scores * query.shape[-1] + out.numel() * key.shape[-2], scores + out.numel()


def _multi_head_attention(args: dict[str, Any], out: tuple[Tensor, Tensor | None]) -> Counts:
    """``torch.nn.MultiheadAttention``: (N, B, D) self-attention with its projections."""
    tokens, batch, width = args["query"].shape
    projected = 3 * tokens * batch * width
    scores = batch * args["num_heads"] * tokens * tokens
    mixed = tokens * batch * width
    flops = (
        projected * (width + (args["in_proj_bias"] is not None))
        + scores * (width // args["num_heads"])
        + mixed * tokens
        + mixed * (width + (args["out_proj_bias"] is not None))
    )
    return flops, projected + scores + mixed + mixed


def _max_pool(args: dict[str, Any], out: Tensor) -> Counts:
    return 0, out.numel()


# Function -> (names of its leading arguments, rule).
_RULES: dict[
    Callable[..., Any], tuple[tuple[str, ...], Callable[[dict[str, Any], Any], Counts]]
] = {
    torch.conv2d: (("input", "weight", "bias"), _conv),
    F.linear: (("input", "weight", "bias"), _linear),
    F.scaled_dot_product_attention: (("query", "key", "value"), _attention),
    F.multi_head_attention_forward: (
        (
            *("query", "key", "value", "embed_dim_to_check", "num_heads"),
            *("in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "add_zero_attn", "dropout_p"),
            *("out_proj_weight", "out_proj_bias"),
        ),
        _multi_head_attention,
    ),
    F.max_pool2d: (("input",), _max_pool),
    torch.max_pool2d: (("input",), _max_pool),
    **dict.fromkeys(
        (
            *(torch.matmul, torch.bmm, torch.mm),
            *(Tensor.matmul, Tensor.bmm, Tensor.mm, Tensor.__matmul__),
        ),
        (("input", "other"), _matmul),
    ),
}

_UNCOUNTED_PRODUCTS = frozenset(
    {"addbmm", "addmm", "addmv", "baddbmm", "bilinear", "chain_matmul", "conv1d", "conv3d"}
    | {"conv_transpose2d", "dot", "einsum", "inner", "kron", "mv", "tensordot"}
    | {"_native_multi_head_attention", "__rmatmul__"}
)


class _Counter(TorchFunctionMode):
    """Adds up the rules over the torch functions called while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.acts = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _RULES:
            _refuse_products(func)
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        names, rule = _RULES[func]
        given = {"bias": None, **dict(zip(names, args, strict=False)), **kwargs}
        flops, acts = rule(given, out)
        self.flops += flops
        self.acts += acts
        return out


def _refuse_products(func: Callable[..., Any]) -> None:
    name = getattr(func, "__name__", "")
    # A custom operator hides its arithmetic; `fastvit.` operators appear in no reference model.
    custom = type(func).__name__ in ("OpOverload", "OpOverloadPacket")
    if name in _UNCOUNTED_PRODUCTS or custom:
        raise NotImplementedError(f"the counter has no rule for {func}")

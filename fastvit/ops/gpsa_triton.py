# SPDX-License-Identifier: Apache-2.0
"""GPSA and plain attention by the Triton kernels: which of them run, and on which memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvit.kernels import configs
from fastvit.kernels.backward_key import backward_key
from fastvit.kernels.backward_query import backward_query
from fastvit.kernels.backward_tile import backward_tile
from fastvit.kernels.configs import Config
from fastvit.kernels.forward_stream import forward_stream
from fastvit.kernels.forward_tile import forward_tile
from fastvit.kernels.kronecker import kronecker, position_factors
from fastvit.kernels.position_gradient import factor_gradient, parameter_gradient
from fastvit.kernels.position_table import position_table
from fastvit.ops import tuned
from fastvit.ops.tokens import gradients_like, like_heads, like_packed, unpack_heads

Grid = tuple[int, int]


class Plan(NamedTuple):
    """The kernels of a call, by name in the order in which they run, and what they need to know."""

    arch: str
    #: "tf32" or "ieee", for float32.
    precision: str
    kernels: dict[str, Config]


def architecture(device: torch.device) -> str:
    """Whose launch configurations a device takes; in the interpreter, Hopper's."""
    if device.type != "cuda":
        return "sm_90"
    found = configs.architecture(torch.cuda.get_device_capability(device))
    assert found is not None, "the backend refuses older devices"
    return found


def precision() -> str:
    """How float32 is multiplied, as PyTorch's switch says: "tf32" or "ieee"."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def plan(
    direction: str,
    q: Tensor,
    grid_size: Grid | None,
    dropout: bool = False,
    built_in: bool = False,
) -> Plan:
    """What runs in the "forward" or "backward" of q (B, H, N, d); plain attention without grid.
    ``built_in``: whatever was tuned.
    """
    arch = architecture(q.device)
    arithmetic = precision() if q.dtype == torch.float32 else "half"
    B, H, N, d = q.shape
    problem = configs.Problem(arch, arithmetic, B, H, N, d, grid_size, dropout)
    if built_in:
        choose = configs.forward if direction == "forward" else configs.backward
        return Plan(arch, precision(), choose(problem))
    return Plan(arch, precision(), tuned.attention(direction, problem))


def readable(x: Tensor) -> Tensor:
    """x with consecutive channels, which the kernels count on; any other strides are theirs."""
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gating_param: Tensor,
    grid_size: Grid,
    scale: float,
    plan: Plan,
) -> Tensor:
    """The op's forward; (B, H, N, d) laid out as (B, N, H, d)."""
    out = like_heads(q)
    if out.numel() == 0:
        return out
    q, k, v = map(readable, (q, k, v))
    gating_param = gating_param.contiguous()
    _, precision, kernels = plan
    with torch.cuda.device_of(q):
        if "forward_tile" in kernels:
            table = position_table(pos_weight, q.dtype, grid_size)
            config = kernels["forward_tile"]
            forward_tile(q, k, v, table, gating_param, out, scale, precision, config)
            return out
        py, px = position_factors(pos_weight, torch.float32, grid_size)
        kronecker(v, py, px, gating_param, out, grid_size, precision, kernels["kronecker"])
        config = kernels["forward_stream"]
        forward_stream(q, k, v, gating_param, out, scale, precision, config)
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gating_param: Tensor,
    grid_size: Grid,
    scale: float,
    packed: bool,
    plan: Plan,
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v, ``packed`` as :func:`gradients_like` says, of ``pos_weight`` and
    of ``gating_param``.
    """
    gradients, (dq, dk, dv) = gradients_like(q, v, packed)
    if q.numel() == 0:
        zeros = (x.new_zeros(x.shape) for x in (pos_weight, gating_param))
        return *gradients, *zeros
    gating_param = gating_param.contiguous()
    dpos_weight, dgating = pos_weight.new_empty(pos_weight.shape), torch.empty_like(gating_param)
    grad, q, k, v = map(readable, (grad, q, k, v))
    _, precision, kernels = plan
    with torch.cuda.device_of(q):
        py, px = position_factors(pos_weight, torch.float32, grid_size)
        if "backward_tile" in kernels:
            table = position_table(pos_weight, q.dtype, grid_size, transposed=True)
            content = py.new_empty(q.shape[1], q.shape[0])
            backward_tile(
                grad, q, k, v, table, gating_param, dq, dk, dv, content,
                scale, precision, kernels["backward_tile"],
            )  # fmt: skip
        else:
            kronecker(
                grad, py, px, gating_param, dv, grid_size, precision, kernels["kronecker"],
                transposed=True,
            )  # fmt: skip
            content = _stream_backward(grad, q, k, v, gating_param, dq, dk, dv, scale, plan)
        dpy, dpx = factor_gradient(
            grad, v, py, px, grid_size, precision, kernels["factor_gradient"]
        )
        parameter_gradient(
            py, px, dpy, dpx, content, gating_param, dpos_weight, dgating,
            kernels["parameter_gradient"],
        )  # fmt: skip
    return *gradients, dpos_weight, dgating


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Plan) -> Tensor:
    """Plain attention; (B, H, N, d) laid out as (B, N, H, d)."""
    out = like_heads(q)
    if out.numel() == 0:
        return out
    q, k, v = map(readable, (q, k, v))
    _, precision, kernels = plan
    with torch.cuda.device_of(q):
        if "forward_tile" in kernels:
            config = kernels["forward_tile"]
            forward_tile(q, k, v, None, None, out, scale, precision, config)
        else:
            config = kernels["forward_stream"]
            forward_stream(q, k, v, None, out, scale, precision, config)
    return out


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Plan
) -> Tensor:
    """The gradients of q, k and v as (B, N, 3, H, d)."""
    dqkv = like_packed(q, 3)
    if dqkv.numel() == 0:
        return dqkv
    dq, dk, dv = unpack_heads(dqkv)
    grad, q, k, v = map(readable, (grad, q, k, v))
    _, precision, kernels = plan
    with torch.cuda.device_of(q):
        if "backward_tile" in kernels:
            config = kernels["backward_tile"]
            backward_tile(grad, q, k, v, None, None, dq, dk, dv, None, scale, precision, config)
        else:
            _stream_backward(grad, q, k, v, None, dq, dk, dv, scale, plan)
    return dqkv


def _stream_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gating_param: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    scale: float,
    plan: Plan,
) -> Tensor | None:
    """Gradients by two kernels. Returns Σ dO · Oc of GPSA's content term, in parts (H, parts)."""
    B, H, N, _ = q.shape
    _, precision, kernels = plan
    config = kernels["backward_query"]
    statistics = q.new_empty(2, B, H, N, dtype=torch.float32)
    content = None
    if gating_param is not None:
        content = statistics.new_empty(H, B * -(-N // config.rows))
    backward_query(grad, q, k, v, gating_param, dq, statistics, content, scale, precision, config)
    config = kernels["backward_key"]
    backward_key(grad, q, k, v, gating_param, statistics, dk, dv, scale, precision, config)
    return content

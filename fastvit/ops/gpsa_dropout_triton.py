# SPDX-License-Identifier: Apache-2.0
"""GPSA with attention dropout by the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit.kernels.dropout_forward import dropout_forward
from fastvit.kernels.dropout_key import dropout_key
from fastvit.kernels.dropout_query import dropout_query
from fastvit.kernels.kronecker import position_factors
from fastvit.ops.gpsa_triton import Grid, Plan, readable
from fastvit.ops.tokens import gradients_like, like_heads


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gating_param: Tensor,
    seed: Tensor,
    grid_size: Grid,
    scale: float,
    dropout_p: float,
    plan: Plan,
) -> Tensor:
    """The op's forward; (B, H, N, d) laid out as (B, N, H, d)."""
    out = like_heads(q)
    if out.numel() == 0:
        return out
    q, k, v = map(readable, (q, k, v))
    gating_param = gating_param.contiguous()
    with torch.cuda.device_of(q):
        py, px = position_factors(pos_weight, torch.float32, grid_size)
        dropout_forward(
            q, k, v, py, px, gating_param, seed, out, grid_size, scale, dropout_p,
            plan.precision, plan.kernels["dropout_forward"],
        )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gating_param: Tensor,
    seed: Tensor,
    grid_size: Grid,
    scale: float,
    dropout_p: float,
    plan: Plan,
) -> tuple[Tensor, ...]:
    """The gradients of q and k as (B, N, 2, H, d), of v, of ``pos_weight`` and ``gating_param``."""
    gradients, (dq, dk, dv) = gradients_like(q, v, packed=False)
    if q.numel() == 0:
        zeros = (x.new_zeros(x.shape) for x in (pos_weight, gating_param))
        return *gradients, *zeros
    grad, q, k, v = map(readable, (grad, q, k, v))
    gating_param = gating_param.contiguous()
    B, H, N, _ = q.shape
    config = plan.kernels["dropout_query"]
    statistics = q.new_empty(2, B, H, N, dtype=torch.float32)
    parts = statistics.new_empty(H, B, -(-N // config.rows), 4)
    with torch.cuda.device_of(q):
        py, px = position_factors(pos_weight, torch.float32, grid_size)
        dropout_query(
            grad, q, k, v, py, px, gating_param, seed, dq, statistics, parts, grid_size, scale,
            dropout_p, plan.precision, config,
        )  # fmt: skip
        dropout_key(
            grad, q, k, v, py, px, gating_param, seed, statistics, dk, dv, grid_size, scale,
            dropout_p, plan.precision, plan.kernels["dropout_key"],
        )  # fmt: skip
    total = parts.sum((1, 2))
    gate = torch.sigmoid(gating_param.float())
    dpos_weight = gate[:, None] * total[:, :3]
    dgating = gate * torch.sigmoid(-gating_param.float()) * total[:, 3]
    return *gradients, dpos_weight.to(pos_weight.dtype), dgating.to(gating_param.dtype)

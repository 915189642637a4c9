# SPDX-License-Identifier: Apache-2.0
"""The contenders: other libraries' attention and GPSA layers, and ours, over the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit
from fastvit.functional import attention, gpsa_attention
from fastvit.testing import Agreement, agreement
from gpu import floors
from gpu.device import Call, Device
from gpu.record import Record
from gpu.shapes import Shape
from gpu.timing import calls, draws

DTYPE = torch.bfloat16
MODES = {"forward": False, "forward+backward": True}
SDPA = ("flash", "efficient", "cudnn", "math")

Make = Callable[[], Sequence[Call]]


class Problem:
    """The inputs of one shape, as many sets as the cache takes to forget."""

    def __init__(self, device: Device, shape: Shape) -> None:
        self.device, self.shape = device, shape
        B, N, H, d = shape.problem
        count = device.copies(4 * B * N * H * d * DTYPE.itemsize)
        # As the projections of a layer give them: (B, N, H, d) in memory.
        size = (B, N, H, d)
        self.heads = [
            [draws(device, *size, dtype=DTYPE, seed=3 * i + j).transpose(1, 2) for j in range(3)]
            for i in range(count)
        ]
        self.tokens = [[draws(device, B, N, H * d, dtype=DTYPE, seed=i)] for i in range(count)]
        self.position = [
            draws(device, H, 3, dtype=DTYPE).mul_(0.1),
            draws(device, H, dtype=DTYPE, seed=1),
        ]

    def sdpa(self, backend: str, backward: bool) -> Make:
        return lambda: self._heads(sdpa(backend), backward)

    def flex(self, backward: bool) -> Make:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = self.device.compile(flex_attention, dynamic=False)
        return lambda: self._heads(compiled, backward)

    def ours(self, backward: bool) -> Make:
        """The core with its position term; plain attention where there is no grid."""
        if self.shape.grid is None:
            return lambda: self._heads(lambda *qkv: attention(*qkv, backend="triton"), backward)
        parameters = [p.detach().requires_grad_(backward) for p in self.position]

        def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return gpsa_attention(q, k, v, *parameters, self.shape.grid, backend="triton")

        return lambda: self._heads(core, backward, parameters)

    def layer(self, module: nn.Module, backward: bool) -> Make:
        return lambda: calls(
            module, self.tokens, backward=backward, parameters=list(module.parameters())
        )

    def _heads(
        self, function: Callable[..., Tensor], backward: bool, parameters: Sequence[Tensor] = ()
    ) -> list[Call]:
        return calls(function, self.heads, backward=backward, parameters=parameters)


def sdpa(backend: str) -> Callable[..., Tensor]:
    """PyTorch's attention by one backend; it raises where that one takes no such call."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }[backend]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def timm_layer(device: Device, shape: Shape) -> nn.Module:
    """timm's GPSA with gates that differ, as trained ones do."""
    from timm.models.convit import GPSA

    torch.manual_seed(0)
    layer = GPSA(shape.H * shape.d, num_heads=shape.H).to(device.device, DTYPE)
    with torch.no_grad():
        layer.gating_param.uniform_(-2.0, 2.0)
    return with_positions(layer, shape.N)


def with_positions(module: nn.Module, tokens: int) -> nn.Module:
    """timm's layers with the positions that they else make in their first forward: made in
    inference they could not take part in training, and older versions make them in float32.
    """
    for layer in module.modules():
        if hasattr(layer, "get_rel_indices"):
            weight = layer.qk.weight
            layer.rel_indices = layer.get_rel_indices(tokens).to(weight.device, weight.dtype)
    return module


def our_layer(theirs: nn.Module) -> nn.Module:
    return fastvit.GPSA.from_module(theirs, backend="triton")


def check_core(problem: Problem, function: Callable[..., Tensor], name: str) -> Agreement:
    """A core against float64 on two images, by root mean squares."""
    q, k, v = (x[:2] for x in problem.heads[0])
    grid = problem.shape.grid

    def plain(*inputs: Tensor) -> Tensor:
        if name == "fastvit" and grid is not None:
            return fastvit.reference.gpsa_attention(*inputs, grid)
        return fastvit.reference.attention(*inputs)

    parameters = problem.position if name == "fastvit" and grid is not None else []
    with torch.no_grad():
        theirs = plain(q, k, v, *parameters)
        expected = plain(*(x.double() for x in (q, k, v, *parameters)))
        return agreement(function(q, k, v), theirs, expected, name=name, rms=True)


def check_layer(problem: Problem, theirs: nn.Module, ours: nn.Module) -> Agreement:
    x = problem.tokens[0][0][:2]
    with torch.no_grad():
        exact = with_positions(copy.deepcopy(theirs).double(), x.shape[1])
        expected = exact(x.double())
        return agreement(ours(x), theirs(x), expected, name="layer", rms=True)


def judge(
    record: Record, ceilings: dict[str, Any] | None, shape: Shape, what: str, mode: str,
    found: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Add to each contender's times its share of the floor; more than all is a failure."""
    work = getattr(floors, what)(*shape.problem, DTYPE.itemsize, backward=MODES[mode])
    for name, times in found.items():
        label = f"{shape.name} {what} {mode}, {name}"
        add_share(record, ceilings, work, "bfloat16", label, times)
    return found


def add_share(
    record: Record, ceilings: dict[str, Any] | None, work: floors.Work, dtype: str, label: str,
    times: dict[str, Any],
) -> None:  # fmt: skip
    """The same for one contender, which ``label`` names in a failure."""
    if ceilings is None:
        record.data["floors"] = "not known: the stage ceilings left none"
    elif "median" in times:
        times["floor"] = floors.seconds(work, ceilings, dtype)
        times["share"], problem = floors.share(times["floor"], times["median"])
        if problem:
            record.fail(f"{label}: {problem}")


def fastest_sdpa(found: dict[str, dict[str, Any]]) -> str | None:
    """The backend with the least median among timed contenders."""
    timed = {n: found[n]["median"] for n in SDPA if "median" in found.get(n, {})}
    return min(timed, key=timed.__getitem__) if timed else None

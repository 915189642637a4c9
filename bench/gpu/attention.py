# SPDX-License-Identifier: Apache-2.0
"""One attention problem: its inputs, its contenders, and what they are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastvit
from fastvit.functional import attention, gpsa_attention
from fastvit.testing import Agreement, agreement, poisoned_allocations
from gpu import attention_peers as peers
from gpu.contests import MODES, ROUNDED
from gpu.device import Call, Device
from gpu.patch_compare import TF32, number
from gpu.shapes import Shape
from gpu.timing import calls, draws

#: The reference and float64, on the images that are compared.
Truth = tuple[Tensor, Tensor]


class Contender(NamedTuple):
    """An implementation of a core, or a layer."""

    function: Callable[..., Tensor]
    #: Learned tensors, whose gradients belong to a training step.
    parameters: Sequence[Tensor] = ()
    #: What it computes: "plain" attention, the "gpsa" core, or the "layer".
    computes: str = "plain"
    ours: bool = False
    compiled: bool = False


class Problem:
    """The inputs of one shape, as many sets as the cache takes to forget.

    Args:
        dtype: bfloat16, float16, float32, or tf32: float32 whose products may be made of tf32 ones.
    """

    def __init__(self, device: Device, shape: Shape, dtype: str) -> None:
        self.device, self.shape, self.dtype = device, shape, dtype
        self.number = number(dtype)
        #: How each contender of the last contest agreed with float64.
        self.checks: dict[str, dict[str, object]] = {}
        self._truths: dict[str, Truth] = {}

    @cached_property
    def heads(self) -> list[list[Tensor]]:
        """q, k, v, as the projections of a layer give them: (B, N, H, d) in memory."""
        B, N, H, d = self.shape.problem
        # Forward reads three and writes one; backward moves more.
        count = self.device.copies(4 * B * N * H * d * self.number.itemsize)
        return [
            [self._draw(B, N, H, d, seed=3 * i + j).transpose(1, 2) for j in range(3)]
            for i in range(count)
        ]

    @cached_property
    def tokens(self) -> list[list[Tensor]]:
        B, N, H, d = self.shape.problem
        count = self.device.copies(2 * B * N * H * d * self.number.itemsize)
        return [[self._draw(B, N, H * d, seed=i)] for i in range(count)]

    @cached_property
    def position(self) -> list[Tensor]:
        """pos_weight and gating_param."""
        H = self.shape.H
        drawn = [self._draw(H, 3).mul_(0.1), self._draw(H, seed=1)]
        return [parameter.requires_grad_() for parameter in drawn]

    @cached_property
    def timm(self) -> nn.Module:
        return peers.timm_layer(self.device, self.shape, self.number)

    def _draw(self, *shape: int, seed: int = 0) -> Tensor:
        return draws(self.device, *shape, dtype=self.number, seed=seed)

    def ours(self) -> Contender:
        """The core with its position term; plain attention where there is no grid."""
        grid = self.shape.grid
        if grid is None:
            return Contender(lambda *qkv: attention(*qkv, backend="triton"), ours=True)
        return Contender(
            lambda *qkv: gpsa_attention(*qkv, *self.position, grid, backend="triton"),
            self.position, "gpsa", ours=True,
        )  # fmt: skip

    def sdpa(self, backend: str) -> Contender:
        return Contender(peers.sdpa(backend))

    def flex(self) -> Contender:
        return Contender(peers.flex(self.device), compiled=True)

    def flex_with_positions(self) -> Contender:
        function = peers.flex_with_positions(self.device, self.shape, *self.position)
        return Contender(function, self.position, "gpsa", compiled=True)

    def layer(self, module: nn.Module, *, ours: bool = False, compiled: bool = False) -> Contender:
        return Contender(module, list(module.parameters()), "layer", ours, compiled)

    def makers(
        self, contenders: Mapping[str, Contender], mode: str
    ) -> dict[str, Callable[[], Sequence[Call]]]:
        """What makes each one's calls, after it has agreed with float64: one that computes
        something else raises then, and is not timed.
        """
        self.checks = {}

        def make(name: str, contender: Contender) -> Sequence[Call]:
            check = self.check(contender, MODES[mode])
            self.checks[name] = {**check._asdict(), "ok": check.ok}
            if not check.ok:
                raise RuntimeError(f"not timed: {check}")
            return self.calls(contender, mode)

        return {name: partial(make, name, each) for name, each in contenders.items()}

    def calls(self, contender: Contender, mode: str, count: int | None = None) -> list[Call]:
        sets = self.tokens if contender.computes == "layer" else self.heads
        return calls(
            contender.function, sets[:count], backward=MODES[mode], parameters=contender.parameters
        )

    def check(self, contender: Contender, backward: bool) -> Agreement:
        """The call that is timed, on its first and its last image, by root mean squares."""
        sets = self.tokens if contender.computes == "layer" else self.heads
        inputs = [x.detach().requires_grad_(backward) for x in sets[0]]
        # Memory that PyTorch hands out again holds another contender's right results.
        scrap = [torch.full_like(inputs[0], float("nan")) for _ in range(8)]
        del scrap
        # A compiler would take the poison for a part of the function.
        poison = nullcontext() if contender.compiled else poisoned_allocations()
        with torch.set_grad_enabled(backward), poison:
            out = contender.function(*inputs).detach()
        theirs, expected = self._truth(contender.computes)
        floor = TF32 if self.dtype == "tf32" else 0.0
        if not contender.ours:
            floor = max(floor, ROUNDED[self.dtype])
        name = "fastvit" if contender.ours else contender.computes
        return agreement(_ends(out), theirs, expected, name=name, rms=True, floor=floor)

    def _truth(self, computes: str) -> Truth:
        if computes not in self._truths:
            with torch.no_grad():
                self._truths[computes] = self._compute(computes)
        return self._truths[computes]

    def _compute(self, computes: str) -> Truth:
        if computes == "layer":
            (x,) = map(_ends, self.tokens[0])
            exact = peers.with_positions(copy.deepcopy(self.timm).double(), self.shape.N)
            return self.timm(x), exact(x.double())
        inputs = [_ends(x) for x in self.heads[0]]
        if computes == "plain":
            plain = fastvit.reference.attention
            return plain(*inputs), plain(*(x.double() for x in inputs))
        assert self.shape.grid is not None
        inputs += [parameter.detach() for parameter in self.position]
        gpsa = fastvit.reference.gpsa_attention
        exact_inputs = [x.double() for x in inputs]
        return gpsa(*inputs, self.shape.grid), gpsa(*exact_inputs, self.shape.grid)


def _ends(x: Tensor) -> Tensor:
    """The first and the last image: sizes decide which kernel takes a call, so all are computed,
    but float64 takes long.
    """
    return x[[0, -1]]

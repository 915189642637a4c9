# SPDX-License-Identifier: Apache-2.0
"""Contenders of one patch embedding, from their agreement to a case of the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvit import reference
from fastvit.testing import Agreement, agreement
from gpu import floors
from gpu.contests import MODES, ROUNDED, WARM, add_share
from gpu.device import Call, Device, tf32
from gpu.patch_compare import STATISTICS, TF32, cases, has_wgmma, images, number, paths
from gpu.patch_peers import Chain, Conv, Linear, Portable, Timm, Tokens
from gpu.record import Record
from gpu.shapes import Embedding
from gpu.timing import calls, compete, first_line, host_seconds


class Contest:
    """The contenders of one problem, over as many sets of images as the cache takes to forget."""

    def __init__(
        self, device: Device, record: Record, problem: Embedding, dtype: str, pixels: str
    ) -> None:
        self.device, self.record, self.problem = device, record, problem
        self.dtype, self.pixels = dtype, pixels
        self.number = number(dtype)
        self.pixel = torch.uint8 if pixels == "uint8" else self.number
        B, N, K, D = problem.problem
        count = device.copies(B * N * (K * self.pixel.itemsize + D * self.number.itemsize))
        self.sets = [[images(device, problem, self.pixel, seed=i)] for i in range(count)]

    def eager(self) -> dict[str, nn.Module]:
        chosen = (self.device, self.problem, self.number)
        modules: dict[str, nn.Module] = {"fastvit": Tokens(*chosen)}
        if has_wgmma(self.device):
            modules["fastvit portable"] = Portable(self.device, self.problem, self.dtype)
        modules |= {
            "timm": Timm(*chosen),
            "timm channels_last": Timm(*chosen, channels_last=True),
            "linear": Linear(*chosen),
        }
        if self.pixels == "float":
            modules |= {
                "conv alone": Conv(*chosen),
                "conv alone channels_last": Conv(*chosen).to(memory_format=torch.channels_last),
            }
        return modules

    def compiled(self) -> dict[str, nn.Module]:
        chosen = (self.device, self.problem, self.number)
        peers: dict[str, Chain] = {"linear": Linear(*chosen)}
        if self.pixels == "uint8":
            peers["timm"] = Timm(*chosen)
            peers["timm channels_last"] = Timm(*chosen, channels_last=True)
        modules = {
            f"{name} compiled": self.device.compile(peer, dynamic=False)
            for name, peer in peers.items()
        }
        return {"fastvit": Tokens(*chosen), **modules}

    def run(self, rates: dict | None, what: str, modules: dict[str, nn.Module]) -> None:
        with tf32(self.dtype == "tf32"):
            self.refused = {name: self._refusal(name, module) for name, module in modules.items()}
            # The fastest of cuDNN's algorithms; not for the checks, whose sizes are others.
            torch.backends.cudnn.benchmark = True
            for mode in MODES:
                self._mode(rates, what, mode, modules)
            torch.backends.cudnn.benchmark = False

    def _mode(
        self, rates: dict | None, what: str, mode: str, modules: dict[str, nn.Module]
    ) -> None:
        label = f"{self.problem.name} {self.dtype} {self.pixels} {mode}"
        makers = {
            name: self._maker(name, module, MODES[mode])
            for name, module in modules.items()
            # Backward is the same kernel.
            if mode == "forward" or name != "fastvit portable"
        }
        found = compete(self.device, makers, warm=self.problem.B <= WARM)
        B, N, K, D = self.problem.problem
        for name, times in found.items():
            work = floors.patch_embed(
                B, N, K, D, self.number.itemsize, self.pixel.itemsize,
                backward=MODES[mode], assembled="alone" not in name,
            )  # fmt: skip
            add_share(self.record, rates, work, self.dtype, f"{label}, {name}", times)
        more: dict[str, Any] = {}
        if "error" not in found["fastvit"] and what == "eager":
            ours = self._calls(modules["fastvit"], self.sets[:1], MODES[mode])[0]
            more["host"] = host_seconds(self.device, ours)
            if MODES[mode]:
                more["memory"] = self._memory(modules)
        self.record.add(
            what=what, shape=self.problem._asdict(), dtype=self.dtype, pixels=self.pixels,
            mode=mode, contenders=found, **more,
        )  # fmt: skip
        for name, times in found.items():
            if name.startswith("fastvit") and "error" in times:
                self.record.fail(f"{label}, {name}: {times['error']}")

    def _maker(self, name: str, module: nn.Module, backward: bool) -> Callable[[], Sequence[Call]]:
        sets = self.sets

        def make() -> Sequence[Call]:
            if self.refused[name]:
                raise RuntimeError(f"not timed: {self.refused[name]}")
            chosen = [[self._laid_out(name, x)] for (x,) in sets]
            return self._calls(module, chosen, backward)

        return make

    def _laid_out(self, name: str, x: Tensor) -> Tensor:
        wanted = "channels_last" in name
        return x.contiguous(memory_format=torch.channels_last) if wanted else x

    def _memory(self, modules: dict[str, nn.Module]) -> dict[str, dict[str, Any]]:
        """What a training step keeps and needs at its peak."""
        found: dict[str, dict[str, Any]] = {}
        for name, module in modules.items():
            if "portable" in name or "alone" in name or self.refused[name]:
                continue
            x = self._laid_out(name, self.sets[0][0])
            try:
                found[name] = self.device.memory(
                    lambda module=module, x=x: module(x),
                    list(module.parameters()),
                    torch.ones_like(module(x)),
                )
            except torch.OutOfMemoryError as error:
                found[name] = {"error": str(error).splitlines()[0]}
        return found

    def _calls(
        self, module: nn.Module, sets: Sequence[Sequence[Tensor]], backward: bool
    ) -> list[Call]:
        parameters = list(module.parameters())
        return calls(module, sets, backward=backward, parameters=parameters, frozen=True)

    def _refusal(self, name: str, module: nn.Module) -> str | None:
        """Why a contender is not timed, if it computes something else or crashes."""
        if name.startswith("fastvit"):
            reason = self._disagreement("auto" if name == "fastvit" else "mma")
            if reason:
                return reason
        try:
            check = self._check(name, module)
        # A finding about this contender; the others are still timed.
        except Exception as error:
            return first_line(error)
        return None if check.ok else str(check)

    def _disagreement(self, path: str) -> str | None:
        """What the processes found that compared a path with float64."""
        for name in (name for name in paths(self.device) if name.startswith(path)):
            seen = [c for c in self.record.data["cases"] if c.get("path") == name]
            reached = not any(missed.startswith(name) for missed in self.record.data["missed"])
            if reached and len(seen) < len(cases(self.device, name)):
                return f"{name} died"
            if not all(case["ok"] for case in seen if case["dtype"] == self.dtype):
                return f"{name} disagrees"
        return None

    def _check(self, name: str, module: nn.Module) -> Agreement:
        """The call that is timed against float64, on its first and its last image, by root mean
        squares.
        """
        x = self.sets[0][0]
        few = x[[0, -1]]
        statistics: dict[str, Any] = STATISTICS if self.pixels == "uint8" else {}
        whole = getattr(module, "_orig_mod", module)
        drawn = {n: p for n, p in whole.named_parameters() if "." not in n}
        if "alone" in name:
            drawn = {n: drawn[n] for n in ("weight", "bias")}
        with torch.no_grad():
            theirs = reference.patch_embed(few, **drawn, **statistics)
            wide = few if few.dtype == torch.uint8 else few.double()
            exact = {n: p.double() for n, p in drawn.items()}
            expected = reference.patch_embed(wide, **exact, **statistics)
            out = module(self._laid_out(name, x))[[0, -1]]
            if "alone" in name:
                out = out.flatten(2).transpose(1, 2)
        floor = TF32 if self.dtype == "tf32" else 0.0
        if not name.startswith("fastvit"):
            floor = max(floor, ROUNDED[self.dtype])
        return agreement(out, theirs, expected, name=name, rms=True, floor=floor)

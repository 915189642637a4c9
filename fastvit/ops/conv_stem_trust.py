# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of the stem must show before ``auto`` takes them.

Small images through the call's own stages and launch configurations, computed on the GPU and, by
PyTorch's operators, on the processor in float64 and in the call's dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

import fastvit.kernels
from fastvit import testing
from fastvit.kernels import stem_statistics
from fastvit.kernels.blocks import INTERPRETED
from fastvit.ops import conv_stem_torch, conv_stem_triton, trust
from fastvit.ops.conv_stem_torch import Forward, Stages
from fastvit.ops.conv_stem_triton import Plan
from fastvit.ops.trust import Candidate, source_hash
from fastvit.reference import stage_grids
from fastvit.testing import Agreement, agreement

#: Odd sides, and several tiles of every map.
_IMAGES, _SIDES = 2, (99, 85)
_MEAN, _STD = (0.485, 0.1, 0.406, 0.5), (0.229, 0.224, 1.0, 0.3)
_EPS = 1e-5

#: Plans of calls whose kernels are trusted: they need not be named and looked up again.
_settled: dict[tuple[Any, ...], Plan] = {}


def trusted_plan(
    x: Tensor, proj_weight: Tensor, stages: Stages, training: bool, save: bool, asked: str
) -> Plan | None:
    """The kernels to run for images x, or None if they are not trusted.

    Raises:
        RuntimeError: they failed their check, and were ``asked`` for by name.
    """
    plan = conv_stem_triton.plan(x, proj_weight, stages, training or save)
    if not trust.needs_proof(x.device):
        return plan
    widths = (x.shape[1], *(w.shape[0] for w in stages.weights), proj_weight.shape[0])
    strides, dtype, raw = tuple(stages.strides), proj_weight.dtype, x.dtype == torch.uint8
    mode = "train" if training else "keep" if save else "infer"
    call = (trust.generation(), x.device, dtype, raw, widths, strides, mode, plan)
    if call not in _settled:
        candidate = _candidate(plan, x.device, dtype, raw, widths, strides, mode)
        if not trust.trusts(candidate, asked):
            return None
        if trust.is_known(candidate):
            _settled[call] = plan
    return plan


def _candidate(
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    raw: bool,
    widths: tuple[int, ...],
    strides: tuple[int, ...],
    mode: str,
) -> Candidate:
    capability = "interpreter"
    if not INTERPRETED:
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    name = str(dtype).removeprefix("torch.")
    arithmetic = f"{name},{plan.precision}" if dtype == torch.float32 else name
    images = "uint8" if raw else "float"
    size = "c={},s={}".format("-".join(map(str, widths)), "-".join(map(str, strides)))
    launch = ",".join(
        f"{kernel}{tuple(config)}".replace(" ", "") for kernel, config in plan.kernels
    )
    version = ".".join(triton.__version__.split(".")[:2])
    key = (
        f"conv_stem/forward/{arithmetic}/{images}/{mode}/{size}/{launch}/{code()}/"
        f"{capability}/{version}"
    )
    check = functools.partial(_check, plan, device, dtype, raw, widths, strides, mode)
    return Candidate(key, check)


@functools.cache
def code() -> str:
    """The kernels at hand, as keys name them."""
    folder = Path(fastvit.kernels.__file__).parent
    own = [__file__, conv_stem_triton.__file__, testing.__file__]
    shared = (folder / name for name in ("blocks.py", "configs.py"))
    return source_hash(*folder.glob("stem_*.py"), *shared, *map(Path, own))


def _drawn(
    raw: bool, widths: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[Tensor, list[Tensor], Stages]:
    """Images; weight, bias, positions and class token; the stages. All float ones in float32."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    images, *channels, D = widths
    shape = (_IMAGES, images, *_SIDES)
    x = draw(*shape)
    if raw:
        x = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    stages = Stages(
        [
            draw(after, before, 3, 3) * (9 * before) ** -0.5
            for before, after in zip(widths, channels, strict=False)
        ],
        [1 + 0.3 * draw(c) for c in channels],
        [draw(c) for c in channels],
        [0.3 * draw(c) for c in channels],
        [0.5 + draw(c).square() for c in channels],
        strides,
    )
    rows, columns = stage_grids(_SIDES, strides)[-1]
    tokens = [
        draw(D, channels[-1], 1, 1) * channels[-1] ** -0.5,
        draw(D),
        draw(1, rows * columns + 1, D),
        draw(1, 1, D),
    ]
    return x, tokens, stages


def _check(
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    raw: bool,
    widths: tuple[int, ...],
    strides: tuple[int, ...],
    mode: str,
) -> Iterator[Agreement]:
    x, tokens, stages = _drawn(raw, widths, strides)
    images = widths[0]
    pixels = (_MEAN[:images], _STD[:images]) if raw else (None, None)

    def run(forward: Callable[..., Forward], device: torch.device, wide: torch.dtype) -> Forward:
        """In ``wide``, of what the call's dtype holds."""

        def moved(t: Tensor) -> Tensor:
            return t.to(dtype).to(device, wide) if t.is_floating_point() else t.to(device)

        weights, gammas, betas, means, variances = (
            [moved(t) for t in tensors] for tensors in stages[:5]
        )
        here = Stages(weights, gammas, betas, means, variances, strides)
        options = (mode == "train", _EPS, *pixels, mode != "infer")
        return forward(moved(x), *map(moved, tokens), here, *options)

    cpu = torch.device("cpu")
    found = run(functools.partial(conv_stem_triton.forward, plan), device, dtype)
    reference = run(conv_stem_torch.forward, cpu, dtype)
    expected = run(conv_stem_torch.forward, cpu, torch.float64)
    results = (found, reference, expected)
    yield from _compared("tokens", *(result.tokens for result in results), plan=plan)
    for name in ("raw", "means", "variances"):
        for i, tensors in enumerate(zip(*(getattr(r, name) for r in results), strict=True)):
            yield from _compared(f"{name}[{i}]", *tensors, plan=plan)
    if mode == "train":
        yield from _check_of_many_tiles(device)


def _compared(name: str, *tensors: Tensor, plan: Plan) -> Iterator[Agreement]:
    """The rule for root mean squares, and for maxima with the room that chance needs; of what was
    found, PyTorch's in the same dtype and float64's.
    """
    actual, reference, expected = tensors
    floor = 0.0
    if reference.dtype == torch.float32 and plan.precision == "tf32":
        # The processor has no tf32 to compare with: four of its units in the last place.
        floor = 4 * 2.0**-10
    actual, room = actual.cpu(), max(floor, 8 * torch.finfo(reference.dtype).eps)
    yield agreement(actual, reference, expected, name=f"rms {name}", floor=floor, rms=True)
    yield agreement(actual, reference, expected, name=name, floor=room)


def _check_of_many_tiles(device: torch.device) -> Iterator[Agreement]:
    """Statistics in two steps, which small images do not take."""
    generator = torch.Generator().manual_seed(0)
    parts, size, channels = 2 * stem_statistics.GROUP + 3, 64, 24
    x = torch.randn(parts * size, channels, generator=generator, dtype=torch.float64)
    x += torch.randn(channels, generator=generator, dtype=torch.float64)
    rows = x.view(parts, size, channels)
    means, squares = rows.mean(1), (rows - rows.mean(1, keepdim=True)).square().sum(1)
    partials = torch.stack((means, squares)).to(device, torch.float32)
    one, mean, variance = (partials.new_ones(channels) for _ in range(3))
    stem_statistics.stem_statistics(partials, size, parts * size, one, one, _EPS, mean, variance)
    for name, actual, expected in (
        ("mean", mean, x.mean(0)),
        ("variance", variance, x.var(0, correction=0)),
    ):
        yield agreement(actual.cpu(), expected.float(), expected, name=f"{name} of many tiles")

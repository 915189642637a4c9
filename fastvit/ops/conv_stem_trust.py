# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of the stem must show before ``auto`` takes them.

Small images through the call's own stages and launch configurations, computed on the GPU and, by
PyTorch's operators, on the processor in float64 and in the call's dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
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
from fastvit.testing import Agreement, agreement

#: Odd sides, and several tiles of every map.
_IMAGES, _SIDES = 2, (99, 85)
_MEAN, _STD = (0.485, 0.1, 0.406, 0.5), (0.229, 0.224, 1.0, 0.3)
_EPS = 1e-5

#: Plans of calls whose kernels are trusted: they need not be named and looked up again.
_settled: dict[tuple[Any, ...], Plan] = {}


def trusted_plan(
    x: Tensor, proj_weight: Tensor, stages: Stages, keeps: bool, asked: str
) -> Plan | None:
    """The kernels to run for images x, or None if they are not trusted. ``keeps`` as in
    :func:`conv_stem_triton.plan`.

    Raises:
        RuntimeError: they failed their check, and were ``asked`` for by name.
    """
    plan = conv_stem_triton.plan(x, proj_weight, stages, keeps)
    if not trust.needs_proof(x.device):
        return plan
    widths = (x.shape[1], *(w.shape[0] for w in stages.weights), proj_weight.shape[0])
    strides, dtype, raw = tuple(stages.strides), proj_weight.dtype, x.dtype == torch.uint8
    call = (trust.generation(), x.device, dtype, raw, widths, strides, keeps, plan)
    if call not in _settled:
        candidate = _candidate(plan, x.device, dtype, raw, widths, strides, keeps)
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
    keeps: bool,
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
    mode = "keeps" if keeps else "infers"
    key = (
        f"conv_stem/forward/{arithmetic}/{images}/{mode}/{size}/{launch}/{_hash()}/"
        f"{capability}/{version}"
    )
    check = functools.partial(_check, plan, device, dtype, raw, widths, strides, keeps)
    return Candidate(key, check)


@functools.cache
def _hash() -> str:
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
    lists: list[list[Tensor]] = [[], [], [], [], []]
    for before, after in zip(widths, channels, strict=False):
        drawn = (
            draw(after, before, 3, 3) * (9 * before) ** -0.5,
            1 + 0.3 * draw(after),
            draw(after),
            0.3 * draw(after),
            0.5 + draw(after).square(),
        )
        for tensors, tensor in zip(lists, drawn, strict=True):
            tensors.append(tensor)
    rows, columns = conv_stem_torch.stage_grids(_SIDES, strides)[-1]
    tokens = [
        draw(D, channels[-1], 1, 1) * channels[-1] ** -0.5,
        draw(D),
        draw(1, rows * columns + 1, D),
        draw(1, 1, D),
    ]
    return x, tokens, Stages(*lists, strides)


def _check(
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    raw: bool,
    widths: tuple[int, ...],
    strides: tuple[int, ...],
    keeps: bool,
) -> Iterator[Agreement]:
    x, tokens, stages = _drawn(raw, widths, strides)
    images = widths[0]
    pixels = (_MEAN[:images], _STD[:images]) if raw else (None, None)

    def run(forward: Any, dtype: torch.dtype, device: torch.device, *plan: Plan) -> Forward:
        def moved(t: Tensor) -> Tensor:
            rounded = t.to(given) if t.is_floating_point() else t
            return rounded.to(device, dtype if t.is_floating_point() else t.dtype)

        lists = [[moved(t) for t in tensors] for tensors in stages[:5]]
        here = Stages(*lists, strides)
        arguments = (moved(x), *map(moved, tokens), here, keeps, _EPS, *pixels, keeps)
        return forward(*arguments, *plan)

    given, cpu = dtype, torch.device("cpu")
    found = run(conv_stem_triton.forward, dtype, device, plan)
    reference = run(conv_stem_torch.forward, dtype, cpu)
    expected = run(conv_stem_torch.forward, torch.float64, cpu)
    yield from _compared("tokens", found.tokens, reference.tokens, expected.tokens, plan)
    for name in ("raw", "means", "variances"):
        columns = (getattr(result, name) for result in (found, reference, expected))
        for i, tensors in enumerate(zip(*columns, strict=True)):
            yield from _compared(f"{name}[{i}]", *tensors, plan)
    if keeps:
        yield from _check_of_many_tiles(device)


def _compared(
    name: str, actual: Tensor, reference: Tensor, expected: Tensor, plan: Plan
) -> Iterator[Agreement]:
    """The rule for root mean squares, and for maxima with the room that chance needs."""
    floor = 0.0
    if reference.dtype == torch.float32 and plan.precision == "tf32":
        # The processor has no tf32 to compare with: four of its units in the last place.
        floor = 4 * 2.0**-10
    tensors = (actual.cpu(), reference, expected)
    yield agreement(*tensors, name=f"rms {name}", floor=floor, rms=True)
    room = 8 * torch.finfo(reference.dtype).eps
    yield agreement(*tensors, name=name, floor=max(floor, room))


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

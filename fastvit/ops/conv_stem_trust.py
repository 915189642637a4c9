# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of the stem must show before ``auto`` takes them.

Small images through the call's own stages and launch configurations, computed on the GPU and, by
PyTorch's operators, on the processor in float64 and in the call's dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

import fastvit.kernels
from fastvit import testing
from fastvit.kernels import stem_statistics
from fastvit.kernels.blocks import INTERPRETED
from fastvit.kernels.configs import Config
from fastvit.kernels.tuned import Kernels
from fastvit.ops import (
    conv_stem_torch,
    conv_stem_triton,
    conv_stem_triton_backward,
    trust,
)
from fastvit.ops.conv_stem_torch import Forward, Stages
from fastvit.ops.conv_stem_triton import Plan
from fastvit.ops.gpsa_triton import architecture
from fastvit.ops.gpsa_triton import precision as float32_precision
from fastvit.ops.trust import Candidate, source_hash
from fastvit.reference import stage_grids
from fastvit.testing import Agreement, agreement

#: Odd sides, and several tiles of every map.
_IMAGES, _SIDES = 2, (99, 85)
_MEAN, _STD = (0.485, 0.1, 0.406, 0.5), (0.229, 0.224, 1.0, 0.3)
_EPS = 1e-5

#: What kinds of calls run, once it is trusted: it need not be named and looked up again.
_settled: dict[tuple[Any, ...], Any] = {}

#: The kernels of a call with their configurations, or the architecture from which these follow.
_Launch = Kernels | str
_Chosen = TypeVar("_Chosen")


class _Problem(NamedTuple):
    """What the kernels of a call depend on beside their launch configurations."""

    device: torch.device
    dtype: torch.dtype
    #: Whether images are uint8.
    raw: bool
    #: Channels of the images and of the stages, and D.
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    #: "train", "keep" or "infer".
    mode: str


def trusted_plan(
    x: Tensor, proj_weight: Tensor, stages: Stages, training: bool, save: bool, asked: str
) -> Plan | None:
    """The kernels of the forward to run for images x, or None if they are not trusted.

    Raises:
        RuntimeError: they failed their check, and were ``asked`` for by name.
    """
    keeps = training or save
    plan = conv_stem_triton.plan(x, proj_weight, stages, keeps)
    if not trust.needs_proof(x.device):
        return plan
    problem = _problem(x, proj_weight, stages, "train" if training else "keep" if save else "infer")

    def named(plan: Plan) -> Candidate:
        key = _key("forward", problem, plan.kernels, plan.precision)
        return Candidate(key, functools.partial(_check_forward, plan, problem))

    def built_in() -> Plan:
        return conv_stem_triton.plan(x, proj_weight, stages, keeps, built_in=True)

    # What is built in depends on the number of positions, too.
    call = ("forward", problem, plan, x.shape)
    return _trusted(call, plan, built_in, named, asked)


def trusted_backward(
    x: Tensor, proj_weight: Tensor, stages: Stages, training: bool, asked: str
) -> Kernels | None:
    """The kernels of the backward for images x that take configurations of their own, or None if
    its kernels are not trusted.

    Raises:
        RuntimeError: they failed their check, and were ``asked`` for by name.
    """
    kernels = conv_stem_triton_backward.plan(x, proj_weight, stages, training)
    if not trust.needs_proof(x.device):
        return kernels
    problem = _problem(x, proj_weight, stages, "train" if training else "keep")
    # The other configurations follow from the architecture and the widths.
    arch, precision = architecture(x.device), float32_precision()

    def named(kernels: Kernels) -> Candidate:
        launch: _Launch = (*kernels, (arch, Config())) if kernels else arch
        key = _key("backward", problem, launch, precision)
        return Candidate(key, functools.partial(_check_backward, kernels, precision, problem))

    call = ("backward", problem, kernels, precision)
    return _trusted(call, kernels, tuple, named, asked)


def _problem(x: Tensor, proj_weight: Tensor, stages: Stages, mode: str) -> _Problem:
    widths = (x.shape[1], *(w.shape[0] for w in stages.weights), proj_weight.shape[0])
    raw = x.dtype == torch.uint8
    return _Problem(x.device, proj_weight.dtype, raw, widths, tuple(stages.strides), mode)


def _trusted(
    call: tuple[Any, ...],
    chosen: _Chosen,
    built_in: Callable[[], _Chosen],
    named: Callable[[_Chosen], Candidate],
    asked: str,
) -> _Chosen | None:
    """As :func:`fastvit.ops.trust.trusted`; asked once for each call's kind, since naming it takes
    time.
    """
    call = (trust.generation(), *call)
    if call in _settled:
        found: _Chosen = _settled[call]
        return found
    trusted = trust.trusted((chosen, built_in()), named, asked)
    plan, lasting = trusted
    if plan is not None and lasting:
        _settled[call] = plan
    return plan


def _key(direction: str, problem: _Problem, launch: _Launch, precision: str) -> str:
    if not isinstance(launch, str):
        launch = ",".join(f"{kernel}{tuple(config)}".replace(" ", "") for kernel, config in launch)
    capability = "interpreter"
    if not INTERPRETED:
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability(problem.device))
    name = str(problem.dtype).removeprefix("torch.")
    arithmetic = f"{name},{precision}" if problem.dtype == torch.float32 else name
    images = "uint8" if problem.raw else "float"
    widths, strides = ("-".join(map(str, x)) for x in (problem.widths, problem.strides))
    version = ".".join(triton.__version__.split(".")[:2])
    return (
        f"conv_stem/{direction}/{arithmetic}/{images}/{problem.mode}/c={widths},s={strides}/"
        f"{launch}/{code()}/{capability}/{version}"
    )


@functools.cache
def code() -> str:
    """The kernels at hand, as keys name them."""
    folder = Path(fastvit.kernels.__file__).parent
    modules = (conv_stem_triton, conv_stem_triton_backward, testing)
    own = (__file__, *(str(module.__file__) for module in modules))
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


def _pixels(problem: _Problem) -> tuple[Any, Any]:
    """Mean and std of uint8 images."""
    if not problem.raw:
        return None, None
    images = range(problem.widths[0])
    return [_MEAN[i % len(_MEAN)] for i in images], [_STD[i % len(_STD)] for i in images]


def _moved(t: Tensor, problem: _Problem, device: torch.device, wide: torch.dtype) -> Tensor:
    """In ``wide``, of what the call's dtype holds."""
    return t.to(problem.dtype).to(device, wide) if t.is_floating_point() else t.to(device)


def _check_forward(plan: Plan, problem: _Problem) -> Iterator[Agreement]:
    x, tokens, stages = _drawn(problem.raw, problem.widths, problem.strides)
    device, dtype, mode = problem.device, problem.dtype, problem.mode

    def run(forward: Callable[..., Forward], device: torch.device, wide: torch.dtype) -> Forward:
        def moved(t: Tensor) -> Tensor:
            return _moved(t, problem, device, wide)

        weights, gammas, betas, means, variances = (
            [moved(t) for t in tensors] for tensors in stages[:5]
        )
        here = Stages(weights, gammas, betas, means, variances, problem.strides)
        options = (mode == "train", _EPS, *_pixels(problem), mode != "infer")
        return forward(moved(x), *map(moved, tokens), here, *options)

    cpu = torch.device("cpu")
    found = run(functools.partial(conv_stem_triton.forward, plan), device, dtype)
    reference = run(conv_stem_torch.forward, cpu, dtype)
    expected = run(conv_stem_torch.forward, cpu, torch.float64)
    results = (found, reference, expected)
    compared = functools.partial(_compared, precision=plan.precision)
    yield from compared("tokens", *(result.tokens for result in results))
    for name in ("raw", "means", "variances"):
        for i, tensors in enumerate(zip(*(getattr(r, name) for r in results), strict=True)):
            yield from compared(f"{name}[{i}]", *tensors, ulps=_room(tensors[0], 0))
    if mode == "train":
        yield from _check_of_many_tiles(device)


def _check_backward(kernels: Kernels, precision: str, problem: _Problem) -> Iterator[Agreement]:
    """Gradients from the raw tensors that PyTorch's forward keeps in the call's dtype."""
    x, tokens, stages = _drawn(problem.raw, problem.widths, problem.strides)
    training, options = problem.mode == "train", (_EPS, *_pixels(problem))
    cpu = torch.device("cpu")

    def moved(tensors: Sequence[Tensor], device: torch.device, wide: torch.dtype) -> list[Tensor]:
        return [_moved(t, problem, device, wide) for t in tensors]

    lists = [moved(t, cpu, problem.dtype) for t in stages[:5]]
    inputs = moved([x, *tokens], cpu, problem.dtype)
    here = Stages._make([*lists, problem.strides])
    forward: Callable[..., Forward] = conv_stem_torch.forward
    kept = forward(*inputs, here, training, *options, True)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(kept.tokens.shape, generator=generator)
    learned = [*inputs, *here.weights, *here.bn_weights, *here.bn_biases]
    wanted = [t.is_floating_point() for t in learned]

    def run(backward: Any, device: torch.device, wide: torch.dtype) -> list[Tensor]:
        kinds = (*lists[:3], kept.means, kept.variances)
        there = [moved(t, device, wide) for t in kinds]
        raw = [conv_stem_torch.channels_last(t) for t in moved(kept.raw, device, wide)]
        first = moved([grad, *inputs], device, wide)
        last = (Stages._make([*there, problem.strides]), training, *options, wanted)
        return backward(*first, raw, *last)

    ours = functools.partial(conv_stem_triton_backward.backward, kernels=kernels)
    results = (
        run(ours, problem.device, problem.dtype),
        run(conv_stem_torch.backward, cpu, problem.dtype),
        run(conv_stem_torch.backward, cpu, torch.float64),
    )
    for i, found in enumerate(zip(*results, strict=True)):
        # Rounding near zero decides single elements behind a ReLU.
        ulps = _room(found[0], 4)
        yield from _compared(f"gradient[{i}]", *found, precision=precision, maxima=False, ulps=ulps)


def _room(found: Tensor, ulps: int) -> int:
    """Units in the last place to allow beside the rule: ``ulps`` for the numbers of a batch norm,
    whose mean square is chance where they are few, and more where they are a handful.
    """
    if found.ndim != 1 or found.numel() >= 8:
        return ulps if found.ndim == 1 else 0
    return 128 if found.dtype == torch.float32 else 8


def _compared(
    name: str, *tensors: Tensor, precision: str, maxima: bool = True, ulps: int = 0
) -> Iterator[Agreement]:
    """The rule for root mean squares, and for maxima with the room that chance needs; of what was
    found, PyTorch's in the same dtype and float64's.
    """
    actual, reference, expected = tensors
    floor = ulps * torch.finfo(reference.dtype).eps
    if reference.dtype == torch.float32 and precision == "tf32":
        # The processor has no tf32 to compare with: four of its units in the last place.
        floor = 4 * 2.0**-10
    actual, room = actual.cpu(), max(floor, 8 * torch.finfo(reference.dtype).eps)
    yield agreement(actual, reference, expected, name=f"rms {name}", floor=floor, rms=True)
    if maxima:
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

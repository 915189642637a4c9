# SPDX-License-Identifier: Apache-2.0
"""The backward of the convolutional stem by the Triton kernels, from what a forward kept: on a GPU
if there is one, else in Triton's interpreter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.testing import poisoned_allocations

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import stem_gradient_configs, stem_sums
from fastvit.kernels.configs import ARCHITECTURES

from fastvit.ops import conv_stem_torch, conv_stem_triton_backward
from fastvit.ops.conv_stem_torch import Stages

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MEAN, STD = (0.485, 0.1, 0.406, 0.5, 0.3), (0.229, 0.224, 1.0, 0.3, 0.2)
EPS = 1e-5
INPUTS = ("x", "proj_weight", "proj_bias", "pos_embed", "cls_token")
LAUNCHERS = (
    "stem_input_gradient", "stem_weight_gradient", "stem_image_gradient", "stem_raw_gradient",
    "stem_norm_gradient", "stem_weight_sum",
)  # fmt: skip

STEMS = [
    # image, image channels, channels, strides, D
    pytest.param((11, 18), 3, (16, 24, 40), (2, 2, 1), 24, id="strides"),
    pytest.param((9, 13), 3, (8, 16), (2, 2), 8, id="odd_image"),
    pytest.param((7, 5), 1, (24,), (1,), 16, id="grey_one_stage"),
    pytest.param((6, 10), 4, (40, 56), (1, 2), 72, id="four_channels"),
    pytest.param((17, 1), 2, (8, 16), (2, 2), 8, id="one_column"),
    pytest.param((9, 13), 6, (5, 12, 20), (2, 1, 2), 30, id="odd_channels"),
    pytest.param((5, 6), 5, (1, 67), (1, 2), 1, id="single_channels"),
    pytest.param((7, 5), 10, (33, 30), (2, 1), 7, id="many_bands"),
]
SMALL = ((9, 13), 3, (8, 16), (2, 2), 8)

Results = dict[str, Tensor]
Backward = Callable[..., list[Tensor]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was launched."""
    count: Counter[str] = Counter()

    def counted(name: str, launcher: Callable[..., object]) -> Callable[..., object]:
        def launch(*args: object, **kwargs: object) -> object:
            count[name] += 1
            return launcher(*args, **kwargs)

        return launch

    for name in LAUNCHERS:
        launcher = getattr(conv_stem_triton_backward, name)
        monkeypatch.setattr(conv_stem_triton_backward, name, counted(name, launcher))
    return count


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``on(arch)``: use the launch configurations of another architecture. In the interpreter only:
    a GPU keeps its own.
    """

    def use(arch: str) -> None:
        if GPU:
            pytest.skip("the configurations of other architectures are for the interpreter")
        monkeypatch.setattr(conv_stem_triton_backward, "architecture", lambda device: arch)

    return use


def problem(
    image: tuple[int, int],
    images: int,
    channels: tuple[int, ...],
    strides: tuple[int, ...],
    D: int,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    seed: int = 0,
    uint8: bool = False,
    far: bool = False,
) -> dict[str, Tensor]:
    """Images, parameters and the gradient of the tokens by flat names. With ``far``, activations
    lie far from zero, half of the channels above and half below.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    p = {"x": draw(batch, images, *image)}
    if uint8:
        p["x"] = torch.randint(256, p["x"].shape, generator=generator, dtype=torch.uint8)
    for i, (before, after) in enumerate(zip((images, *channels), channels, strict=False)):
        p[f"weight{i}"] = draw(after, before, 3, 3) * (9 * before) ** -0.5
        p[f"bn_weight{i}"] = 1 + 0.3 * draw(after)
        p[f"bn_bias{i}"] = draw(after)
        if far:
            p[f"bn_bias{i}"] = torch.tensor([8.0, -8.0]).repeat(after)[:after].to(dtype)
        p[f"mean{i}"] = 0.3 * draw(after)
        p[f"var{i}"] = 0.5 + draw(after).square()
    rows, columns = conv_stem_torch.stage_grids(image, strides)[-1]
    p["proj_weight"] = draw(D, channels[-1], 1, 1) * channels[-1] ** -0.5
    p["proj_bias"], p["cls_token"] = draw(D), draw(1, 1, D)
    p["pos_embed"] = draw(1, rows * columns + 1, D)
    # One that every dtype holds exactly.
    p["grad"] = draw(batch, rows * columns + 1, D).bfloat16().to(dtype)
    return p


def names(depth: int) -> list[str]:
    stages = [f"{name}{i}" for name in ("weight", "bn_weight", "bn_bias") for i in range(depth)]
    return [*INPUTS, *stages]


def run(
    backward: Backward,
    p: dict[str, Tensor],
    strides: Sequence[int],
    training: bool,
    dtype: torch.dtype | None = None,
    *,
    wanted: Sequence[str] | None = None,
    statistics: bool = True,
    change: Callable[[list[Tensor]], None] | None = None,
) -> Results:
    """The gradients by name, from what PyTorch's operators kept in ``dtype`` or as drawn; all of
    floating inputs, or those ``wanted``. ``change`` may alter what was kept.
    """
    p = {n: x.to(DEVICE, dtype if x.is_floating_point() else None) for n, x in p.items()}
    depth = len(strides)
    lists = [
        [p[f"{name}{i}"] for i in range(depth)]
        for name in ("weight", "bn_weight", "bn_bias", "mean", "var")
    ]
    pixels: tuple[Any, Any] = (None, None)
    if p["x"].dtype == torch.uint8 and statistics:
        images = p["x"].shape[1]
        pixels = (2 * MEAN)[:images], (2 * STD)[:images]
    inputs = [p.get(name) for name in INPUTS]
    options = training, EPS, *pixels
    stages = Stages(*lists, strides)
    # oneDNN's bfloat16 convolutions of images of one column are garbage (torch 2.15).
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        _, raw, means, variances, _ = conv_stem_torch.forward(*inputs, stages, *options, True)
        if change is not None:
            change(raw)
        kept = stages._replace(means=means, variances=variances)
        floating = [n for n in names(depth) if n in p and p[n].is_floating_point()]
        chosen = floating if wanted is None else wanted
        flags = [name in chosen for name in names(depth)]
        found = backward(p["grad"], *inputs, raw, kept, *options, flags)
    order = [name for name, flag in zip(names(depth), flags, strict=True) if flag]
    return {n: x.cpu() for n, x in zip(order, found, strict=True)}


def kernels(*args: Any) -> list[Tensor]:
    with poisoned_allocations():
        return conv_stem_triton_backward.backward(*args)


def check(
    check_agreement: Callable[..., None],
    problems: Sequence[dict[str, Tensor]],
    strides: Sequence[int],
    training: bool,
    *,
    rms: bool = False,
    floors: dict[str, float] | None = None,
    **options: Any,
) -> None:
    """The numbers rule for every gradient; with ``rms`` for root mean squares alone."""
    columns = [
        [run(backward, p, strides, training, dtype, **options) for p in problems]
        for backward, dtype in (
            (kernels, None),
            (conv_stem_torch.backward, None),
            (conv_stem_torch.backward, torch.float64),
        )
    ]
    check_agreement(*columns, rms=tuple(columns[0][0]) if rms else (), floors=floors)


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("image", "images", "channels", "strides", "D"), STEMS)
def test_numbers(
    image: tuple[int, int], images: int, channels: tuple[int, ...], strides: tuple[int, ...],
    D: int, dtype: torch.dtype, training: bool, launches, check_agreement,
) -> None:  # fmt: skip
    # Which activations rounding puts on the other side of zero is chance: several draws.
    draws = 1 if dtype == torch.float32 else 2
    problems = [
        problem(image, images, channels, strides, D, dtype, seed=seed, batch=1 + seed % 2)
        for seed in range(draws)
    ]
    rms = dtype != torch.float32
    # The gradient of one number has no mean square, and it is a sum that cancels.
    floor = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    floors = {
        f"bn_{n}{i}": floor for n in ("weight", "bias") for i, c in enumerate(channels) if c == 1
    }
    for batch in (1, 2):
        same = [p for p in problems if len(p["x"]) == batch]
        if same:
            check(check_agreement, same, strides, training, rms=rms, floors=floors)
    n = len(channels)
    expected = {
        "stem_input_gradient": n + 1,
        "stem_weight_gradient": n if images <= 7 else n + 1,
        "stem_image_gradient": 1 if images <= 7 else 0,
        "stem_raw_gradient": n if training else 0,
        "stem_norm_gradient": n,
        "stem_weight_sum": n + 1,
    }
    assert launches == {name: draws * count for name, count in expected.items() if count}


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
def test_single_elements_where_no_activation_switches(
    uint8: bool, dtype: torch.dtype, training: bool, check_agreement
) -> None:
    p = problem((9, 13), 3, (24, 40), (2, 1), 24, dtype, uint8=uint8, far=True)
    check(check_agreement, [p], (2, 1), training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_tiles_of_other_calls(arch: str, training: bool, on, monkeypatch, check_agreement) -> None:
    """Those of other architectures, and several in a program, as small images would not have."""
    on(arch)
    monkeypatch.setattr(stem_gradient_configs, "_MULTIPROCESSORS", dict.fromkeys(ARCHITECTURES, 1))
    p = problem((10, 7), 3, (72, 96, 136), (1, 2, 2), 72, torch.float16, far=True)
    check(check_agreement, [p], (1, 2, 2), training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("statistics", [True, False], ids=["statistics", "none"])
@pytest.mark.parametrize("images", [1, 3, 4, 6, 9])
def test_uint8(images: int, statistics: bool, training: bool, check_agreement) -> None:
    """The folded bias depends on the weight; forgetting that is an error of 2.5e-3."""
    problems = [problem((9, 13), images, (8, 16), (2, 2), 8, uint8=True, seed=i) for i in range(3)]
    check(check_agreement, problems, (2, 2), training, statistics=statistics)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("image", [(6, 5), (1, 8), (2, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_borders_of_flat_images(
    dtype: torch.dtype, image: tuple[int, int], level: int, stride: int, check_agreement
) -> None:
    """Padding is a pixel that normalises to zero, not a black one: in an image of one colour, taps
    differ by the borders alone.
    """
    p = problem(image, 3, (8,), (stride,), 8, dtype, uint8=True, far=True)
    p["x"].fill_(level)
    check(check_agreement, [p], (stride,), False, wanted=["weight0"])


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize(
    "wanted",
    [
        ["x"],
        ["proj_weight"],
        ["proj_bias"],
        ["pos_embed", "cls_token"],
        ["weight0"],
        ["weight2"],
        ["bn_bias1"],
        ["proj_weight", "weight1", "bn_weight2"],
    ],
    ids="-".join,
)
def test_only_what_is_wanted(wanted: list[str], training: bool, launches) -> None:
    """The same bits as among all gradients, and nothing below the first that is learned."""
    strides = (2, 1, 2)
    p = problem((9, 7), 3, (8, 16, 8), strides, 8)
    every = run(kernels, p, strides, training)
    launches.clear()
    found = run(kernels, p, strides, training, wanted=wanted)
    assert list(found) == [name for name in every if name in wanted]
    for name, value in found.items():
        torch.testing.assert_close(value, every[name], rtol=1e-5, atol=1e-5)
    weights = [name for name in wanted if name.startswith(("weight", "proj_weight"))]
    assert launches["stem_weight_sum"] == len(weights)
    stages = [0 if name == "x" else int(name[-1]) for name in wanted if name[-1] in "x012"]
    if not stages:
        assert launches["stem_input_gradient"] == 0
    else:
        assert launches["stem_input_gradient"] == 3 - min(stages) + int("x" in wanted)


def relaid(x: Tensor, how: str) -> Tensor:
    """The numbers of a tensor of four or, of tokens, three dimensions in another layout."""
    if how == "channels_last" and x.ndim == 4:
        return x.to(memory_format=torch.channels_last)
    if how == "transposed":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if how == "crop":
        return F.pad(x, (1, 2, 3, 1))[..., 3:-1, 1:-2]
    return x


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("how", ["channels_last", "transposed", "crop"])
def test_layouts(how: str, uint8: bool, training: bool) -> None:
    """Whatever the strides, the same bits."""
    p = problem(*SMALL, torch.float16, uint8=uint8)

    kept: list[Tensor] = []

    def results(p: dict[str, Tensor]) -> Results:
        """From the same numbers, however the layout makes a convolution add them up."""

        def keep(raw: list[Tensor]) -> None:
            if not kept:
                kept.extend(x.clone() for x in raw)
            for x, y in zip(raw, kept, strict=True):
                x.copy_(y)

        return run(kernels, p, (2, 2), training, change=keep)

    expected = results(p)
    changed = ("x", "grad", "weight0", "weight1", "proj_weight")
    found = results({n: relaid(x, how) if n in changed else x for n, x in p.items()})
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_gradient_that_is_one_number() -> None:
    """A sum's gradient has all strides zero."""
    p = problem(*SMALL)
    p["grad"] = torch.ones(()).expand(p["grad"].shape)
    expanded = run(kernels, p, (2, 2), True)
    p["grad"] = p["grad"].contiguous()
    for name, value in run(kernels, p, (2, 2), True).items():
        assert torch.equal(expanded[name], value), name


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_again(dtype: torch.dtype, training: bool) -> None:
    p = problem(*SMALL, dtype, uint8=True)
    first, second = (run(kernels, p, (2, 2), training) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("left_out", ["cls_token", "pos_embed", "proj_bias"])
def test_without(left_out: str, check_agreement) -> None:
    p = problem(*SMALL)
    del p[left_out]
    if left_out == "cls_token":
        p["grad"], p["pos_embed"] = p["grad"][:, 1:], p["pos_embed"][:, 1:]
    check(check_agreement, [p], (2, 2), True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
def test_no_images(training: bool) -> None:
    p = problem(*SMALL, batch=0)
    for name, value in run(kernels, p, (2, 2), training).items():
        assert value.shape == p[name].shape
        assert not value.any()


def test_not_a_number_goes_where_it_does_in_the_formula() -> None:
    """Through the ReLU, too: a NaN is not below zero."""
    p = problem(*SMALL)

    def spoil(raw: list[Tensor]) -> None:
        raw[0][0, 3, 2, 2] = float("nan")

    found, expected = (
        run(backward, p, (2, 2), False, change=spoil)
        for backward in (kernels, conv_stem_torch.backward)
    )
    assert any(value.isnan().any() for value in expected.values())
    for name, value in expected.items():
        assert torch.equal(found[name].isnan(), value.isnan()), name


@pytest.mark.parametrize("parts", [1, 2, stem_sums.PARTS, 2 * stem_sums.PARTS + 3])
def test_sums_of_many_parts(parts: int) -> None:
    """Large calls leave more parts than are read at once."""
    partials = torch.randn(parts, 18, 72, dtype=torch.float64)
    dweight = torch.empty(72, 2, 3, 3, device=DEVICE)
    stem_sums.stem_weight_sum(partials.to(DEVICE, torch.float32), dweight, None, None)
    expected = partials.sum(0).T.reshape(72, 2, 3, 3).float()
    torch.testing.assert_close(dweight.cpu(), expected, rtol=1e-5, atol=1e-5)

    sums = torch.randn(2, parts, 72, dtype=torch.float64)
    gamma, mean = torch.randn(72).double(), torch.randn(72).double()
    variance = torch.rand(72).double() + 0.5
    dgamma, dbeta = (torch.empty(72, device=DEVICE) for _ in range(2))
    norm = [t.to(DEVICE, torch.float32) for t in (gamma, gamma, mean, variance)]
    k = stem_sums.stem_norm_gradient(sums.to(DEVICE, torch.float32), norm, EPS, 1000, dgamma, dbeta)
    rstd = (variance + EPS).rsqrt()
    beta, weight = sums[0].sum(0), sums[1].sum(0) * rstd
    slope = -gamma * rstd * rstd * weight / 1000
    coefficients = torch.stack((gamma * rstd, slope, -gamma * rstd * beta / 1000, mean))
    for actual, wide in ((dgamma, weight), (dbeta, beta), (k, coefficients)):
        torch.testing.assert_close(actual.cpu(), wide.float(), rtol=1e-5, atol=1e-5)

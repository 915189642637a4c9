# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the convolutional stem: on a GPU if there is one, else in Triton's
interpreter, which shows the numbers and not the speed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastvit
from fastvit import reference
from fastvit.functional import ConvStage, conv_stem
from fastvit.testing import poisoned_allocations

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import configs, stem_configs, stem_statistics

from fastvit.ops import conv_stem_triton, trust

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF = DTYPES[1:]
MEAN, STD = (0.485, 0.1, 0.406, 0.5, 0.3), (0.229, 0.224, 1.0, 0.3, 0.2)
EPS = 1e-5
LAUNCHERS = (
    "stem_first", "stem_conv", "stem_pair", "stem_statistics", "stem_affine", "stem_tokens",
)  # fmt: skip

STEMS = [
    # image, image channels, channels, strides, D
    pytest.param((48, 48), 3, (24, 48, 96, 192), (2, 2, 2, 2), 192, id="vit_c_1gf"),
    pytest.param((21, 30), 3, (16, 24, 24, 40), (2, 2, 1, 2), 24, id="strides"),
    pytest.param((9, 13), 3, (8, 16), (2, 2), 8, id="odd_image"),
    pytest.param((7, 5), 1, (24,), (1,), 16, id="grey_one_stage"),
    pytest.param((6, 10), 4, (40, 56), (1, 2), 72, id="four_channels"),
    pytest.param((9, 7), 3, (64, 128), (2, 1), 24, id="wide_pair"),
    pytest.param((9, 7), 2, (72, 136), (2, 2), 24, id="no_pair"),
    pytest.param((9, 13), 6, (5, 12, 20), (2, 1, 2), 30, id="odd_channels"),
    pytest.param((5, 6), 5, (1, 67), (1, 2), 1, id="single_channels"),
    pytest.param((7, 5), 10, (33, 30), (2, 1), 7, id="many_bands"),
]
SMALL = ((9, 13), 3, (8, 16), (2, 2), 8)

Results = dict[str, Tensor]


@pytest.fixture(autouse=True)
def without_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are the proof; the check at first use would count as launches."""
    monkeypatch.setattr(trust, "needs_proof", lambda device: False)


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
        launcher = getattr(conv_stem_triton, name)
        monkeypatch.setattr(conv_stem_triton, name, counted(name, launcher))
    return count


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``on(arch)``: use the launch configurations of another architecture. In the interpreter only:
    a GPU keeps its own.
    """

    def use(arch: str) -> None:
        if GPU:
            pytest.skip("the configurations of other architectures are for the interpreter")
        monkeypatch.setattr(conv_stem_triton, "architecture", lambda device: arch)

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
    bias: bool = True,
    positions: int | None = 0,
    class_token: bool = False,
) -> dict[str, Tensor]:
    """Images and parameters by flat names; ``positions`` more than there are patches."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    p = {"x": draw(batch, images, *image)}
    if uint8:
        p["x"] = torch.randint(256, p["x"].shape, generator=generator, dtype=torch.uint8)
    for i, (before, after) in enumerate(zip((images, *channels), channels, strict=False)):
        p[f"conv{i}"] = draw(after, before, 3, 3) * (9 * before) ** -0.5
        p[f"weight{i}"] = 1 + 0.3 * draw(after)
        p[f"bias{i}"] = draw(after)
        p[f"mean{i}"] = 0.3 * draw(after)
        p[f"var{i}"] = 0.5 + draw(after).square()
    p["proj_weight"] = draw(D, channels[-1], 1, 1) * channels[-1] ** -0.5
    if bias:
        p["proj_bias"] = draw(D)
    if positions is not None:
        rows, columns = reference.stage_grids(image, strides)[-1]
        p["pos_embed"] = draw(1, rows * columns + positions, D)
    if class_token:
        p["cls_token"] = draw(1, 1, D)
    return p


def run(
    op: Callable[..., Tensor],
    p: dict[str, Tensor],
    strides: tuple[int, ...],
    mode: str,
    dtype: torch.dtype | None = None,
    **options: object,
) -> Results:
    """The output of ``op``, and in training the running statistics that it leaves; in ``dtype`` or
    as drawn. ``mode`` is "eval", "train" or "frozen", which is eval with something to learn.
    """
    p = {n: x.to(DEVICE, dtype if x.is_floating_point() else None) for n, x in p.items()}
    p = {n: x.clone() if n.startswith(("mean", "var")) else x for n, x in p.items()}
    names = ("conv", "weight", "bias", "mean", "var")
    stages = [ConvStage(*(p[f"{n}{i}"] for n in names), s) for i, s in enumerate(strides)]
    rest = {n: p.get(n) for n in ("proj_bias", "pos_embed", "cls_token")}
    if p["x"].dtype == torch.uint8:
        images = p["x"].shape[1]
        options |= {"mean": (2 * MEAN)[:images], "std": (2 * STD)[:images]}
    p["proj_weight"].requires_grad_(mode == "frozen")
    training = mode == "train"
    out = op(p["x"], stages, p["proj_weight"], **rest, training=training, eps=EPS, **options)
    results = {"output": out.detach().cpu()}
    if training:
        results |= {n: x.cpu() for n, x in p.items() if n.startswith(("mean", "var"))}
    return results


def kernels(*args: object, **options: object) -> Tensor:
    with poisoned_allocations():
        return conv_stem(*args, **options, backend="triton")


def check(
    check_agreement: Callable[..., None],
    p: dict[str, Tensor],
    strides: tuple[int, ...],
    mode: str = "eval",
    floors: dict[str, float] | None = None,
) -> None:
    """The numbers rule for the output and the running statistics."""
    results = (
        run(kernels, p, strides, mode),
        run(reference.conv_stem, p, strides, mode),
        run(reference.conv_stem, p, strides, mode, torch.float64),
    )
    check_agreement(*([result] for result in results), floors=floors)


def expected_launches(
    images: int, channels: tuple[int, ...], mode: str, dtype: torch.dtype
) -> dict[str, int]:
    n = len(channels)
    # The nine taps of more image channels do not fit.
    first = int(images <= 7)
    narrow = n > 1 and channels[0] <= 64 and channels[1] <= 128
    pair = narrow and images <= 4 and all(c % 8 == 0 for c in channels[:2])
    if mode != "eval":
        norms = "stem_statistics" if mode == "train" else "stem_affine"
        counts = {"stem_first": first, "stem_conv": n - first, norms: n, "stem_tokens": 1}
    elif pair and dtype != torch.float32:
        counts = {"stem_pair": 1, "stem_conv": n - 2, "stem_tokens": 1}
    else:
        counts = {"stem_first": first, "stem_conv": n - first, "stem_tokens": 1}
    return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize("mode", ["eval", "train", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("image", "images", "channels", "strides", "D"), STEMS)
def test_numbers(
    image: tuple[int, int], images: int, channels: tuple[int, ...], strides: tuple[int, ...],
    D: int, dtype: torch.dtype, mode: str, launches, check_agreement,
) -> None:  # fmt: skip
    p = problem(image, images, channels, strides, D, dtype)
    check(check_agreement, p, strides, mode)
    assert launches == expected_launches(images, channels, mode, dtype)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("few", [True, False], ids=["few_positions", "many"])
def test_tiles_of_other_calls(arch: str, mode: str, few: bool, on, monkeypatch, check_agreement):
    """The tiles for many positions, which tests of small images would not take, and those of
    other architectures.
    """
    on(arch)
    if not few:
        monkeypatch.setattr(
            stem_configs, "_MULTIPROCESSORS", dict.fromkeys(configs.ARCHITECTURES, 0)
        )
    p = problem((13, 10), 3, (48, 96, 192), (2, 1, 2), 200, torch.float16)
    check(check_agreement, p, (2, 1, 2), mode)


@pytest.mark.parametrize("mode", ["eval", "train", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("images", [1, 3, 4, 6, 9])
def test_uint8(images: int, dtype: torch.dtype, mode: str, check_agreement) -> None:
    p = problem((9, 13), images, (8, 16), (2, 2), 8, dtype, uint8=True)
    check(check_agreement, p, (2, 2), mode)


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("mode", ["eval", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (1, 2)])
def test_borders_of_flat_images(
    strides: tuple[int, ...], dtype: torch.dtype, mode: str, level: int, check_agreement
) -> None:
    """Padding is a pixel that normalises to zero, not a black one: only borders differ."""
    p = problem((6, 5), 3, (8, 16), strides, 8, dtype, uint8=True, positions=None)
    p["x"].fill_(level)
    check(check_agreement, p, strides, mode)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_uint8_without_statistics(mode: str) -> None:
    """Divided by 255."""
    p = problem(*SMALL, uint8=True)
    scaled = {**p, "x": p["x"].float() / 255}
    found = run(lambda *args, mean, std, **kwargs: kernels(*args, **kwargs), p, (2, 2), mode)
    expected = run(reference.conv_stem, scaled, (2, 2), mode)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    ("positions", "class_token", "bias"),
    [(None, False, False), (0, True, True), (1, True, False), (None, True, True)],
)
def test_tokens_are_assembled(
    positions: int | None, class_token: bool, bias: bool, mode: str, check_agreement
) -> None:
    p = problem(*SMALL, bias=bias, positions=positions, class_token=class_token)
    check(check_agreement, p, (2, 2), mode)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
def test_layouts(uint8: bool, mode: str) -> None:
    """Whatever the strides, the same bits."""
    p = problem(*SMALL, torch.float16, uint8=uint8)
    p["x"][1] = p["x"][0]
    expected = run(kernels, p, (2, 2), mode)
    x = p["x"]
    for relaid in (
        x.to(memory_format=torch.channels_last),
        F.pad(x, (1, 2, 3, 1))[..., 3:-1, 1:-2],
        x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        x[:1].expand_as(x),
    ):
        found = run(kernels, {**p, "x": relaid}, (2, 2), mode)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    last = {n: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in p.items()}
    apart = {n: torch.stack((t, t), -1)[..., 0] if t.ndim == 1 else t for n, t in last.items()}
    found = run(kernels, apart, (2, 2), mode)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("mode", ["eval", "train", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_again(dtype: torch.dtype, mode: str) -> None:
    p = problem(*SMALL, dtype)
    first, second = (run(kernels, p, (2, 2), mode) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_batches(batch: int, dtype: torch.dtype, launches, check_agreement) -> None:
    p = problem(*SMALL, dtype, batch=batch)
    if batch:
        check(check_agreement, p, (2, 2))
        check(check_agreement, p, (2, 2), "train")
    else:
        assert run(kernels, p, (2, 2), "eval")["output"].shape == (0, 12, 8)
        assert not launches


@pytest.mark.parametrize("mode", ["train", "frozen"])
def test_gradients(mode: str, check_agreement, differentiate) -> None:
    """What the forward saves is what the backward needs."""
    p = problem(*SMALL, class_token=True)
    fixed = {n: p.pop(n) for n in list(p) if n.startswith(("mean", "var"))}

    def results(op: Callable[..., Tensor], dtype: torch.dtype) -> Results:
        def call(**moving: Tensor) -> Tensor:
            here = {**{n: x.to(dtype).clone() for n, x in fixed.items()}, **moving}
            names = ("conv", "weight", "bias", "mean", "var")
            stages = [ConvStage(*(here[f"{n}{i}"] for n in names), 2) for i in range(2)]
            rest = {n: here[n] for n in ("proj_bias", "pos_embed", "cls_token")}
            x, weight = here["x"], here["proj_weight"]
            return op(x, stages, weight, **rest, training=mode == "train", eps=EPS).cpu()

        return differentiate(call, {n: x.to(DEVICE, dtype) for n, x in p.items()})

    found = results(kernels, torch.float32)
    expected = (results(reference.conv_stem, d) for d in (torch.float32, torch.float64))
    check_agreement([found], *([result] for result in expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["eval", "train", "frozen"])
def test_not_a_number_goes_where_it_does_in_the_reference(mode: str, dtype: torch.dtype) -> None:
    p = problem((16, 16), 3, (8, 16), (2, 2), 8, dtype)
    p["x"][0, 0, 3, 9] = float("nan")
    found, expected = (run(op, p, (2, 2), mode) for op in (kernels, reference.conv_stem))
    assert expected["output"].isnan().any()
    for name, value in expected.items():
        assert torch.equal(found[name].isnan(), value.isnan()), name


def test_statistics_of_values_far_from_zero(check_agreement) -> None:
    """Sums of squares would cancel."""
    p = problem(*SMALL)
    p["x"] += 1000.0
    check(check_agreement, p, (2, 2), "train")


@pytest.mark.parametrize(("total", "size"), [(1, 64), (64 * 3, 64), (64 * 5 + 1, 64), (1000, 7)])
def test_statistics_in_groups(total: int, size: int, monkeypatch) -> None:
    """Parts of several programs, combined in two steps."""
    monkeypatch.setattr(stem_statistics, "GROUP", 32)
    x = torch.randn(total, 24, dtype=torch.float64) + 100.0
    parts = [part.to(DEVICE) for part in x.split(size)]
    partials = torch.stack(
        [torch.stack([p.mean(0) for p in parts]),
         torch.stack([(p - p.mean(0)).square().sum(0) for p in parts])]
    ).float()  # fmt: skip
    gamma, beta = torch.randn(2, 24, device=DEVICE)
    mean, variance = torch.full((2, 24), float("nan"), device=DEVICE)
    scale, shift = stem_statistics.stem_statistics(
        partials, size, total, gamma, beta, EPS, mean, variance
    )
    torch.testing.assert_close(mean.cpu(), x.mean(0).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.cpu(), x.var(0, correction=0).float(), rtol=1e-5, atol=1e-6)
    rstd = torch.rsqrt(variance + EPS)
    torch.testing.assert_close(scale, gamma * rstd)
    torch.testing.assert_close(shift, beta - mean * gamma * rstd)


def test_images_out_of_reach(monkeypatch, check_agreement) -> None:
    """Strides that 32 bits do not hold: the images are copied."""
    monkeypatch.setattr(conv_stem_triton, "within_reach", lambda x, rows: x.is_contiguous())
    p = problem(*SMALL)
    p["x"] = p["x"].to(memory_format=torch.channels_last)
    check(check_agreement, p, (2, 2))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_autocast(mode: str, launches) -> None:
    p = problem(*SMALL)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = run(kernels, p, (2, 2), mode)
    assert found["output"].dtype == torch.bfloat16
    rounded = {n: x.bfloat16() if n.startswith(("x", "conv", "proj")) else x for n, x in p.items()}
    for name, value in run(kernels, rounded, (2, 2), mode).items():
        assert torch.equal(found[name], value), name
    assert launches["stem_tokens"] == 2


def test_a_layer_and_its_modes(launches, check_agreement) -> None:
    """Train, evaluate, train again: the buffers move as the modules' own."""
    layers = [fastvit.ConvStem(3, (8, 16), (2, 2), 24, backend=b) for b in ("triton", "reference")]
    layers.append(fastvit.ConvStem(3, (8, 16), (2, 2), 24, backend="reference").double())
    for layer in layers:
        layer.load_state_dict(layers[0].state_dict())
    results: list[Results] = [{}, {}, {}]
    for step, training in enumerate((True, False, True)):
        x = torch.randn(2, 3, 11, 8)
        for layer, found in zip(layers, results, strict=True):
            layer.to(DEVICE).train(training)
            out = layer(x.to(DEVICE, next(layer.parameters()).dtype))
            found[f"output {step}"] = out.detach().cpu()
            found |= {f"{n} {step}": b.detach().cpu().clone() for n, b in layer.named_buffers()}
    counts = [n for n in results[0] if "num_batches" in n]
    assert [results[0].pop(n) for n in counts] == [results[1].pop(n) for n in counts]
    for n in counts:
        results[2].pop(n)
    check_agreement(*([found] for found in results))
    assert launches["stem_tokens"] == 3


def test_compiled(launches) -> None:
    """One graph, with the op in it, and the bits of the eager layer."""
    torch._dynamo.reset()
    layer = fastvit.ConvStem(3, (8, 16), (2, 2), 24, backend="triton").to(DEVICE).eval()
    x = torch.randn(2, 3, 11, 8, device=DEVICE)
    with torch.no_grad():
        expected = layer(x)
        found = torch.compile(layer, fullgraph=True)(x)
    assert torch.equal(found, expected)
    assert launches["stem_tokens"] == 2


def test_compiled_for_any_size(launches) -> None:
    """With the sizes of the images symbolic."""
    torch._dynamo.reset()
    layer = fastvit.ConvStem(3, (8, 16), (2, 2), 24, backend="triton").to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    layer.eval()
    with torch.no_grad():
        for shape in ((2, 3, 11, 8), (3, 3, 6, 13)):
            x = torch.randn(shape, device=DEVICE)
            assert torch.equal(compiled(x), layer(x))
    assert launches["stem_tokens"] == 4


def test_refusal() -> None:
    """Asked for by name, with a reason; otherwise another backend serves."""
    p = problem(*SMALL, torch.float64)
    words = "take float32, float16, bfloat16, and the weight is float64"
    with pytest.raises(RuntimeError, match=words):
        run(kernels, p, (2, 2), "eval")
    found, expected = (run(op, p, (2, 2), "eval") for op in (conv_stem, reference.conv_stem))
    torch.testing.assert_close(found["output"], expected["output"])


@pytest.mark.skipif(GPU, reason="a GPU is what auto takes the kernels for")
def test_auto_leaves_the_interpreter_alone(launches) -> None:
    run(conv_stem, problem(*SMALL), (2, 2), "eval")
    assert not launches

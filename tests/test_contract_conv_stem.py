# SPDX-License-Identifier: Apache-2.0
"""The convolutional stem against its formula in float64, timm's stem and torchvision's."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import HybridEmbed
from timm.models.vision_transformer_hybrid import ConvStem as TimmConvStem
from torch import Tensor, nn
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

import fastvit
from fastvit import ConvStem
from fastvit.functional import ConvStage, conv_stem
from fastvit.testing import poisoned_allocations

BACKENDS = ["reference", "torch", None]
MEAN, STD = (0.485, 0.1, 0.406), (0.229, 0.224, 1.0)
ROUNDED = [torch.bfloat16, torch.float16]

STEMS = [
    # image, in channels, channels, strides
    pytest.param((32, 32), 3, (6, 8, 10, 12), (2, 2, 2, 2), id="vit_c_4gf_shape"),
    pytest.param((16, 16), 3, (8, 8, 12), (2, 1, 2), id="stride_1_within"),
    pytest.param((9, 13), 3, (4, 6), (2, 2), id="odd_image"),
    pytest.param((7, 5), 1, (5,), (1,), id="grey_one_stage_stride_1"),
    pytest.param((6, 6), 4, (4, 4), (1, 2), id="four_channels"),
]


def normalized(images: Tensor, mean=None, std=None, dtype=torch.float64) -> Tensor:
    """(x / 255 - mean) / std of uint8 images, rounded to ``dtype`` once."""
    if images.dtype != torch.uint8:
        return images
    wide = torch.promote_types(dtype, torch.float32)
    x = images.to(wide) / 255
    if mean is not None:
        shift, scale = (torch.tensor(v, dtype=wide).view(-1, 1, 1) for v in (mean, std))
        x = (x - shift) / scale
    return x.to(dtype)


def batch_norm(x, weight, bias, mean, var, eps):
    """With statistics of the batch unless some are given: the formula, and in lower precision
    what PyTorch makes of it.
    """
    if x.dtype != torch.float64:
        return F.batch_norm(x, mean, var, weight, bias, training=mean is None, eps=eps)
    if mean is None:
        mean = x.mean((0, 2, 3))
        var = (x - mean[:, None, None]).square().mean((0, 2, 3))
    mean, var, weight, bias = (t[:, None, None] for t in (mean, var, weight, bias))
    return (x - mean) / (var + eps).sqrt() * weight + bias


def dense_conv_stem(
    x, stages, proj_weight, proj_bias=None, *, training=False, eps=1e-5, pos_embed=None,
    cls_token=None, mean=None, std=None,
):  # fmt: skip
    x = normalized(x, mean, std, proj_weight.dtype)
    for stage in stages:
        x = F.conv2d(x, stage.weight, stride=stage.stride, padding=1)
        statistics = (None, None) if training else (stage.running_mean, stage.running_var)
        x = batch_norm(x, stage.bn_weight, stage.bn_bias, *statistics, eps).relu()
    tokens = F.conv2d(x, proj_weight, proj_bias).flatten(2).transpose(1, 2)
    if pos_embed is not None and pos_embed.shape[1] == tokens.shape[1]:
        tokens, pos_embed = tokens + pos_embed, None
    if cls_token is not None:
        tokens = torch.cat([cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
    return tokens if pos_embed is None else tokens + pos_embed


def flat(op, strides, tracked=True, **options):
    """``op`` as a function of flat names, so that every gradient has one."""

    def call(x, proj_weight, proj_bias=None, pos_embed=None, cls_token=None, **stages):
        listed = []
        for i, stride in enumerate(strides):
            conv, weight, bias, mean, var = (
                stages[f"{name}{i}"] for name in ("conv", "bn_weight", "bn_bias", "mean", "var")
            )
            # Fixed, and not what the op may change.
            mean, var = (t.detach().clone() if tracked else None for t in (mean, var))
            listed.append(ConvStage(conv, weight, bias, mean, var, stride))
        return op(
            x, listed, proj_weight, proj_bias, pos_embed=pos_embed, cls_token=cls_token, **options
        )

    return call


def problem(
    image=(9, 13), in_chans=3, channels=(4, 6), *, dtype=torch.float32, batch=2, width=5, seed=0,
    uint8=False,
) -> dict[str, Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    p = {"x": draw(batch, in_chans, *image)}
    if uint8:
        shape = (batch, in_chans, *image)
        p["x"] = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    for i, (before, after) in enumerate(zip((in_chans, *channels), channels, strict=False)):
        p[f"conv{i}"] = draw(after, before, 3, 3) * (9 * before) ** -0.5
        p[f"bn_weight{i}"] = 1 + 0.3 * draw(after)
        p[f"bn_bias{i}"] = draw(after)
        p[f"mean{i}"] = 0.3 * draw(after)
        p[f"var{i}"] = 0.5 + draw(after).square()
    p["proj_weight"] = draw(width, channels[-1], 1, 1) * channels[-1] ** -0.5
    p["proj_bias"] = draw(width)
    return p


@pytest.fixture(params=BACKENDS, ids=str)
def op(request):
    return partial(conv_stem, backend=request.param)


@pytest.fixture
def check(check_agreement, differentiate):
    """``check(op, problems, strides, **options)``: the numbers rule without the gradients of the
    running statistics, which have none.
    """

    def run(op, problems, strides, *, rms=(), **options):
        def results(function, problems):
            call = flat(function, strides, **options)
            fixed = [{n: p[n] for n in p if n.startswith(("mean", "var"))} for p in problems]
            moving = [
                {n: x for n, x in p.items() if n not in f}
                for p, f in zip(problems, fixed, strict=True)
            ]
            return [
                differentiate(partial(call, **f), m, i)
                for i, (f, m) in enumerate(zip(fixed, moving, strict=True))
            ]

        doubles = [
            {n: x.double() if x.is_floating_point() else x for n, x in p.items()} for p in problems
        ]
        check_agreement(
            results(op, problems),
            results(dense_conv_stem, problems),
            results(dense_conv_stem, doubles),
            rms=rms,
        )

    return run


MODES = [
    pytest.param({"training": True}, id="train"),
    pytest.param({"training": False}, id="eval"),
    pytest.param({"training": True, "tracked": False}, id="train_untracked"),
    pytest.param({"training": False, "tracked": False}, id="eval_untracked"),
]


class TestOp:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize(("image", "in_chans", "channels", "strides"), STEMS)
    def test_agrees_with_the_formula(
        self, op, image, in_chans, channels, strides, dtype, mode, check
    ):
        check(op, [problem(image, in_chans, channels, dtype=dtype)], strides, **mode)

    @pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
    @pytest.mark.parametrize("mode", MODES[:2])
    @pytest.mark.parametrize("dtype", ROUNDED, ids=str)
    def test_agrees_in_half_precision(self, op, dtype, mode, uint8, check):
        """With activations far from zero: which ones rounding would switch is chance."""
        problems = [
            problem((16, 16), 3, (6, 8), dtype=dtype, seed=i, uint8=uint8) for i in range(8)
        ]
        for p in problems:
            for name in ("bn_bias0", "bn_bias1"):
                # Half of the channels pass, half are cut off.
                p[name] = torch.tensor([8.0, -8.0] * 4, dtype=dtype)[: len(p[name])]
        gradients = [f"grad of {name}" for name in problems[0]]
        statistics = {"mean": MEAN, "std": STD} if uint8 else {}
        check(op, problems, (2, 2), rms=gradients, **statistics, **mode)

    @pytest.mark.parametrize("eps", [1e-3, 1e-12])
    @pytest.mark.parametrize("mode", MODES[:2])
    def test_eps(self, op, eps, mode, check):
        check(op, [problem(dtype=torch.float64)], (2, 2), eps=eps, **mode)

    @pytest.mark.parametrize("mode", MODES[:2])
    def test_without_projection_bias(self, op, mode, check):
        p = problem(dtype=torch.float64)
        del p["proj_bias"]
        check(op, [p], (2, 2), **mode)

    @pytest.mark.parametrize("mode", MODES[:2])
    @pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
    @pytest.mark.parametrize(
        ("positions", "class_token"),
        [
            pytest.param(12, False, id="positions"),
            pytest.param(12, True, id="positions_of_the_patches_and_class_token"),
            pytest.param(13, True, id="positions_of_all_and_class_token"),
            pytest.param(None, True, id="class_token"),
        ],
    )
    def test_tokens_are_assembled(self, op, positions, class_token, uint8, mode, check):
        p = problem(dtype=torch.float64, uint8=uint8)
        if positions:
            p["pos_embed"] = torch.randn(1, positions, 5).double()
        if class_token:
            p["cls_token"] = torch.randn(1, 1, 5).double()
        statistics = {"mean": MEAN, "std": STD} if uint8 else {}
        check(op, [p], (2, 2), **mode, **statistics)

    @pytest.mark.parametrize(
        "relayout",
        [
            pytest.param(lambda x: x.to(memory_format=torch.channels_last), id="channels_last"),
            pytest.param(lambda x: F.pad(x, (1, 2, 3, 1))[..., 3:-1, 1:-2], id="crop"),
            pytest.param(lambda x: x[:1].expand_as(x), id="expanded_batch"),
        ],
    )
    @pytest.mark.parametrize("mode", MODES[:2])
    def test_any_layout(self, op, relayout, mode, check):
        p = problem(dtype=torch.float64)
        p |= {
            n: relayout(p[n]) for n in ("x", "conv0", "conv1") if relayout(p[n]).shape == p[n].shape
        }
        check(op, [p], (2, 2), **mode)

    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_batch_sizes_in_evaluation(self, op, batch, check):
        check(op, [problem(batch=batch, dtype=torch.float64)], (2, 2), training=False)

    def test_one_image_trains(self, op, check):
        """Its pixels are values enough."""
        check(op, [problem(batch=1, dtype=torch.float64)], (2, 2), training=True)

    @pytest.mark.parametrize("mode", MODES[:2])
    def test_gradcheck(self, op, mode):
        p = problem((4, 5), 2, (3, 2), dtype=torch.float64, width=2)
        names = [n for n in p if not n.startswith(("mean", "var"))]
        fixed = {n: p[n] for n in p if n not in names}
        call = flat(op, (2, 1), **mode)
        assert torch.autograd.gradcheck(
            lambda *leaves: call(**dict(zip(names, leaves, strict=True)), **fixed),
            [p[n].requires_grad_() for n in names],
        )

    @pytest.mark.parametrize("mode", MODES[:2])
    @pytest.mark.parametrize("wanted", ["x", "conv0", "bn_weight0", "bn_bias1", "proj_weight"])
    def test_each_gradient_alone(self, op, wanted, mode):
        p = problem(dtype=torch.float64)
        p[wanted].requires_grad_()
        flat(op, (2, 2), **mode)(**p).square().sum().backward()
        out = flat(dense_conv_stem, (2, 2), **mode)(**p)
        (expected,) = torch.autograd.grad(out.square().sum(), p[wanted])
        torch.testing.assert_close(p[wanted].grad, expected, rtol=1e-9, atol=1e-11)
        assert all(x.grad is None for n, x in p.items() if n != wanted)

    @pytest.mark.parametrize("mode", MODES[:2])
    def test_nan_goes_through_as_in_the_formula(self, op, mode):
        """In evaluation into the patches that see it, in training everywhere."""
        p = problem((16, 16))
        p["x"][0, 0, 3, 9] = float("nan")
        actual, expected = (flat(f, (2, 2), **mode)(**p) for f in (op, dense_conv_stem))
        assert expected.isnan().any()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)

    @pytest.mark.parametrize("mode", MODES[:2])
    @pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
    def test_repeats_bit_by_bit_on_poisoned_memory(self, op, uint8, mode, differentiate):
        p = problem(uint8=uint8)
        call = flat(op, (2, 2), **mode)
        fixed = {n: p.pop(n) for n in list(p) if n.startswith(("mean", "var"))}
        first = differentiate(partial(call, **fixed), p)
        with poisoned_allocations():
            again = differentiate(partial(call, **fixed), p)
        for name, x in first.items():
            assert torch.equal(x, again[name]), name


class TestUint8:
    @pytest.mark.parametrize("statistics", [True, False], ids=["statistics", "none"])
    @pytest.mark.parametrize("mode", MODES[:2])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize(("image", "in_chans", "channels", "strides"), STEMS[:3])
    def test_agrees_with_normalising_first(
        self, op, image, in_chans, channels, strides, dtype, mode, statistics, check
    ):
        """Border pixels too: the convolution pads the normalised image with zeros."""
        options = {"mean": MEAN, "std": STD} if statistics else {}
        p = problem(image, in_chans, channels, dtype=dtype, uint8=True)
        check(op, [p], strides, **mode, **options)

    @pytest.mark.parametrize("level", [0, 255])
    def test_flat_images_show_their_borders(self, op, level, check):
        p = problem(dtype=torch.float64, uint8=True)
        p["x"].fill_(level)
        check(op, [p], (2, 2), training=False, mean=MEAN, std=STD)

    @pytest.mark.parametrize("mode", MODES[:2])
    def test_every_gradient_in_float32_to_1e_5(self, op, mode, differentiate):
        """The folded bias depends on the weight; forgetting that is an error of 2.5e-3."""
        p = problem((32, 32), 3, (8,), uint8=True, batch=4)
        fixed = {n: p.pop(n) for n in list(p) if n.startswith(("mean", "var"))}
        doubles = {n: x.double() if x.is_floating_point() else x for n, x in p.items()}

        def results(function, p, fixed):
            call = flat(function, (2,), **mode, mean=MEAN, std=STD)
            return differentiate(partial(call, **fixed), p)

        actual = results(op, p, fixed)
        expected = results(dense_conv_stem, doubles, {n: x.double() for n, x in fixed.items()})
        for name, x in expected.items():
            error = (actual[name].double() - x).abs().max() / x.abs().max()
            assert error < 1e-5, f"{name}: {error:.1e}"


class TestRunningStatistics:
    def stage(self, dtype=torch.float32, seed=0):
        p = problem(seed=seed, dtype=dtype)
        stages = [
            ConvStage(*(p[f"{n}{i}"] for n in ("conv", "bn_weight", "bn_bias", "mean", "var")), 2)
            for i in range(2)
        ]
        return p, stages

    @pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
    def test_op_moves_them_as_batch_norm(self, op, momentum):
        """The variance that is kept is the unbiased one."""
        p, stages = self.stage(torch.float64)
        before = [
            s._replace(running_mean=s.running_mean.clone(), running_var=s.running_var.clone())
            for s in stages
        ]
        op(p["x"], stages, p["proj_weight"], training=True, momentum=momentum)
        x = p["x"]
        for stage, old in zip(stages, before, strict=True):
            x = F.conv2d(x, stage.weight, stride=2, padding=1)
            for name, new in (("mean", x.mean((0, 2, 3))), ("var", x.var((0, 2, 3)))):
                expected = torch.lerp(getattr(old, f"running_{name}"), new, momentum)
                torch.testing.assert_close(getattr(stage, f"running_{name}"), expected)
            x = batch_norm(x, stage.bn_weight, stage.bn_bias, None, None, 1e-5).relu()

    def test_op_leaves_them_alone_in_evaluation(self, op):
        p, stages = self.stage()
        before = copy.deepcopy(stages)
        op(p["x"], stages, p["proj_weight"], training=False)
        for stage, old in zip(stages, before, strict=True):
            assert torch.equal(stage.running_mean, old.running_mean)
            assert torch.equal(stage.running_var, old.running_var)

    def test_they_move_without_gradients_too(self, op):
        p, stages = self.stage()
        before = stages[0].running_mean.clone()
        with torch.no_grad():
            op(p["x"], stages, p["proj_weight"], training=True)
        assert not torch.equal(stages[0].running_mean, before)

    def test_they_move_once_with_a_backward(self, op):
        p, stages = self.stage()
        twin = copy.deepcopy(stages)
        p["proj_weight"].requires_grad_()
        op(p["x"], stages, p["proj_weight"], training=True).sum().backward()
        with torch.no_grad():
            op(p["x"], twin, p["proj_weight"], training=True)
        for one, other in zip(stages, twin, strict=True):
            assert torch.equal(one.running_mean, other.running_mean)
            assert torch.equal(one.running_var, other.running_var)


def randomize(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.Conv2d):
                fan_in = m.weight[0].numel()
                m.weight.copy_(torch.randn(m.weight.shape, generator=generator) * fan_in**-0.5)
                if m.bias is not None:
                    m.bias.normal_(generator=generator)
            elif isinstance(m, nn.BatchNorm2d):
                m.weight.copy_(1 + 0.3 * torch.randn(m.weight.shape, generator=generator))
                m.bias.copy_(torch.randn(m.bias.shape, generator=generator))
                if m.running_mean is not None:
                    m.running_mean.normal_(generator=generator)
                    m.running_var.uniform_(0.5, 2, generator=generator)


CHANNELS, STRIDES, WIDTH = (6, 8, 10), (2, 1, 2), 7


def timm_stem(in_chans=3, channels=CHANNELS, strides=STRIDES, width=WIDTH, dtype=None):
    return TimmConvStem(
        in_chans,
        depth=len(channels) + 1,
        channels=(*channels, width),
        kernel_size=(3,) * len(channels) + (1,),
        stride=(*strides, 1),
        dtype=dtype,
    )


def pair(*, seed=0, backend=None, dtype=torch.float64, flatten=False, **statistics):
    """Our stem and timm's with the same random parameters and statistics."""
    theirs = timm_stem(dtype=dtype)
    randomize(theirs, seed)
    ours = ConvStem(
        3, CHANNELS, STRIDES, WIDTH, flatten=flatten, dtype=dtype, backend=backend, **statistics
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), e in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, e, msg=lambda m, name=name: f"{name}: {m}")


def batch_norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


class TestAsTimm:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("image", [(16, 16), (11, 14)], ids=str)
    def test_two_steps(self, image, training, backend, differentiate_module, check_agreement):
        """The second sees the statistics that the first left behind."""
        ours, theirs = (m.train(training) for m in pair(backend=backend))
        for _ in range(2):
            x = torch.randn(2, 3, *image, dtype=torch.float64)
            actual, expected = differentiate_module(ours, x), differentiate_module(theirs, x)
            check_agreement([actual], [expected], [expected])
            assert_same_state(ours, theirs)
        assert ours.state_dict()["0.bn.num_batches_tracked"] == (2 if training else 0)
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))

    def test_float32(self, differentiate_module, check_agreement):
        ours, theirs = pair(dtype=torch.float32)
        x = torch.randn(2, 3, 16, 16)
        expected = differentiate_module(copy.deepcopy(theirs).double(), x.double())
        check_agreement(
            [differentiate_module(ours, x)], [differentiate_module(theirs, x)], [expected]
        )

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("how", [*ROUNDED, "autocast"], ids=str)
    def test_half_precision(self, how, training, backend, differentiate_module, check_agreement):
        autocast = how == "autocast"
        dtype = torch.float32 if autocast else how
        results, statistics = [], []
        for seed in range(8):
            modules = pair(dtype=dtype, seed=seed, backend=backend)
            ours, theirs = (m.train(training) for m in modules)
            double = copy.deepcopy(theirs).double()
            # Large enough that a few activations on the other side of zero do not decide.
            x = torch.randn(4, 3, 32, 32).to(dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                two = [differentiate_module(m, x) for m in (ours, theirs)]
            results.append((*two, differentiate_module(double, x.double())))
            statistics.append(
                [
                    {n: b for n, b in m.named_buffers() if b.is_floating_point()}
                    for m in (ours, theirs, double)
                ]
            )
        assert results[0][0]["output"].dtype == (torch.bfloat16 if autocast else how)
        gradients = [name for name in results[0][0] if name != "output"]
        check_agreement(*zip(*results, strict=True), rms=gradients)
        assert statistics[0][0]["0.bn.running_mean"].dtype == dtype
        check_agreement(*zip(*statistics, strict=True))

    def test_in_a_hybrid_embed(self):
        """timm's own way to build a ViT_C; ours takes the backbone's place."""
        options = {"img_size": 16, "proj": False, "embed_dim": WIDTH}
        ours, theirs = pair(dtype=torch.float32)
        inside = HybridEmbed(ours, **options)
        expected = HybridEmbed(theirs, **options)
        assert list(inside.state_dict()) == list(expected.state_dict())
        x = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(inside.eval()(x), expected.eval()(x), rtol=1e-4, atol=1e-5)
        flat_ours, _ = pair(dtype=torch.float32, flatten=True)
        torch.testing.assert_close(flat_ours.eval()(x), expected(x), rtol=1e-4, atol=1e-5)

    def test_keys_both_ways(self):
        ours, theirs = ConvStem(3, CHANNELS, STRIDES, WIDTH, mean=MEAN, std=STD), timm_stem()
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)

    def test_defaults_are_vit_c_4gf(self):
        module = ConvStem()
        shapes = [tuple(m.weight.shape) for m in module.modules() if isinstance(m, nn.Conv2d)]
        assert shapes == [
            (48, 3, 3, 3), (96, 48, 3, 3), (192, 96, 3, 3), (384, 192, 3, 3), (384, 384, 1, 1)
        ]  # fmt: skip
        assert all(m.eps == 1e-5 and m.momentum == 0.1 for m in batch_norms(module))
        assert module.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 4, 384)


class TestModule:
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_flatten(self, training):
        tokens, grid = (pair(flatten=f)[0].train(training) for f in (True, False))
        x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
        assert grid(x).shape == (2, WIDTH, 4, 6)
        assert tokens(x).shape == (2, 24, WIDTH)
        torch.testing.assert_close(tokens(x), grid(x).flatten(2).transpose(1, 2))

    @pytest.mark.parametrize("momentum", [None, 0.0, 0.5])
    def test_momentum(self, momentum):
        """None: the plain average of all batches, as nn.BatchNorm2d has it."""
        ours, theirs = pair()
        for m in batch_norms(theirs):
            m.momentum = momentum
        ours = ConvStem(
            3, CHANNELS, STRIDES, WIDTH, norm_momentum=momentum, flatten=False, dtype=torch.float64
        )
        ours.load_state_dict(theirs.state_dict())
        for _ in range(3):
            x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
            torch.testing.assert_close(ours(x), theirs(x))
            assert_same_state(ours, theirs)

    def test_norm_eps(self):
        ours = ConvStem(3, (4,), (2,), 5, norm_eps=0.1)
        assert batch_norms(ours)[0].eps == 0.1
        theirs = timm_stem(3, (4,), (2,), 5)
        theirs.load_state_dict(ours.state_dict())
        batch_norms(theirs)[0].eps = 0.1
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(ours(x), theirs(x).flatten(2).transpose(1, 2))

    @pytest.mark.parametrize("frozen", [(0, 1, 2), (1,), (0, 2)], ids=str)
    def test_frozen_batch_norms(self, frozen, differentiate_module, check_agreement):
        """bn.eval() inside a training stem, as fine-tuning does; some or all of them."""
        ours, theirs = pair()
        for module in (ours, theirs):
            module.train()
            for i in frozen:
                batch_norms(module)[i].eval()
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        actual, expected = differentiate_module(ours, x), differentiate_module(theirs, x)
        check_agreement([actual], [expected], [expected])
        assert_same_state(ours, theirs)

    def test_training_batch_norms_inside_an_evaluated_stem(self):
        """The mode of a norm is its own."""
        ours, theirs = pair()
        for module in (ours, theirs):
            module.eval()
            batch_norms(module)[1].train()
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        torch.testing.assert_close(ours(x), theirs(x))
        assert_same_state(ours, theirs)

    def test_frozen_parameters_get_no_gradient(self):
        ours, _ = pair()
        for m in batch_norms(ours):
            m.requires_grad_(False)
        ours(torch.randn(2, 3, 16, 16, dtype=torch.float64)).sum().backward()
        assert all(p.grad is None for m in batch_norms(ours) for p in m.parameters())
        assert ours.get_parameter("0.conv.weight").grad is not None

    def test_no_running_statistics(self, differentiate_module, check_agreement):
        """track_running_stats=False: the batch's statistics in evaluation too."""
        ours, theirs = pair()
        for module in (ours, theirs):
            for m in batch_norms(module):
                m.track_running_stats = False
                m.running_mean = m.running_var = m.num_batches_tracked = None
            module.eval()
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        actual, expected = differentiate_module(ours, x), differentiate_module(theirs, x)
        check_agreement([actual], [expected], [expected])

    def test_norms_of_different_settings(self):
        """One eps and one momentum are what the op takes; a model may have several."""
        ours, theirs = pair()
        for module in (ours, theirs):
            for m, eps, momentum in zip(
                batch_norms(module), (1e-5, 0.1, 1e-3), (0.1, None, 0.7), strict=True
            ):
                m.eps, m.momentum = eps, momentum
        for _ in range(2):
            x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
            torch.testing.assert_close(ours(x), theirs(x))
            assert_same_state(ours, theirs)

    def test_sync_batch_norm_in_evaluation(self):
        ours, theirs = pair()
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(ours).eval()
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        torch.testing.assert_close(synced(x), theirs.eval()(x))

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_empty_batch(self, training):
        """As the plain modules take it, statistics included."""
        ours, theirs = (m.train(training) for m in pair())
        x = torch.zeros(0, 3, 16, 16, dtype=torch.float64)
        assert ours(x).shape == theirs(x).shape == (0, WIDTH, 4, 4)
        for (name, a), e in zip(
            ours.state_dict().items(), theirs.state_dict().values(), strict=True
        ):
            assert torch.equal(a.nan_to_num(7), e.nan_to_num(7)), name

    def test_channels_last(self):
        ours, theirs = (m.to(memory_format=torch.channels_last) for m in pair())
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        torch.testing.assert_close(ours(x.to(memory_format=torch.channels_last)), theirs(x))

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_uint8(self, training, backend, differentiate_module, check_agreement):
        ours, theirs = pair(mean=MEAN, std=STD, backend=backend)
        images = torch.randint(256, (2, 3, 11, 14), dtype=torch.uint8)
        actual = differentiate_module(ours.train(training), images)
        x = normalized(images, MEAN, STD)
        expected = differentiate_module(theirs.train(training), x)
        del expected["grad of input"]
        check_agreement([actual], [expected], [expected])
        assert_same_state(ours, theirs)

    def test_uint8_without_statistics(self):
        ours, theirs = pair()
        images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
        torch.testing.assert_close(ours(images), theirs(images.double() / 255))


class TestFromModule:
    def torchvision_stem(self, dtype=torch.float64):
        configs = [ConvStemConfig(c, 3, s) for c, s in zip(CHANNELS, (2, 2, 2), strict=True)]
        model = VisionTransformer(16, 8, 1, 1, WIDTH, 8, conv_stem_configs=configs)
        randomize(model.conv_proj)
        return model.conv_proj.to(dtype)

    @pytest.mark.parametrize("library", ["timm", "torchvision"])
    def test_shares_parameters_and_buffers(self, library):
        theirs = self.torchvision_stem() if library == "torchvision" else pair()[1]
        ours = ConvStem.from_module(theirs, flatten=False)
        assert isinstance(ours, ConvStem)
        mine, original = ([*m.parameters(), *m.buffers()] for m in (ours, theirs))
        assert len(mine) == len(original)
        assert all(a is b for a, b in zip(mine, original, strict=True))
        assert list(ours.state_dict()) == list(timm_stem().state_dict())

    @pytest.mark.parametrize("library", ["timm", "torchvision"])
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_numbers(self, library, training, differentiate_module):
        theirs = self.torchvision_stem() if library == "torchvision" else pair()[1]
        twin = copy.deepcopy(theirs.train(training))
        ours = ConvStem.from_module(theirs)
        assert ours.training == training
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        out = ours(x)
        expected = twin(x).flatten(2).transpose(1, 2)
        torch.testing.assert_close(out, expected)
        # What ours learned is in the module it came from.
        assert_same_state(theirs, twin)
        cotangent = torch.randn_like(out)
        out.backward(cotangent)
        expected.backward(cotangent)
        for mine, other in zip(theirs.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad)
        torch.testing.assert_close(theirs(x), twin(x))

    def test_plain_sequential(self):
        """A stem written by hand, with a norm of its own eps and momentum."""
        theirs = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1, bias=False),
            nn.BatchNorm2d(4, eps=0.1, momentum=None),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, 1, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 5, 1),
        ).double()
        randomize(theirs)
        twin = copy.deepcopy(theirs)
        ours = ConvStem.from_module(theirs, flatten=False)
        for _ in range(2):
            x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
            torch.testing.assert_close(ours(x), twin(x))
            assert_same_state(theirs, twin)

    def test_options(self):
        images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
        theirs = pair()[1].eval()
        taken = ConvStem.from_module(theirs, flatten=False, mean=MEAN, std=STD, backend="torch")
        torch.testing.assert_close(taken(images), theirs(normalized(images, MEAN, STD)))

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            pytest.param({0: nn.Conv2d(3, 4, 5, 2, 2, bias=False)}, "5", id="kernel_5"),
            pytest.param({0: nn.Conv2d(3, 4, 3, 2, 0, bias=False)}, "padding", id="no_padding"),
            pytest.param({0: nn.Conv2d(3, 4, 3, 2, 1)}, "bias", id="bias"),
            pytest.param({0: nn.Conv2d(3, 4, 3, 3, 1, bias=False)}, "stride", id="stride_3"),
            pytest.param(
                {0: nn.Conv2d(3, 4, 3, 2, 1, dilation=2, bias=False)}, "dilation", id="dilation"
            ),
            pytest.param({2: nn.GELU()}, "GELU", id="gelu"),
            pytest.param({1: nn.GroupNorm(2, 4)}, "GroupNorm", id="group_norm"),
            pytest.param({3: nn.Conv2d(4, 5, 1, bias=False)}, "bias", id="no_last_bias"),
            pytest.param({3: nn.Conv2d(4, 5, 3)}, "1x1|1 x 1|3", id="last_3x3"),
            pytest.param({3: nn.Identity()}, "Identity|1x1", id="no_last"),
        ],
    )
    def test_refuses_another_shape_and_says_where(self, change, said):
        layers = [
            nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1)
        ]  # fmt: skip
        for i, layer in change.items():
            layers[i] = layer
        with pytest.raises(TypeError, match=said):
            ConvStem.from_module(nn.Sequential(*layers))

    def test_refuses_timms_mobileclip_stem(self):
        """Same class, other kernels: (4, 2, 2) with GELU."""
        theirs = TimmConvStem(
            channels=(4, 4, 4),
            kernel_size=(4, 2, 2),
            stride=(4, 2, 2),
            padding=0,
            act_layer=nn.GELU,
        )
        with pytest.raises(TypeError):
            ConvStem.from_module(theirs)

    def test_refuses_a_linear_layer(self):
        with pytest.raises(TypeError, match="Linear"):
            ConvStem.from_module(nn.Linear(3, 3))


def test_reference_backend_is_the_reference_module():
    module = ConvStem(3, CHANNELS, STRIDES, WIDTH, backend="reference")
    oracle = fastvit.reference.ConvStem(3, CHANNELS, STRIDES, WIDTH)
    oracle.load_state_dict(module.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(module(x), oracle(x))
    assert_same_state(module, oracle)

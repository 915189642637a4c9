# SPDX-License-Identifier: Apache-2.0
"""Patch embedding against the dense formula in float64 and against timm's module."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed as TimmPatchEmbed
from torch import Tensor, nn

import fastvit
from fastvit import PatchEmbed
from fastvit.functional import patch_embed
from fastvit.testing import poisoned_allocations

BACKENDS = ["reference", "torch", None]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# 255 * 0.1 ends in a half, where a rounded centre of the uint8 fold may go either way.
MEAN, STD = (0.485, 0.1, 0.406, 0.9), (0.229, 0.224, 1.0, 0.05)

GEOMETRIES = [
    # batch, channels, image, patch
    pytest.param(2, 3, (64, 48), (16, 16), id="rgb_patch16"),
    pytest.param(2, 3, (64, 48), (16, 8), id="patch_16x8"),
    pytest.param(1, 3, (28, 42), (14, 14), id="patch14"),
    pytest.param(3, 1, (12, 20), (4, 4), id="grey"),
    pytest.param(2, 4, (12, 20), (4, 5), id="four_channels_odd_patch"),
    pytest.param(2, 3, (6, 6), (6, 6), id="one_patch"),
    pytest.param(2, 2, (3, 5), (1, 1), id="patch_of_one_pixel"),
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


def dense_patch_embed(
    images, weight, bias=None, pos_embed=None, cls_token=None, mean=None, std=None
):
    """The flattened patches times the flattened kernels, row by row of the grid."""
    x = normalized(images, mean, std, weight.dtype)
    batch, channels, height, width = x.shape
    ph, pw = weight.shape[2:]
    x = x.reshape(batch, channels, height // ph, ph, width // pw, pw)
    tokens = x.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2) @ weight.flatten(1).T
    if bias is not None:
        tokens = tokens + bias
    if pos_embed is not None and pos_embed.shape[1] == tokens.shape[1]:
        tokens = tokens + pos_embed
        pos_embed = None
    if cls_token is not None:
        tokens = torch.cat([cls_token.expand(batch, -1, -1), tokens], dim=1)
    return tokens if pos_embed is None else tokens + pos_embed


def problem(
    batch=2,
    channels=3,
    image=(12, 20),
    patch=(4, 5),
    dtype=torch.float32,
    *,
    width=10,
    seed=0,
    uint8=False,
) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    p = {
        "images": draw(batch, channels, *image),
        "weight": draw(width, channels, *patch) * (channels * patch[0] * patch[1]) ** -0.5,
        "bias": draw(width),
    }
    if uint8:
        shape = (batch, channels, *image)
        p["images"] = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        p |= {"mean": MEAN[:channels], "std": STD[:channels]}
    return p


@pytest.fixture(params=BACKENDS, ids=str)
def op(request):
    return partial(patch_embed, backend=request.param)


class TestFloatImages:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("batch", "channels", "image", "patch"), GEOMETRIES)
    def test_agrees_with_the_dense_formula(
        self, op, batch, channels, image, patch, dtype, check_numbers
    ):
        p = problem(batch, channels, image, patch, dtype)
        check_numbers(op, dense_patch_embed, [p])

    def test_without_bias(self, op, check_numbers):
        p = problem(dtype=torch.float64)
        del p["bias"]
        check_numbers(op, dense_patch_embed, [p])

    @pytest.mark.parametrize(
        "relayout",
        [
            pytest.param(lambda x: x.to(memory_format=torch.channels_last), id="channels_last"),
            pytest.param(lambda x: F.pad(x, (1, 2, 3, 1))[..., 3:-1, 1:-2], id="crop"),
            pytest.param(lambda x: torch.cat([x * 7, x])[x.shape[0] :], id="offset"),
            pytest.param(lambda x: x[:1].expand_as(x), id="expanded_batch"),
            pytest.param(lambda x: x[:, :1].expand_as(x), id="expanded_channels"),
            pytest.param(lambda x: x.mT.contiguous().mT, id="transposed"),
        ],
    )
    @pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
    def test_any_layout(self, op, relayout, uint8, check_numbers):
        p = problem(dtype=torch.float64, uint8=uint8)
        p["images"] = relayout(p["images"])
        check_numbers(op, dense_patch_embed, [p])

    def test_weight_in_channels_last(self, op, check_numbers):
        p = problem(dtype=torch.float64)
        p["weight"] = p["weight"].to(memory_format=torch.channels_last)
        check_numbers(op, dense_patch_embed, [p])

    @pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_batch_sizes(self, op, batch, uint8, check_numbers):
        check_numbers(op, dense_patch_embed, [problem(batch, dtype=torch.float64, uint8=uint8)])

    @pytest.mark.parametrize("wanted", ["images", "weight", "bias", "pos_embed", "cls_token"])
    def test_each_gradient_alone(self, op, wanted):
        p = problem(dtype=torch.float64)
        p |= {
            "pos_embed": torch.randn(1, 13, 10).double(),
            "cls_token": torch.randn(1, 1, 10).double(),
        }
        p[wanted].requires_grad_()
        op(**p).square().sum().backward()
        (expected,) = torch.autograd.grad(dense_patch_embed(**p).square().sum(), p[wanted])
        torch.testing.assert_close(p[wanted].grad, expected)
        assert all(x.grad is None for n, x in p.items() if n != wanted)

    def test_gradcheck(self, op):
        p = problem(1, 2, (4, 6), (2, 3), torch.float64, width=3)
        leaves = [p[n].requires_grad_() for n in ("images", "weight", "bias")]
        assert torch.autograd.gradcheck(lambda i, w, b: op(i, w, b), leaves)

    def test_second_derivatives_are_right_or_refused(self, op):
        p = problem(1, 2, (4, 6), (2, 3), torch.float64, width=3)
        leaves = [p[n].requires_grad_() for n in ("images", "weight", "bias")]

        def second(function):
            out = function(*leaves)
            first = torch.autograd.grad(out.pow(3).sum(), leaves, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

        try:
            actual = second(op)
        except RuntimeError as error:
            if "differentiated again" not in str(error):
                raise
            return
        for a, e in zip(actual, second(dense_patch_embed), strict=True):
            torch.testing.assert_close(a, e)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
    @pytest.mark.parametrize("name", ["images", "weight", "bias"])
    def test_nan_and_inf_go_through_as_in_the_formula(self, op, name, value):
        p = problem()
        p[name].view(-1)[1] = value
        torch.testing.assert_close(op(**p), dense_patch_embed(**p), equal_nan=True)

    @pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
    def test_repeats_bit_by_bit_on_poisoned_memory(self, op, uint8, differentiate):
        p = problem(uint8=uint8)
        p |= {"pos_embed": torch.randn(1, 13, 10), "cls_token": torch.randn(1, 1, 10)}
        first = differentiate(op, p)
        with poisoned_allocations():
            again = differentiate(op, p)
        for name, x in first.items():
            assert torch.equal(x, again[name]), name


class TestTokens:
    """The class token and the positions."""

    @pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        ("positions", "class_token"),
        [
            pytest.param(12, False, id="positions"),
            pytest.param(12, True, id="positions_of_the_patches_and_class_token"),
            pytest.param(13, True, id="positions_of_all_and_class_token"),
            pytest.param(None, True, id="class_token"),
        ],
    )
    def test_assembled(self, op, positions, class_token, dtype, uint8, check_numbers):
        p = problem(dtype=dtype, uint8=uint8)
        if positions:
            p["pos_embed"] = torch.randn(1, positions, 10).to(dtype)
        if class_token:
            p["cls_token"] = torch.randn(1, 1, 10).to(dtype)
        check_numbers(op, dense_patch_embed, [p])

    def test_one_patch_with_a_class_token(self, op):
        """N = 1 and N + 1 = 2: a position of one token is the patch's."""
        p = problem(image=(4, 5), dtype=torch.float64)
        cls = torch.randn(1, 1, 10, dtype=torch.float64)
        pos = torch.randn(1, 1, 10, dtype=torch.float64)
        out = op(**p, cls_token=cls, pos_embed=pos)
        torch.testing.assert_close(out[:, :1], cls.expand(2, -1, -1))
        torch.testing.assert_close(out[:, 1:], dense_patch_embed(**p) + pos)


class TestUint8:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("batch", "channels", "image", "patch"), GEOMETRIES)
    def test_agrees_with_normalising_first(
        self, op, batch, channels, image, patch, dtype, check_numbers
    ):
        """In bfloat16 too no worse than twice the error of normalising and convolving."""
        p = problem(batch, channels, image, patch, dtype, uint8=True)
        # The oracle is a product, and PyTorch's convolution adds up in an order of its own: 4.6
        # units in the last place of float32 where processors have AMX.
        check_numbers(op, dense_patch_embed, [p], floors={"output": 4 * torch.finfo(dtype).eps})

    def test_every_gradient_in_float32_to_1e_5(self, op, differentiate):
        """The folded bias depends on the weight; forgetting that is an error of 2.5e-3."""
        p = problem(4, 3, (64, 64), (16, 16), width=32, uint8=True)
        actual = differentiate(op, p)
        doubles = {n: x.double() if n in ("weight", "bias") else x for n, x in p.items()}
        expected = differentiate(dense_patch_embed, doubles)
        for name, x in expected.items():
            error = (actual[name].double() - x).abs().max() / x.abs().max()
            assert error < 1e-5, f"{name}: {error:.1e}"

    def test_weight_gradient_without_a_bias(self, op, check_numbers):
        p = problem(dtype=torch.float64, uint8=True)
        del p["bias"]
        check_numbers(op, dense_patch_embed, [p])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_without_statistics_255_is_one(self, op, dtype, check_numbers):
        p = problem(dtype=dtype, uint8=True)
        del p["mean"], p["std"]
        check_numbers(op, dense_patch_embed, [p])

    @pytest.mark.parametrize("level", [0, 255])
    def test_extreme_levels(self, op, level, check_numbers):
        p = problem(uint8=True)
        p["images"].fill_(level)
        check_numbers(op, dense_patch_embed, [p])

    def test_statistics_are_any_sequences(self, op):
        p = problem(uint8=True)
        expected = op(**p)
        p |= {"mean": list(p["mean"]), "std": list(p["std"])}
        assert torch.equal(op(**p), expected)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtype_is_the_weights(self, op, dtype):
        assert op(**problem(dtype=dtype, uint8=True)).dtype == dtype


class TestAutocast:
    @pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_op_runs_in_the_autocast_dtype(self, op, dtype, uint8, differentiate, check_agreement):
        p = problem(uint8=uint8)
        p |= {"pos_embed": torch.randn(1, 13, 10), "cls_token": torch.randn(1, 1, 10)}
        actual = differentiate(torch.autocast("cpu", dtype=dtype)(op), p)
        assert actual["output"].dtype == dtype
        rounded, doubles = (
            {n: x.to(t) if isinstance(x, Tensor) and n != "images" else x for n, x in p.items()}
            for t in (dtype, torch.float64)
        )
        if not uint8:
            rounded["images"], doubles["images"] = p["images"].to(dtype), p["images"].double()
        reference = differentiate(dense_patch_embed, rounded)
        for name in actual:
            if name != "output":
                assert actual[name].dtype == torch.float32, name
                actual[name] = actual[name].to(dtype)
        check_agreement([actual], [reference], [differentiate(dense_patch_embed, doubles)])

    def test_disabled_inside_enabled(self, op):
        p = problem()
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
            out = op(**p)
        assert torch.equal(out, op(**p))

    def test_half_images_meet_float32_weights(self, op):
        """As a data loader that casts early gives them."""
        p = problem()
        p["images"] = p["images"].bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            assert op(**p).dtype == torch.bfloat16


def pair(*, dtype=None, **options):
    """Our PatchEmbed and timm's with the same random parameters."""
    theirs = TimmPatchEmbed(**options, dtype=dtype)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    ours = PatchEmbed(**options, dtype=dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


FORMATS = [
    pytest.param({}, id="flatten"),
    pytest.param({"flatten": False}, id="no_flatten"),
    pytest.param({"output_fmt": "NCHW"}, id="NCHW"),
    pytest.param({"output_fmt": "NHWC"}, id="NHWC"),
    pytest.param({"output_fmt": "NCL"}, id="NCL"),
    pytest.param({"output_fmt": "NLC"}, id="NLC"),
    pytest.param({"output_fmt": "NHWC", "flatten": True}, id="NHWC_over_flatten"),
]
SIZES = [
    pytest.param({}, (24, 36), id="strict"),
    pytest.param({"strict_img_size": False}, (12, 48), id="other_size"),
    pytest.param({"strict_img_size": False, "dynamic_img_pad": True}, (13, 40), id="padded"),
    pytest.param({"strict_img_size": False, "dynamic_img_pad": True}, (12, 12), id="pad_nothing"),
    pytest.param({"dynamic_img_pad": True}, (24, 36), id="strict_and_pad"),
    pytest.param({"img_size": None}, (12, 24), id="any_size"),
    pytest.param({"img_size": None, "dynamic_img_pad": True}, (1, 1), id="any_size_padded"),
]


class TestAsTimm:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize(("size", "image"), SIZES)
    def test_formats_and_sizes(self, form, size, image, differentiate_module, check_agreement):
        options = {"img_size": (24, 36), "patch_size": (6, 4), "in_chans": 2, "embed_dim": 5}
        ours, theirs = pair(**{**options, **form, **size}, dtype=torch.float64)
        x = torch.randn(2, 2, *image, dtype=torch.float64)
        actual, expected = differentiate_module(ours, x), differentiate_module(theirs, x)
        assert actual["output"].shape == expected["output"].shape
        check_agreement([actual], [expected], [expected])

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
    @pytest.mark.parametrize("form", [{}, {"output_fmt": "NHWC"}], ids=["flatten", "NHWC"])
    def test_norm(self, form, bias, dtype, backend, differentiate_module, check_agreement):
        ours, theirs = pair(
            img_size=24,
            patch_size=8,
            embed_dim=6,
            norm_layer=nn.LayerNorm,
            bias=bias,
            **form,
            dtype=dtype,
        )
        x = torch.randn(2, 3, 24, 24).to(dtype)
        with fastvit.backend(backend or "auto"):
            actual = differentiate_module(ours, x)
        check_agreement(
            [actual],
            [differentiate_module(theirs, x)],
            [differentiate_module(copy.deepcopy(theirs).double(), x.double())],
        )

    def test_channels_last(self):
        ours, theirs = pair(img_size=24, patch_size=8, embed_dim=6, dtype=torch.float64)
        ours, theirs = (m.to(memory_format=torch.channels_last) for m in (ours, theirs))
        x = torch.randn(2, 3, 24, 24).double().to(memory_format=torch.channels_last)
        torch.testing.assert_close(ours(x), theirs(x))

    @pytest.mark.parametrize(
        "options", [{}, {"bias": False}, {"norm_layer": nn.LayerNorm}], ids=str
    )
    def test_keys_both_ways(self, options):
        ours = PatchEmbed(32, 8, **options, mean=(0.5,) * 3, std=(0.5,) * 3)
        theirs = TimmPatchEmbed(32, 8, **options)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert not list(ours.named_buffers())

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"img_size": (48, 32), "patch_size": (16, 8)},
            {"img_size": None},
            {"img_size": 30, "patch_size": 8},
            {"output_fmt": "NHWC"},
            {"flatten": False, "strict_img_size": False},
            {"dynamic_img_pad": True},
        ],
        ids=str,
    )
    def test_attributes(self, options):
        ours, theirs = PatchEmbed(**options), TimmPatchEmbed(**options)
        for name in (
            "img_size", "patch_size", "grid_size", "num_patches", "flatten", "output_fmt",
            "strict_img_size", "dynamic_img_pad",
        ):  # fmt: skip
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours.feat_ratio() == theirs.feat_ratio()
        assert ours.feat_ratio(as_scalar=False) == theirs.feat_ratio(as_scalar=False)
        assert ours.dynamic_feat_size((50, 40)) == theirs.dynamic_feat_size((50, 40))

    def test_positional_arguments(self):
        arguments = (
            32, 8, 4, 6, nn.LayerNorm, False, "NHWC", False, False, True, "cpu", torch.float64
        )  # fmt: skip
        ours, theirs = PatchEmbed(*arguments), TimmPatchEmbed(*arguments)
        assert ours.proj.weight.shape == theirs.proj.weight.shape == (6, 4, 8, 8)
        assert ours.proj.bias is theirs.proj.bias is None
        assert ours.dynamic_img_pad
        assert not ours.strict_img_size
        assert ours.proj.weight.dtype == ours.norm.weight.dtype == torch.float64


class TestSetInputSize:
    @pytest.mark.parametrize(
        ("old", "new"),
        [(16, 8), (8, 16), (16, (8, 12)), (4, 6), ((6, 4), (4, 6))],
        ids=["down", "up", "rectangle", "a_half_more", "turned"],
    )
    def test_patch_size_as_timm_resamples(self, old, new):
        ours, theirs = pair(img_size=48, patch_size=old, embed_dim=6)
        ours.proj.weight.requires_grad_(False)
        theirs.proj.weight.requires_grad_(False)
        ours.set_input_size(patch_size=new)
        theirs.set_input_size(patch_size=new)
        # timm inverts the resize in float32, whose rounding 1e-4 covers.
        torch.testing.assert_close(ours.proj.weight, theirs.proj.weight, rtol=1e-4, atol=1e-4)
        assert torch.equal(ours.proj.bias, theirs.proj.bias)
        assert not ours.proj.weight.requires_grad
        assert ours.proj.bias.requires_grad
        for name in ("img_size", "patch_size", "grid_size", "num_patches"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours(torch.randn(1, 3, 48, 48)).shape == (1, ours.num_patches, 6)

    def test_image_size_alone(self):
        ours, theirs = pair(img_size=48, patch_size=8, embed_dim=6, dtype=torch.float64)
        weight = ours.proj.weight
        for module in (ours, theirs):
            module.set_input_size((64, 32))
        assert ours.proj.weight is weight
        assert ours.grid_size == theirs.grid_size == (8, 4)
        assert ours.num_patches == theirs.num_patches == 32
        x = torch.randn(1, 3, 64, 32, dtype=torch.float64)
        torch.testing.assert_close(ours(x), theirs(x))

    def test_both_at_once(self):
        ours, theirs = pair(img_size=48, patch_size=8, embed_dim=6)
        for module in (ours, theirs):
            module.set_input_size(img_size=64, patch_size=16)
        assert ours.grid_size == theirs.grid_size == (4, 4)
        assert ours.img_size == theirs.img_size == (64, 64)

    def test_resampled_kernels_see_the_same_flat_image(self):
        """A constant image gives the same token, whatever the patch size."""
        module = PatchEmbed(48, 16, embed_dim=6)
        x = torch.ones(1, 3, 48, 48)
        before = module(x)[:, :1]
        module.set_input_size(patch_size=24)
        torch.testing.assert_close(module(x)[:, :1], before, rtol=1e-3, atol=1e-3)


class TestUint8Module:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("form", FORMATS)
    def test_is_normalising_first(self, form, backend, differentiate_module, check_agreement):
        options = {"img_size": 24, "patch_size": 8, "embed_dim": 6, "dtype": torch.float64, **form}
        module = PatchEmbed(**options, mean=MEAN[:3], std=STD[:3], backend=backend)
        plain = TimmPatchEmbed(**options)
        plain.load_state_dict(module.state_dict())
        images = torch.randint(256, (2, 3, 24, 24), dtype=torch.uint8)
        expected = differentiate_module(plain, normalized(images, MEAN[:3], STD[:3]))
        del expected["grad of input"]
        check_agreement([differentiate_module(module, images)], [expected], [expected])

    @pytest.mark.parametrize("statistics", [True, False], ids=["statistics", "none"])
    def test_padding_is_zero_of_the_normalised_image(
        self, statistics, differentiate_module, check_agreement
    ):
        """Not a black pixel: 0 would normalise to -mean / std."""
        mean, std = (MEAN[:3], STD[:3]) if statistics else (None, None)
        options = {
            "img_size": None, "patch_size": (8, 6), "embed_dim": 6, "dynamic_img_pad": True,
            "dtype": torch.float64,
        }  # fmt: skip
        module = PatchEmbed(**options, mean=mean, std=std)
        plain = TimmPatchEmbed(**options)
        plain.load_state_dict(module.state_dict())
        images = torch.randint(256, (2, 3, 19, 20), dtype=torch.uint8)
        expected = differentiate_module(plain, normalized(images, mean, std))
        del expected["grad of input"]
        check_agreement([differentiate_module(module, images)], [expected], [expected])

    def test_float_images_of_a_module_with_statistics_are_taken_as_they_are(self):
        """Or refused: never normalised twice in silence."""
        module = PatchEmbed(24, 8, embed_dim=6, mean=MEAN[:3], std=STD[:3])
        plain = PatchEmbed(24, 8, embed_dim=6)
        plain.load_state_dict(module.state_dict())
        x = torch.randn(2, 3, 24, 24)
        try:
            out = module(x)
        except ValueError as error:
            if "mean" not in str(error):
                raise
        else:
            assert torch.equal(out, plain(x))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_dtype_is_the_weights(self, dtype):
        module = PatchEmbed(24, 8, embed_dim=6, dtype=dtype)
        images = torch.randint(256, (2, 3, 24, 24), dtype=torch.uint8)
        assert module(images).dtype == dtype


def test_reference_backend_is_the_reference_module():
    module = PatchEmbed(24, 8, embed_dim=6, backend="reference")
    oracle = fastvit.reference.PatchEmbed(24, 8, embed_dim=6)
    oracle.load_state_dict(module.state_dict())
    x = torch.randn(2, 3, 24, 24)
    assert torch.equal(module(x), oracle(x))

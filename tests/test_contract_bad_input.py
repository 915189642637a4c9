# SPDX-License-Identifier: Apache-2.0
"""Every mistake is refused before anything runs or changes, by a message that names the argument,
what was expected and what came.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit import GPSA, MHSA, ConvStem, PatchEmbed
from fastvit.functional import ConvStage, attention, conv_stem, gpsa_attention, patch_embed

BACKENDS = ["reference", "torch", None]


def refused(call: Callable[[], object], error: type | tuple[type, ...], *words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    # Not a subclass that some library below us raised by accident.
    assert type(caught.value) in (error if isinstance(error, tuple) else (error,))
    message = str(caught.value)
    missing = [word for word in words if word.lower() not in message.lower()]
    assert not missing, f"{missing} not in {message!r}"


def gpsa_arguments(**changes) -> dict[str, object]:
    q = torch.randn(2, 3, 12, 8)
    arguments = {
        "q": q, "k": q, "v": q, "pos_weight": torch.randn(3, 3), "gating_param": torch.randn(3),
        "grid_size": (3, 4),
    }  # fmt: skip
    return arguments | changes


def embed_arguments(**changes) -> dict[str, object]:
    arguments = {
        "images": torch.randn(2, 3, 8, 12), "weight": torch.randn(5, 3, 4, 4),
        "bias": torch.randn(5),
    }  # fmt: skip
    return arguments | changes


def stage(in_chans=3, width=4, stride=2, **changes) -> ConvStage:
    """Its parameters in the order of the fields, on the running statistics of a new norm."""
    tensors = (torch.randn(width, in_chans, 3, 3), torch.ones(width), torch.zeros(width))
    return ConvStage(*tensors, torch.zeros(width), torch.ones(width), stride)._replace(**changes)


def stem_arguments(**changes) -> dict[str, object]:
    arguments = {
        "x": torch.randn(2, 3, 8, 8), "stages": [stage(), stage(4, 6)],
        "proj_weight": torch.randn(5, 6, 1, 1), "proj_bias": torch.randn(5),
    }  # fmt: skip
    return arguments | changes


UINT8 = torch.zeros(2, 3, 8, 12, dtype=torch.uint8)
STATISTICS = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
LONG = torch.zeros(2, 3, 12, 8, dtype=torch.long)

GPSA_CASES = [
    # changes, error, words of the message
    pytest.param({"q": torch.randn(3, 12, 8)}, ValueError, ["q", "(3, 12, 8)"], id="q_of_rank_3"),
    pytest.param(
        {"k": torch.randn(2, 3, 11, 8)}, ValueError, ["k", "(2, 3, 11, 8)"], id="k_tokens"
    ),
    pytest.param({"k": torch.randn(2, 3, 12, 9)}, ValueError, ["k", "(2, 3, 12, 9)"], id="k_dim"),
    pytest.param({"v": torch.randn(2, 4, 12, 8)}, ValueError, ["v", "(2, 4, 12, 8)"], id="v_heads"),
    pytest.param({"v": torch.randn(1, 3, 12, 8)}, ValueError, ["v", "(1, 3, 12, 8)"], id="v_batch"),
    pytest.param(
        {"k": torch.randn(2, 3, 12, 8).double()},
        TypeError,
        ["k", "float32", "float64"],
        id="k_dtype",
    ),
    pytest.param(
        {"v": torch.empty(2, 3, 12, 8, device="meta")},
        ValueError,
        ["v", "cpu", "meta"],
        id="v_device",
    ),
    pytest.param(
        {"pos_weight": torch.empty(3, 3, device="meta")},
        ValueError,
        ["pos_weight", "cpu", "meta"],
        id="pos_weight_device",
    ),
    pytest.param(
        {"q": LONG, "k": LONG, "v": LONG}, TypeError, ["q", "float", "int64"], id="integers"
    ),
    pytest.param(
        {"pos_weight": torch.zeros(3, 3).long()},
        TypeError,
        ["pos_weight", "float", "int64"],
        id="integer_pos_weight",
    ),
    pytest.param(
        {"gating_param": torch.ones(3).bool()},
        TypeError,
        ["gating_param", "float", "bool"],
        id="boolean_gate",
    ),
    pytest.param(
        {"pos_weight": torch.randn(3, 2)},
        ValueError,
        ["pos_weight", "(3, 3)", "(3, 2)"],
        id="pos_weight_channels",
    ),
    pytest.param(
        {"pos_weight": torch.randn(2, 3)},
        ValueError,
        ["pos_weight", "(3, 3)", "(2, 3)"],
        id="pos_weight_heads",
    ),
    pytest.param(
        {"gating_param": torch.randn(1, 3, 1, 1)},
        ValueError,
        ["gating_param", "(3,)", "(1, 3, 1, 1)"],
        id="gate_of_rank_4",
    ),
    pytest.param(
        {"gating_param": torch.randn(4)}, ValueError, ["gating_param", "(3,)"], id="gates"
    ),
    pytest.param({"grid_size": (3, 5)}, ValueError, ["grid_size", "12", "15"], id="grid_product"),
    pytest.param(
        {"grid_size": (-3, -4)}, ValueError, ["grid_size", "(-3, -4)"], id="negative_grid"
    ),
    pytest.param({"grid_size": (0, 12)}, ValueError, ["grid_size", "(0, 12)"], id="grid_of_zero"),
    pytest.param({"grid_size": (12,)}, ValueError, ["grid_size", "(12,)"], id="grid_of_one"),
    pytest.param(
        {"grid_size": (3, 2, 2)}, ValueError, ["grid_size", "(3, 2, 2)"], id="grid_of_three"
    ),
    pytest.param(
        {"grid_size": (3.0, 4.0)},
        (TypeError, ValueError),
        ["grid_size", "int", "3.0"],
        id="grid_of_floats",
    ),
    pytest.param(
        {"grid_size": 12}, (TypeError, ValueError), ["grid_size", "12"], id="grid_a_number"
    ),
    pytest.param({"grid_size": None}, (TypeError, ValueError), ["grid_size", "None"], id="no_grid"),
    pytest.param(
        {"dropout_p": 1.5}, ValueError, ["dropout_p", "[0, 1]", "1.5"], id="dropout_above_1"
    ),
    pytest.param({"dropout_p": -0.1}, ValueError, ["dropout_p", "-0.1"], id="negative_dropout"),
    pytest.param({"dropout_p": float("nan")}, ValueError, ["dropout_p", "nan"], id="dropout_nan"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("changes", "error", "words"), GPSA_CASES)
def test_gpsa_attention(changes, error, words, backend):
    arguments = gpsa_arguments(**changes)
    refused(lambda: gpsa_attention(**arguments, backend=backend), error, *words)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        pytest.param({"q": torch.randn(3, 12, 8)}, ValueError, ["q", "(3, 12, 8)"], id="rank"),
        pytest.param({"k": torch.randn(2, 3, 11, 8)}, ValueError, ["k", "(2, 3, 11, 8)"], id="k"),
        pytest.param({"v": torch.randn(2, 3, 12, 9)}, ValueError, ["v", "(2, 3, 12, 9)"], id="v"),
        pytest.param(
            {"v": torch.randn(2, 3, 12, 8).half()}, TypeError, ["v", "float16"], id="dtype"
        ),
        pytest.param({"q": LONG, "k": LONG, "v": LONG}, TypeError, ["q", "int64"], id="integers"),
        pytest.param({"dropout_p": 2}, ValueError, ["dropout_p", "[0, 1]", "2"], id="dropout"),
    ],
)
def test_attention(changes, error, words, backend):
    q = torch.randn(2, 3, 12, 8)
    arguments = {"q": q, "k": q, "v": q} | changes
    refused(lambda: attention(**arguments, backend=backend), error, *words)


EMBED_CASES = [
    pytest.param(
        {"images": torch.randn(3, 8, 12)}, ValueError, ["images", "(3, 8, 12)"], id="rank"
    ),
    pytest.param(
        {"images": torch.randn(2, 4, 8, 12)},
        ValueError,
        ["images", "channels", "3", "4"],
        id="channels",
    ),
    pytest.param(
        {"images": torch.randn(2, 3, 9, 12)}, ValueError, ["9", "4"], id="height_and_patch"
    ),
    pytest.param(
        {"images": torch.randn(2, 3, 8, 10)}, ValueError, ["10", "4"], id="width_and_patch"
    ),
    pytest.param(
        {"images": torch.randn(2, 3, 2, 2)}, ValueError, ["images", "4"], id="smaller_than_a_patch"
    ),
    pytest.param(
        {"images": torch.zeros(2, 3, 8, 12).int()},
        TypeError,
        ["images", "uint8", "int32"],
        id="integer_images",
    ),
    pytest.param(
        {"images": torch.randn(2, 3, 8, 12).double()},
        TypeError,
        ["images", "float32", "float64"],
        id="other_dtype",
    ),
    pytest.param(
        {"images": torch.empty(2, 3, 8, 12, device="meta")},
        ValueError,
        ["cpu", "meta"],
        id="device",
    ),
    pytest.param(
        {"weight": torch.randn(5, 48)}, ValueError, ["weight", "(5, 48)"], id="weight_rank"
    ),
    pytest.param(
        {"weight": torch.zeros(5, 3, 4, 4).long()},
        TypeError,
        ["weight", "int64"],
        id="weight_dtype",
    ),
    pytest.param({"bias": torch.randn(6)}, ValueError, ["bias", "(5,)", "(6,)"], id="bias"),
    pytest.param(
        {"pos_embed": torch.randn(1, 5, 5)},
        ValueError,
        ["pos_embed", "6", "5"],
        id="short_positions",
    ),
    pytest.param(
        {"pos_embed": torch.randn(1, 7, 5)},
        ValueError,
        ["pos_embed", "6", "7"],
        id="positions_for_a_missing_class_token",
    ),
    pytest.param(
        {"pos_embed": torch.randn(1, 8, 5), "cls_token": torch.randn(1, 1, 5)},
        ValueError,
        ["pos_embed", "6", "7", "8"],
        id="long_positions",
    ),
    pytest.param(
        {"pos_embed": torch.randn(1, 6, 4)},
        ValueError,
        ["pos_embed", "5", "4"],
        id="position_width",
    ),
    pytest.param(
        {"pos_embed": torch.randn(6, 5)}, ValueError, ["pos_embed", "(6, 5)"], id="position_rank"
    ),
    pytest.param(
        {"cls_token": torch.randn(1, 5)},
        ValueError,
        ["cls_token", "(1, 1, 5)", "(1, 5)"],
        id="class_rank",
    ),
    pytest.param(
        {"cls_token": torch.randn(1, 2, 5)},
        ValueError,
        ["cls_token", "(1, 1, 5)", "(1, 2, 5)"],
        id="two_class_tokens",
    ),
    pytest.param(STATISTICS, ValueError, ["mean", "uint8", "float32"], id="statistics_of_floats"),
    pytest.param({"mean": (0.5,) * 3}, ValueError, ["mean"], id="mean_of_floats"),
    pytest.param(
        {"images": UINT8, "mean": (0.5,) * 3}, ValueError, ["std", "None"], id="mean_without_std"
    ),
    pytest.param(
        {"images": UINT8, "std": (0.5,) * 3}, ValueError, ["mean", "None"], id="std_without_mean"
    ),
    pytest.param(
        {"images": UINT8, "mean": (0.5,) * 2, "std": (0.5,) * 3},
        ValueError,
        ["mean", "3", "(0.5, 0.5)"],
        id="two_means",
    ),
    pytest.param(
        {"images": UINT8, "mean": (0.5,) * 3, "std": (0.5,) * 4},
        ValueError,
        ["std", "3", "(0.5, 0.5, 0.5, 0.5)"],
        id="four_stds",
    ),
    pytest.param(
        {"images": UINT8, "mean": (0.5,) * 3, "std": (0.5, 0.0, 0.5)},
        ValueError,
        ["std", "0"],
        id="std_of_zero",
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("changes", "error", "words"), EMBED_CASES)
def test_patch_embed(changes, error, words, backend):
    arguments = embed_arguments(**changes)
    refused(lambda: patch_embed(**arguments, backend=backend), error, *words)


STEM_CASES = [
    pytest.param({"x": torch.randn(3, 8, 8)}, ValueError, ["x", "(3, 8, 8)"], id="rank"),
    pytest.param({"x": torch.randn(2, 4, 8, 8)}, ValueError, ["channels", "3", "4"], id="channels"),
    pytest.param({"x": torch.zeros(2, 3, 8, 8).long()}, TypeError, ["x", "int64"], id="integers"),
    pytest.param(
        {"x": torch.randn(2, 3, 8, 8).double()}, TypeError, ["x", "float32", "float64"], id="dtype"
    ),
    pytest.param(
        {"stages": [stage(stride=3), stage(4, 6)]}, ValueError, ["stride", "3"], id="stride_3"
    ),
    pytest.param(
        {"stages": [stage(stride=0), stage(4, 6)]}, ValueError, ["stride", "0"], id="stride_0"
    ),
    pytest.param(
        {"stages": [stage(), stage(5, 6)]},
        ValueError,
        ["stages[1]", "weight", "4", "5"],
        id="stages_that_do_not_fit",
    ),
    pytest.param(
        {"stages": [stage(weight=torch.randn(4, 3, 5, 5)), stage(4, 6)]},
        ValueError,
        ["stages[0]", "weight", "(4, 3, 5, 5)"],
        id="kernel_5",
    ),
    pytest.param(
        {"stages": [stage(), stage(4, 6, bn_weight=torch.ones(5))]},
        ValueError,
        ["stages[1]", "bn_weight", "(6,)", "(5,)"],
        id="bn_weight",
    ),
    pytest.param(
        {"stages": [stage(running_var=torch.ones(5)), stage(4, 6)]},
        ValueError,
        ["stages[0]", "running_var", "(4,)", "(5,)"],
        id="running_var",
    ),
    pytest.param(
        {"proj_weight": torch.randn(5, 7, 1, 1)},
        ValueError,
        ["proj_weight", "6", "7"],
        id="proj_channels",
    ),
    pytest.param(
        {"proj_weight": torch.randn(5, 6, 3, 3)},
        ValueError,
        ["proj_weight", "(5, 6, 3, 3)"],
        id="proj_kernel",
    ),
    pytest.param(
        {"proj_bias": torch.randn(6)}, ValueError, ["proj_bias", "(5,)", "(6,)"], id="bias"
    ),
    pytest.param(
        {"pos_embed": torch.randn(1, 5, 5)}, ValueError, ["pos_embed", "4", "5"], id="positions"
    ),
    pytest.param(
        {"cls_token": torch.randn(1, 1, 6)},
        ValueError,
        ["cls_token", "(1, 1, 5)", "(1, 1, 6)"],
        id="class_token",
    ),
    pytest.param(STATISTICS, ValueError, ["mean", "uint8"], id="statistics_of_floats"),
    pytest.param(
        {"x": UINT8, "mean": (0.5,) * 3, "std": (0.5,) * 2},
        ValueError,
        ["std", "3", "(0.5, 0.5)"],
        id="stds",
    ),
    pytest.param(
        {"x": UINT8, "mean": (0.5,) * 3, "std": (0, 1, 1)},
        ValueError,
        ["std", "0"],
        id="std_of_zero",
    ),
    pytest.param({"momentum": "0.1"}, TypeError, ["momentum", "'0.1'"], id="momentum"),
    pytest.param(
        {"momentum": torch.tensor(1)}, TypeError, ["momentum", "int64"], id="momentum_dtype"
    ),
    pytest.param(
        {"momentum": torch.rand(3)}, ValueError, ["momentum", "(3,)"], id="momentum_shape"
    ),
    pytest.param(
        {"process_group": 0}, TypeError, ["process_group", "ProcessGroup", "0"], id="process_group"
    ),
    pytest.param(
        {"x": torch.randn(1, 3, 4, 4), "training": True},
        ValueError,
        ["x", "one value per channel", "(1, 3, 4, 4)"],
        id="one_value_per_channel",
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("changes", "error", "words"), STEM_CASES)
def test_conv_stem(changes, error, words, backend):
    arguments = stem_arguments(**changes)
    before = copy.deepcopy(arguments["stages"])
    refused(lambda: conv_stem(**arguments, backend=backend), error, *words)
    # The first stage of a stem whose second is refused has not moved its statistics.
    for s, b in zip(arguments["stages"], before, strict=True):
        assert torch.equal(s.running_mean, b.running_mean)
        assert torch.equal(s.running_var, b.running_var)


class TestModules:
    @pytest.mark.parametrize("layer", [GPSA, MHSA])
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            pytest.param({"dim": 25, "num_heads": 4}, ["dim", "num_heads", "25", "4"], id="width"),
            pytest.param({"dim": 24, "num_heads": 0}, ["num_heads", "0"], id="no_heads"),
            pytest.param({"dim": 24, "attn_drop": 1.5}, ["attn_drop", "1.5"], id="attn_drop"),
            pytest.param({"dim": 24, "proj_drop": -1.0}, ["proj_drop", "-1"], id="proj_drop"),
        ],
    )
    def test_attention_layers(self, layer, arguments, words):
        refused(lambda: layer(**arguments), ValueError, *words)

    @pytest.mark.parametrize("grid", [(0, 4), (4,), (-4, -4), (2, 2, 4)], ids=str)
    def test_gpsa_grid(self, grid):
        """At construction or at the first call, but never as a broken shape below."""
        x = torch.randn(1, 16, 24)
        refused(lambda: GPSA(24, 4, grid_size=grid)(x), ValueError, "grid_size")

    @pytest.mark.parametrize("method", ["forward", "get_attention", "get_attention_map"])
    def test_gpsa_needs_a_grid_for_tokens_that_are_no_square(self, method):
        module = GPSA(24, 4)
        call = getattr(module, method)
        refused(lambda: call(torch.randn(1, 12, 24)), ValueError, "12", "square", "grid_size")

    def test_rel_indices_need_a_grid_for_tokens_that_are_no_square(self):
        refused(lambda: GPSA(24, 4).get_rel_indices(12), ValueError, "12", "square", "grid_size")

    @pytest.mark.parametrize("tokens", [15, 17])
    def test_gpsa_with_the_grid_of_other_tokens(self, tokens):
        """17: a class token that was put before the patches too early."""
        module = GPSA(24, 4, grid_size=(4, 4))
        x = torch.randn(1, tokens, 24)
        refused(lambda: module(x), ValueError, "grid_size", "16", str(tokens))

    def test_gpsa_grid_of_the_call(self):
        module, x = GPSA(24, 4), torch.randn(1, 16, 24)
        refused(lambda: module(x, grid_size=(3, 5)), ValueError, "grid_size", "15", "16")

    @pytest.mark.parametrize("layer", [GPSA, MHSA])
    @pytest.mark.parametrize("shape", [(16, 24), (1, 4, 4, 24), (1, 16, 25)], ids=str)
    def test_attention_input_of_the_wrong_shape(self, layer, shape):
        module = layer(24, 4)
        refused(lambda: module(torch.randn(shape)), ValueError, "x", "24", str(shape))

    @pytest.mark.parametrize("layer", [GPSA, MHSA])
    def test_attention_input_of_integers(self, layer):
        module, x = layer(24, 4), torch.ones(1, 16, 24, dtype=torch.long)
        refused(lambda: module(x), TypeError, "x", "float", "int64")

    def test_mhsa_map_of_tokens_that_are_no_square(self):
        module = MHSA(24, 4)
        refused(lambda: module.get_attention_map(torch.randn(1, 12, 24)), ValueError, "12")

    @pytest.mark.parametrize(
        ("options", "image", "words"),
        [
            pytest.param({}, (24, 16), ["24", "16"], id="strict_size"),
            pytest.param({}, (16, 24), ["24", "16"], id="strict_width"),
            pytest.param(
                {"strict_img_size": False}, (18, 16), ["18", "8"], id="indivisible_height"
            ),
            pytest.param({"strict_img_size": False}, (16, 18), ["18", "8"], id="indivisible_width"),
            pytest.param({"img_size": None}, (16, 18), ["18", "8"], id="indivisible_any_size"),
        ],
    )
    def test_patch_embed_sizes(self, options, image, words):
        module = PatchEmbed(**{"img_size": 16, "patch_size": 8, "embed_dim": 4, **options})
        refused(lambda: module(torch.randn(1, 3, *image)), ValueError, *words)

    @pytest.mark.parametrize("layer", [PatchEmbed, ConvStem])
    def test_image_channels(self, layer):
        module = layer(in_chans=3).eval()
        images = torch.randn(1, 4, 224, 224)
        refused(lambda: module(images), ValueError, "channels", "3", "4")

    @pytest.mark.parametrize("layer", [PatchEmbed, ConvStem])
    @pytest.mark.parametrize("images", [torch.zeros(1, 3, 224, 224).int()], ids=["int32"])
    def test_integer_images(self, layer, images):
        refused(lambda: layer()(images), TypeError, "uint8", "int32")

    @pytest.mark.parametrize("layer", [PatchEmbed, ConvStem])
    def test_image_without_a_batch(self, layer):
        refused(lambda: layer()(torch.randn(3, 224, 224)), ValueError, "(3, 224, 224)")

    @pytest.mark.parametrize("layer", [PatchEmbed, ConvStem])
    @pytest.mark.parametrize(
        ("statistics", "words"),
        [
            pytest.param(
                {"mean": (0.5,) * 2, "std": (0.5,) * 3}, ["mean", "3", "(0.5, 0.5)"], id="means"
            ),
            pytest.param({"mean": (0.5,) * 3, "std": (0.5,)}, ["std", "3", "(0.5,)"], id="stds"),
            pytest.param({"mean": (0.5,) * 3, "std": (1, 0, 1)}, ["std", "0"], id="std_of_zero"),
            pytest.param({"mean": (0.5,) * 3}, ["std", "None"], id="mean_alone"),
        ],
    )
    def test_statistics(self, layer, statistics, words):
        """At construction, or at the first image of bytes."""
        images = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
        refused(lambda: layer(**statistics)(images), ValueError, *words)

    def test_patch_embed_format(self):
        refused(lambda: PatchEmbed(output_fmt="NHCW"), ValueError, "output_fmt", "NHCW", "NHWC")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            pytest.param({"channels": (4, 6)}, ["channels", "strides", "2", "4"], id="lengths"),
            pytest.param({"strides": (2, 2)}, ["channels", "strides", "4", "2"], id="few_strides"),
            pytest.param({"strides": (2, 2, 3, 2)}, ["stride", "3"], id="stride_3"),
        ],
    )
    def test_conv_stem_arguments(self, arguments, words):
        refused(lambda: ConvStem(**arguments), ValueError, *words)

    def test_conv_stem_trained_on_one_value_per_channel(self):
        """Found before the first norm has moved its statistics."""
        module = ConvStem(3, (4, 6), (2, 2), 5)
        before = copy.deepcopy(module.state_dict())
        x = torch.randn(1, 3, 4, 4)
        refused(lambda: module(x), ValueError, "one value per channel", "(1, 3, 4, 4)")
        assert all(torch.equal(module.state_dict()[n], b) for n, b in before.items())
        assert module.eval()(x).shape == (1, 1, 5)


def call_gpsa(backend, dtype=torch.float32) -> Tensor:
    arguments = gpsa_arguments()
    arguments |= {n: x.to(dtype) for n, x in arguments.items() if isinstance(x, Tensor)}
    return gpsa_attention(**arguments, backend=backend)


CALLS = {
    "gpsa_attention": call_gpsa,
    "attention": lambda backend: attention(*torch.randn(3, 2, 3, 12, 8), backend=backend),
    "patch_embed": lambda backend: patch_embed(**embed_arguments(), backend=backend),
    "conv_stem": lambda backend: conv_stem(**stem_arguments(), backend=backend),
    "GPSA": lambda backend: GPSA(24, 4, backend=backend)(torch.randn(1, 16, 24)),
    "MHSA": lambda backend: MHSA(24, 4, backend=backend)(torch.randn(1, 16, 24)),
    "PatchEmbed": lambda backend: PatchEmbed(8, 4, backend=backend)(torch.randn(1, 3, 8, 8)),
    "ConvStem": lambda backend: ConvStem(backend=backend)(torch.randn(2, 3, 32, 32)),
}
# The native backend is for the patch embedding.
NOT_NATIVE = [name for name in CALLS if "embed" not in name.lower()]


class TestBackends:
    @pytest.mark.parametrize("name", CALLS)
    def test_unknown(self, name):
        refused(lambda: CALLS[name]("refrence"), ValueError, "backend", "refrence", "reference")

    def test_unknown_to_set_backend(self, auto_backend):
        """And the one that was set stays."""
        fastvit.set_backend("reference")
        refused(lambda: fastvit.set_backend("troch"), ValueError, "troch", "torch")
        refused(lambda: fastvit.backend("tritn").__enter__(), ValueError, "tritn", "triton")
        # Only the reference serves dropout, so this shows which one runs.
        gpsa_attention(**gpsa_arguments(dropout_p=0.5))

    def test_every_name_is_told_where_none_is_near(self, auto_backend):
        refused(lambda: fastvit.set_backend("xyz"), ValueError, "xyz", "auto", "torch")

    @pytest.mark.parametrize("name", NOT_NATIVE)
    def test_native_has_the_patch_embedding_only(self, name):
        refused(lambda: CALLS[name]("native"), RuntimeError, "native", "auto")

    def test_triton_has_no_float64(self):
        refused(lambda: call_gpsa("triton", torch.float64), RuntimeError, "triton")

    @pytest.mark.parametrize("name", NOT_NATIVE)
    def test_one_set_for_the_process_is_asked_for_by_name(self, name, auto_backend):
        """A refusal is an error then too, not a silent fallback."""
        fastvit.set_backend("native")
        refused(lambda: CALLS[name](None), RuntimeError, "native")

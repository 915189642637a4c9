# SPDX-License-Identifier: Apache-2.0
"""The models against timm and torchvision: keys, numbers, gradients, methods, transforms."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionVisionTransformer
from torchvision.models.vision_transformer import ConvStemConfig

from fastvit.models import (
    create_model,
    list_models,
    load_checkpoint,
)
from fastvit.testing import CANCELLING, assert_agreement

# Parameter counts of the papers' models, counted on the authors' own code.
PARAMETERS = {
    "convit_tiny": 5_710_512,
    "convit_small": 27_777_322,
    "convit_base": 86_540_040,
    "convit_tiny_plus": 9_972_912,
    "convit_small_plus": 48_979_882,
    "convit_base_plus": 153_134_856,
    "deit_tiny": 5_717_416,
    "deit_small": 22_050_664,
    "deit_base": 86_567_656,
    "deit_tiny_plus": 9_982_184,
    "deit_small_plus": 49_000_744,
    "deit_base_plus": 153_171_944,
    "vit_p_1gf": 4_830_376,
    "vit_p_4gf": 18_507_112,
    "vit_p_18gf": 86_567_656,
    "vit_p_36gf": 178_364_392,
    "vit_c_1gf": 4_567_936,
    "vit_c_4gf": 17_754_136,
    "vit_c_18gf": 81_573_160,
    "vit_c_36gf": 167_796_008,
}

# Two GPSA blocks, then one block that sees the class token; 2x2 patches.
SMALL_CONVIT = {"depth": 3, "local_up_to_layer": 2, "img_size": 32, "num_classes": 7}
SMALL_VIT = {"depth": 2, "img_size": 32, "num_classes": 7}
SMALL_MODELS = [
    pytest.param("convit_tiny", SMALL_CONVIT, id="convit"),
    pytest.param("deit_tiny", SMALL_VIT, id="deit"),
    pytest.param("vit_c_1gf", SMALL_VIT, id="vit_c"),
]


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Move every parameter and BatchNorm statistic off its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)


def images(batch: int, size: int | tuple[int, int], seed: int = 1) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=generator)


def small_model(name: str, config: dict[str, int], **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(name, **config, **kwargs)
    randomize(model)
    return model.eval()


def output_and_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, and gradients of a fixed random projection of it, by parameter name."""
    x = x.clone().requires_grad_()
    output = model(x)
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (output * probe.to(output)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"output": output.detach(), "input": x.grad, **grads}


def assert_models_agree(actual: nn.Module, reference: nn.Module, x: Tensor) -> None:
    """Output and every gradient keep the numbers rule; the models' keys are the same."""
    results = output_and_gradients(actual, x)
    references = output_and_gradients(reference, x)
    expectations = output_and_gradients(copy.deepcopy(reference).double(), x.double())
    assert results.keys() == references.keys()
    for name, expected in expectations.items():
        # The largest error of a vector of a few hundred gradients scatters by more than two.
        options = {"name": name, "rms": name != "output"}
        if "pos_proj" in name or "gating_param" in name:
            options["floor"] = CANCELLING
        if name.endswith("pos_proj.bias"):
            # The softmax cancels this bias: its gradient is zero, up to rounding of the
            # sums that make the gradient of the weight.
            weight = name.replace("bias", "weight")
            options["scale"] = expectations[weight].abs().max().item()
        assert_agreement(results[name], references[name], expected, **options)


class TestRegistry:
    def test_parameter_counts(self):
        counts = {
            name: sum(p.numel() for p in create_model(name, device="meta").parameters())
            for name in list_models()
        }
        assert counts == PARAMETERS

    def test_width_per_head(self):
        """48 in ConViT, 64 elsewhere: parameter counts do not depend on the heads."""
        for name in list_models():
            model = create_model(name, device="meta")
            width = {block.attn.dim // block.attn.num_heads for block in model.blocks}
            published = 48 if name in ("convit_tiny", "convit_small", "convit_base") else 64
            assert width == {published}, name

    @pytest.mark.parametrize(
        ("size", "channels", "strides"),
        [
            ("1gf", [24, 48, 96, 192], [2, 2, 2, 2]),
            ("4gf", [48, 96, 192, 384], [2, 2, 2, 2]),
            ("18gf", [64, 128, 128, 256, 256, 512], [2, 2, 1, 2, 1, 2]),
            ("36gf", [64, 128, 128, 256, 256, 512], [2, 2, 1, 2, 1, 2]),
        ],
    )
    def test_stems(self, size, channels, strides):
        *stages, _ = create_model(f"vit_c_{size}", device="meta").patch_embed.backbone
        assert [stage.conv.out_channels for stage in stages] == channels
        assert [stage.conv.stride[0] for stage in stages] == strides

    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("convit_*_plus", ["convit_base_plus", "convit_small_plus", "convit_tiny_plus"]),
            ("vit_c_*", ["vit_c_18gf", "vit_c_1gf", "vit_c_36gf", "vit_c_4gf"]),
            ("resnet*", []),
        ],
    )
    def test_list_models_pattern(self, pattern, expected):
        assert list_models(pattern) == expected

    @pytest.mark.parametrize(
        ("name", "nearest"), [("convit_tny", "convit_tiny"), ("vit_c_4g", "vit_c_4gf")]
    )
    def test_unknown_name_suggests_the_nearest(self, name, nearest):
        with pytest.raises(ValueError, match=f"{name}.*did you mean .*{nearest}"):
            create_model(name)

    def test_unrelated_name_lists_all(self):
        with pytest.raises(ValueError, match=r"known are convit_base, .*vit_p_4gf"):
            create_model("???")

    def test_keyword_wins_over_the_name(self):
        model = create_model("vit_p_1gf", depth=2, mlp_ratio=1.0, device="meta")
        assert len(model.blocks) == 2
        assert model.blocks[0].mlp.fc1.out_features == 192


class TestAgainstTimm:
    @pytest.mark.parametrize("name", ["convit_tiny", "convit_small", "convit_base"])
    def test_convit_state_dict(self, name):
        reference = timm.create_model(name).state_dict()
        model = create_model(name)
        entries = [(key, value.shape) for key, value in model.state_dict().items()]
        assert entries == [(key, value.shape) for key, value in reference.items()]
        model.load_state_dict(reference, strict=True)

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [("deit_tiny", "deit_tiny_patch16_224"), ("deit_small", "deit_small_patch16_224")],
    )
    def test_deit_state_dict(self, ours, theirs):
        reference = timm.create_model(theirs).state_dict()
        entries = [(key, value.shape) for key, value in create_model(ours).state_dict().items()]
        assert entries == [(key, value.shape) for key, value in reference.items()]

    @pytest.mark.parametrize(
        ("name", "batch"), [("convit_tiny", 2), ("convit_small", 1), ("convit_base", 1)]
    )
    def test_convit_numbers(self, name, batch):
        """The whole models at 224 pixels: outputs and every gradient."""
        reference = timm.create_model(name).eval()
        randomize(reference)
        model = create_model(name).eval()
        load_checkpoint(model, reference.state_dict())
        assert_models_agree(model, reference, images(batch, 224))

    @pytest.mark.parametrize("pool", ["token", "avg"])
    def test_deit_numbers(self, pool):
        config = {"img_size": 64, "depth": 3, "global_pool": pool, "num_classes": 5}
        reference = timm.create_model("deit_tiny_patch16_224", **config).eval()
        randomize(reference)
        model = create_model("deit_tiny", **config).eval()
        model.load_state_dict(reference.state_dict(), strict=True)
        assert_models_agree(model, reference, images(2, 64))

    @pytest.mark.parametrize("pool", ["avg", ""])
    def test_convit_pooling(self, pool):
        config = {**SMALL_CONVIT, "global_pool": pool}
        reference = timm.create_model("convit_tiny", **config).eval()
        model = create_model("convit_tiny", **config).eval()
        model.load_state_dict(reference.state_dict())
        x = images(2, 32)
        torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("heads", "name"), [(4, "convit_tiny"), (9, "convit_small"), (16, "convit_base")]
    )
    def test_convolutional_start(self, heads, name):
        """Positions and values start as timm's local_init sets them, gates at one."""
        config = {"depth": 2, "local_up_to_layer": 1}
        reference = timm.create_model(name, **config).blocks[0].attn
        attention = create_model(name, **config).blocks[0].attn
        assert attention.pos_proj.weight.shape == (heads, 3)
        for key in ("pos_proj.weight", "pos_proj.bias", "v.weight", "gating_param"):
            actual, expected = attention.get_parameter(key), reference.get_parameter(key)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    def test_drop_path_draws_as_timm(self):
        """Same rates, same generator: the same samples lose the same branches."""
        config = {**SMALL_CONVIT, "drop_path_rate": 0.6}
        reference = timm.create_model("convit_tiny", **config).train()
        model = create_model("convit_tiny", **config).train()
        model.load_state_dict(reference.state_dict())
        x = images(8, 32)
        torch.manual_seed(3)
        expected = reference(x)
        torch.manual_seed(3)
        actual = model(x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(actual, model.eval()(x), rtol=1e-2, atol=1e-3)

    @pytest.mark.parametrize("n", [1, 3, [0, 2], [-1, 1, 1]], ids=str)
    @pytest.mark.parametrize("reshape", [False, True], ids=["tokens", "maps"])
    @pytest.mark.parametrize("prefix", [False, True], ids=["patches", "with prefix"])
    @pytest.mark.parametrize("norm", [False, True], ids=["raw", "norm"])
    def test_intermediate_layers(self, n, reshape, prefix, norm):
        config = {"img_size": (32, 48), "depth": 3}
        reference = timm.create_model("deit_tiny_patch16_224", **config).eval()
        model = create_model("deit_tiny", **config).eval()
        model.load_state_dict(reference.state_dict())
        options = {"n": n, "reshape": reshape, "return_prefix_tokens": prefix, "norm": norm}
        x = images(2, (32, 48))
        with torch.no_grad():
            actual = model.get_intermediate_layers(x, **options)
            expected = reference.get_intermediate_layers(x, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    def test_convit_intermediate_layers(self):
        """Patch tokens of every block; the class token only where it has joined."""
        reference = timm.create_model("convit_tiny", **SMALL_CONVIT).eval()
        model = create_model("convit_tiny", **SMALL_CONVIT).eval()
        model.load_state_dict(reference.state_dict())
        x = images(2, 32)
        with torch.no_grad():
            expected = reference.forward_intermediates(
                x, None, output_fmt="NLC", intermediates_only=True, norm=True
            )
            pairs = model.get_intermediate_layers(x, 3, return_prefix_tokens=True, norm=True)
            tokens = model.forward_features(x)
        torch.testing.assert_close([y for y, _ in pairs], expected, rtol=1e-4, atol=1e-5)
        assert [prefix.shape[1] for _, prefix in pairs] == [0, 0, 1]
        torch.testing.assert_close(pairs[-1][1], tokens[:, :1])

    def test_no_weight_decay_names(self):
        deit = timm.create_model("deit_tiny_patch16_224", depth=1)
        names = create_model("deit_tiny", depth=1).no_weight_decay()
        assert names == deit.no_weight_decay() & {name for name, _ in deit.named_parameters()}
        convit = timm.create_model("convit_tiny", **SMALL_CONVIT)
        assert create_model("convit_tiny", **SMALL_CONVIT).no_weight_decay() == (
            convit.no_weight_decay()
        )


class TestAgainstTorchvision:
    def reference(self, **kwargs: object) -> nn.Module:
        config = {"image_size": 224, "patch_size": 16, "num_layers": 11, "num_heads": 6}
        config |= {"hidden_dim": 384, "mlp_dim": 1152}
        stem = [ConvStemConfig(channels, 3, 2) for channels in (48, 96, 192, 384)]
        torch.manual_seed(0)
        model = TorchvisionVisionTransformer(**{**config, "conv_stem_configs": stem, **kwargs})
        randomize(model)
        return model.eval()

    def test_vit_c_output(self):
        """ViT_C-4GF in full, with randomised BatchNorm statistics."""
        reference = self.reference()
        model = create_model("vit_c_4gf").eval()
        assert load_checkpoint(model, reference.state_dict()).layout == "torchvision"
        x = images(1, 224)
        with torch.no_grad():
            actual, plain = model(x), reference(x)
            expected = reference.double()(x.double())
        assert_agreement(actual, plain, expected, name="logits")

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_vit_c_gradients(self, training):
        """One block over the stem; in training BatchNorm's statistics move alike too."""
        reference = self.reference(image_size=64, num_layers=1).train(training)
        model = create_model("vit_c_4gf", img_size=64, depth=1).train(training)
        load_checkpoint(model, reference.state_dict())
        names = {"conv_proj.conv_bn_relu_0.0.weight": "patch_embed.backbone.0.conv.weight"}
        names["conv_proj.conv_last.bias"] = "patch_embed.backbone.4.conv.bias"
        names["class_token"] = "cls_token"
        names |= {"input": "input", "output": "output"}
        x = images(4, 64)
        double = copy.deepcopy(reference).double()
        actual, plain = output_and_gradients(model, x), output_and_gradients(reference, x)
        expected = output_and_gradients(double, x.double())
        for theirs, ours in names.items():
            options = {"name": ours, "rms": ours != "output"}
            assert_agreement(actual[ours], plain[theirs], expected[theirs], **options)
        ours, theirs = model.patch_embed.backbone[3].bn, reference.conv_proj[3][1]
        for key in ("running_mean", "running_var"):
            buffer = double.conv_proj[3][1].get_buffer(key)
            assert_agreement(ours.get_buffer(key), theirs.get_buffer(key), buffer, name=key)
        assert ours.num_batches_tracked == theirs.num_batches_tracked == int(training)

    def test_initial_scheme(self):
        """Zero head, and the deviations that torchvision gives stem, MLP and positions."""
        torch.manual_seed(0)
        model = create_model("vit_c_4gf", depth=1)
        reference = TorchvisionVisionTransformer(
            224, 16, 1, 6, 384, 1152, conv_stem_configs=[ConvStemConfig(384, 3, 16)]
        )
        assert not model.head.weight.any()
        assert not model.head.bias.any()
        assert not model.cls_token.any()
        block, theirs = model.blocks[0], reference.encoder.layers[0]
        pairs = [
            (model.patch_embed.backbone[4].conv.weight, reference.conv_proj.conv_last.weight),
            (block.mlp.fc1.weight, theirs.mlp[0].weight),
            (block.mlp.fc2.weight, theirs.mlp[3].weight),
            (block.attn.qkv.weight, theirs.self_attention.in_proj_weight),
            (block.attn.proj.weight, theirs.self_attention.out_proj.weight),
            (model.pos_embed, reference.encoder.pos_embedding),
        ]
        for actual, expected in pairs:
            assert actual.std().item() == pytest.approx(expected.std().item(), rel=0.02)


class TestMethods:
    def test_deit_initial_scheme(self):
        torch.manual_seed(0)
        model = create_model("deit_small", depth=1)
        for linear in (model.blocks[0].attn.qkv, model.blocks[0].mlp.fc1, model.head):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
            assert not linear.bias.any()

    @pytest.mark.parametrize(("name", "config"), SMALL_MODELS)
    def test_head_is_forward_in_parts(self, name, config):
        model = small_model(name, config)
        x = images(2, 32)
        features = model.forward_features(x)
        assert features.shape == (2, 5, model.embed_dim)
        torch.testing.assert_close(model.forward_head(features), model(x))
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.num_features)
        torch.testing.assert_close(model.head(pooled), model(x))

    @pytest.mark.parametrize(("name", "config"), SMALL_MODELS)
    def test_reset_classifier(self, name, config):
        model = small_model(name, {**config}, dtype=torch.float64)
        x = images(2, 32).double()
        features = model.forward_features(x)
        model.reset_classifier(3)
        assert model.num_classes == 3
        assert model(x).shape == (2, 3)
        assert not model.head.training
        torch.testing.assert_close(model.forward_features(x), features)
        model.reset_classifier(0, "avg")
        torch.testing.assert_close(model(x), features[:, 1:].mean(1))

    def test_refused_reset_changes_nothing(self):
        model = small_model("deit_tiny", SMALL_VIT)
        head = model.head
        with pytest.raises(ValueError, match=r"global_pool must be one of .* got 'max'"):
            model.reset_classifier(3, "max")
        with pytest.raises(ValueError, match="num_classes must not be negative, got -1"):
            model.reset_classifier(-1, "avg")
        assert model.head is head
        assert (model.num_classes, model.global_pool) == (7, "token")

    def test_drop_path_rates_rise_linearly(self):
        model = create_model("deit_tiny", depth=5, drop_path_rate=0.2, device="meta")
        rates = [block.drop_path.drop_prob for block in model.blocks]
        assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])

    def test_dropouts_reach_their_layers(self):
        rates = {"drop_rate": 0.1, "pos_drop_rate": 0.2, "proj_drop_rate": 0.3}
        for name in ("convit_tiny", "deit_tiny"):
            model = create_model(name, attn_drop_rate=0.4, device="meta", **rates)
            block = model.blocks[0]
            assert (model.head_drop.p, model.pos_drop.p) == (0.1, 0.2)
            assert (block.attn.proj_drop.p, block.mlp.drop1.p, block.mlp.drop2.p) == (0.3,) * 3
            assert block.attn.attn_drop.p == 0.4

    @pytest.mark.parametrize(("name", "config"), SMALL_MODELS)
    def test_uint8_images(self, name, config):
        """Raw bytes with mean and std give what normalised floats give."""
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        model = small_model(name, config, mean=mean, std=std)
        raw = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        channel = (1, 3, 1, 1)
        x = (raw / 255.0 - torch.tensor(mean).view(channel)) / torch.tensor(std).view(channel)
        torch.testing.assert_close(model(raw), model(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("name", "config"), SMALL_MODELS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_dtype(self, name, config, dtype):
        model = small_model(name, config, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model(images(2, 32).to(dtype)).dtype == dtype

    def test_batch_may_be_empty(self):
        for name, config in (("convit_tiny", SMALL_CONVIT), ("vit_c_1gf", SMALL_VIT)):
            assert small_model(name, config)(images(0, 32)).shape == (0, 7)


ALL_POSITIONAL = {"depth": 2, "local_up_to_layer": 2, "img_size": 32, "num_classes": 7}


class TestAllPositionalConViT:
    """With ``local_up_to_layer >= depth`` no block reads the class token."""

    def test_token_pooling_is_refused(self):
        with pytest.raises(ValueError, match=r"local_up_to_layer=2 with depth=2.*global_pool"):
            create_model("convit_tiny", **ALL_POSITIONAL)
        model = create_model("convit_tiny", **ALL_POSITIONAL, global_pool="avg")
        with pytest.raises(ValueError, match="class token"):
            model.reset_classifier(3, "token")

    def test_average_takes_every_patch(self):
        model = small_model("convit_tiny", ALL_POSITIONAL, global_pool="avg")
        x = images(2, 32)
        tokens = model.forward_features(x)
        assert tokens.shape[1] == 4
        torch.testing.assert_close(model(x), model.head(tokens.mean(1)))

    def test_keys_stay_and_every_trained_parameter_gets_a_gradient(self):
        reference = timm.create_model("convit_tiny", **ALL_POSITIONAL)
        model = small_model("convit_tiny", ALL_POSITIONAL, global_pool="avg")
        assert list(model.state_dict()) == list(reference.state_dict())
        model(images(2, 32)).sum().backward()
        assert {n for n, p in model.named_parameters() if p.grad is None} == {"cls_token"}
        assert not model.cls_token.requires_grad


class TestTransforms:
    @pytest.mark.parametrize(
        ("name", "config", "compiler"),
        [
            # Both kinds of attention through Inductor; its minutes of C++ are not spent again
            # on what differs in the graph only.
            ("convit_tiny", {**SMALL_CONVIT, "depth": 2, "local_up_to_layer": 1}, "inductor"),
            ("deit_tiny", SMALL_VIT, "aot_eager"),
            ("vit_c_1gf", SMALL_VIT, "aot_eager"),
        ],
        ids=["convit-inductor", "deit", "vit_c"],
    )
    def test_compile_in_one_graph(self, name, config, compiler):
        model = small_model(name, config)
        x = images(2, 32)
        expected = output_and_gradients(model, x)
        torch._dynamo.reset()
        actual = output_and_gradients(torch.compile(model, fullgraph=True, backend=compiler), x)
        renamed = {name.removeprefix("_orig_mod."): value for name, value in actual.items()}
        torch.testing.assert_close(renamed, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("name", "config"), SMALL_MODELS)
    def test_export_with_dynamic_batch(self, name, config):
        model = small_model(name, config)
        shapes = {"x": {0: torch.export.Dim("batch")}}
        program = torch.export.export(model, (images(2, 32),), dynamic_shapes=shapes)
        x = images(5, 32)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("name", "config"), SMALL_MODELS)
    @pytest.mark.parametrize(
        "clone",
        [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
        ids=["deepcopy", "pickle"],
    )
    def test_copies_are_equal_and_independent(self, name, config, clone):
        model = small_model(name, config)
        x = images(2, 32)
        expected = model(x)
        twin = clone(model)
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
        with torch.no_grad():
            twin.norm.weight.zero_()
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


class TestBadArguments:
    @pytest.mark.parametrize(
        ("name", "kwargs", "message"),
        [
            ("deit_tiny", {"img_size": 230}, r"img_size \(230, 230\).*patch size \(16, 16\)"),
            ("vit_c_1gf", {"img_size": (224, 230)}, r"img_size \(224, 230\).*\(16, 16\)"),
            ("convit_tiny", {"img_size": 0}, "img_size: expected a positive int"),
            ("convit_tiny", {"img_size": (224,)}, "img_size: expected a positive int"),
            ("convit_tiny", {"global_pool": "max"}, "global_pool must be one of .* got 'max'"),
            ("convit_tiny", {"local_up_to_layer": -1}, "local_up_to_layer.*-1"),
            ("deit_tiny", {"depth": 0}, "depth must be at least 1, got 0"),
            ("deit_tiny", {"num_classes": -1}, "num_classes must not be negative, got -1"),
            ("deit_tiny", {"drop_path_rate": 1.5}, r"drop_path_rate must lie in \[0, 1\], got 1.5"),
            ("deit_tiny", {"weight_init": "jax"}, "weight_init must be one of .* got 'jax'"),
            ("deit_tiny", {"stem_channels": (8,)}, "stem_channels and stem_strides go together"),
            ("vit_c_1gf", {"patch_size": 8}, r"patch_size \(8, 8\) must be the product"),
            ("deit_tiny", {"embed_dim": 100}, "100"),
            ("convit_tiny", {"backend": "nonsense"}, "nonsense"),
        ],
    )
    def test_constructor(self, name, kwargs, message):
        with pytest.raises(ValueError, match=message):
            create_model(name, **{"device": "meta", **kwargs})

    def test_unknown_argument(self):
        with pytest.raises(TypeError, match="patch_siz"):
            create_model("deit_tiny", patch_siz=8)

    @pytest.mark.parametrize(("name", "config"), SMALL_MODELS)
    @pytest.mark.parametrize(
        ("shape", "message"),
        [((2, 3, 32, 48), "32"), ((2, 4, 32, 32), "4"), ((3, 32, 32), r"\(3, 32, 32\)")],
        ids=["size", "channels", "rank"],
    )
    def test_images(self, name, config, shape, message):
        with pytest.raises(ValueError, match=message):
            small_model(name, config)(torch.zeros(shape))

    @pytest.mark.parametrize("n", [0, 4, [3], [-4]], ids=str)
    def test_blocks_that_do_not_exist(self, n):
        model = small_model("convit_tiny", SMALL_CONVIT)
        with pytest.raises(ValueError, match=r"n must .* the 3 blocks"):
            model.get_intermediate_layers(images(1, 32), n)

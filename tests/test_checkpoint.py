# SPDX-License-Identifier: Apache-2.0
"""Loading checkpoints of every known layout, and refusing those that do not fit."""

from __future__ import annotations

import argparse
import os
import sys
from collections import OrderedDict

import pytest
import safetensors.torch
import timm
import torch
from timm.layers import HybridEmbed
from timm.models.vision_transformer_hybrid import ConvStem as TimmConvStem
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionVisionTransformer
from torchvision.models.vision_transformer import ConvStemConfig

from fastvit.models import LoadReport, create_model, load_checkpoint

CONVIT = {"depth": 2, "local_up_to_layer": 1, "img_size": 32, "num_classes": 7}
# Two blocks of ViT_C-1GF (3 heads, width 192, MLP 576) on 4x4 patches.
VIT = {"depth": 2, "img_size": 64, "num_classes": 7}
STEM = (24, 48, 96, 192)


def randomize(model: nn.Module) -> nn.Module:
    """Random parameters and BatchNorm statistics, so that swapped tensors show in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
                module.num_batches_tracked.fill_(11)
    return model.eval()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def torchvision_vit(stem: bool) -> nn.Module:
    configs = [ConvStemConfig(channels, 3, 2) for channels in STEM] if stem else None
    return randomize(
        TorchvisionVisionTransformer(
            64, 16, 2, 3, 192, 576, num_classes=7, conv_stem_configs=configs
        )
    )


class PyclsAttention(nn.Module):
    """Attention under the keys of pycls: ``block`` on main, two linears on vitconfigs."""

    def __init__(self, dim: int, heads: int, main: bool) -> None:
        super().__init__()
        self.heads = heads
        if main:
            self.block = nn.MultiheadAttention(dim, heads)
        else:
            self.attn_proj = nn.Linear(dim, 3 * dim)
            self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "block"):
            return self.block(x, x, x, need_weights=False)[0]
        q, k, v = self.attn_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class PyclsBlock(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, main: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim, eps=1e-6)
        self.self_attention = PyclsAttention(dim, heads, main)
        self.ln_2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_block = nn.Sequential(
            OrderedDict(
                linear_1=nn.Linear(dim, hidden), af=nn.GELU(), linear_2=nn.Linear(hidden, dim)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.ln_1(x))
        return x + self.mlp_block(self.ln_2(x))


class PyclsViT(nn.Module):
    """ViT_P and ViT_C with pycls's keys and shapes; tokens run sequence first on main."""

    def __init__(self, stem: bool, main: bool, dim: int = 192, heads: int = 3) -> None:
        super().__init__()
        self.main = main
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if stem:
            for i, (before, after) in enumerate(zip((3, *STEM), STEM, strict=False)):
                layers[f"cstem{i}_conv"] = nn.Conv2d(before, after, 3, 2, 1, bias=False)
                layers[f"cstem{i}_bn"] = nn.BatchNorm2d(after)
                layers[f"cstem{i}_af"] = nn.ReLU()
            layers["cstem_last_conv"] = nn.Conv2d(STEM[-1], dim, 1)
        else:
            layers["patchify"] = nn.Conv2d(3, dim, 16, 16)
        self.stem = nn.Sequential(layers)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.zeros(*((17, 1) if main else (1, 17)), dim))
        blocks = OrderedDict((f"block_{i}", PyclsBlock(dim, heads, 576, main)) for i in range(2))
        self.encoder = nn.Sequential(OrderedDict(**blocks, ln=nn.LayerNorm(dim, eps=1e-6)))
        self.head = nn.Sequential(OrderedDict(head_fc=nn.Linear(dim, 7)))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2)
        x = x.permute(2, 0, 1) if self.main else x.mT
        token = self.class_token.expand(*((1, len(images)) if self.main else (len(images), 1)), -1)
        x = torch.cat((token, x), dim=0 if self.main else 1) + self.pos_embedding
        x = self.encoder(x)
        return self.head(x[0] if self.main else x[:, 0])


def timm_vit_c() -> nn.Module:
    """ViT_C from timm's parts, which it has no model name for."""

    def embed(img_size: int, embed_dim: int, **_: object) -> nn.Module:
        stem = TimmConvStem(
            depth=5, channels=(*STEM, 192), kernel_size=(3, 3, 3, 3, 1), stride=(2, 2, 2, 2, 1)
        )
        return HybridEmbed(stem, img_size=img_size, proj=False, embed_dim=embed_dim)

    config = {"embed_dim": 192, "depth": 2, "num_heads": 3, "mlp_ratio": 3.0}
    return randomize(
        timm.models.VisionTransformer(img_size=64, num_classes=7, embed_layer=embed, **config)
    )


class TestLayouts:
    @pytest.mark.parametrize(
        ("name", "reference", "layout"),
        [
            pytest.param("vit_c_1gf", timm_vit_c, "timm", id="timm-vit_c"),
            pytest.param(
                "vit_c_1gf", lambda: torchvision_vit(True), "torchvision", id="torchvision-vit_c"
            ),
            pytest.param(
                "vit_p_1gf", lambda: torchvision_vit(False), "torchvision", id="torchvision-vit_p"
            ),
            *(
                pytest.param(
                    f"vit_{kind}_1gf",
                    lambda kind=kind, main=main: randomize(PyclsViT(kind == "c", main)),
                    "pycls" if main else "pycls vitconfigs",
                    id=f"{'main' if main else 'vitconfigs'}-vit_{kind}",
                )
                for main in (True, False)
                for kind in ("c", "p")
            ),
        ],
    )
    def test_output_is_the_other_library_s(self, name, reference, layout):
        reference = reference()
        model = create_model(name, **VIT).eval()
        assert load_checkpoint(model, reference.state_dict()) == LoadReport(layout, None, (), None)
        x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = reference(x)
            assert expected.std() > 0.1
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        if name == "vit_c_1gf":
            assert model.patch_embed.backbone[3].bn.num_batches_tracked == 11

    def test_old_torchvision_names_of_the_mlp(self):
        state = torchvision_vit(True).state_dict()
        old = {
            key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): value
            for key, value in state.items()
        }
        assert old.keys() != state.keys()
        model, twin = create_model("vit_c_1gf", **VIT), create_model("vit_c_1gf", **VIT)
        load_checkpoint(model, old)
        load_checkpoint(twin, state)
        assert_unchanged(model, twin.state_dict())

    @pytest.mark.parametrize("main", [True, False], ids=["main", "vitconfigs"])
    def test_pycls_positions_are_interpolated(self, main):
        reference = randomize(PyclsViT(stem=False, main=main))
        model = create_model("vit_p_1gf", **{**VIT, "img_size": 96})
        assert load_checkpoint(model, reference.state_dict()).resized == ((4, 4), (6, 6))
        first = reference.pos_embedding[0, 0]
        torch.testing.assert_close(model.pos_embed[0, 0], first, rtol=0, atol=0)

    def test_facebookresearch_training_checkpoint(self, tmp_path):
        """The authors' script saves its arguments and optimizer beside the weights."""
        reference = randomize(timm.create_model("convit_tiny", **CONVIT))
        path = tmp_path / "checkpoint.pth"
        arguments = argparse.Namespace(model="convit_tiny", lr=5e-4)
        optimizer = torch.optim.AdamW(reference.parameters()).state_dict()
        checkpoint = {"model": reference.state_dict(), "optimizer": optimizer, "epoch": 3}
        torch.save({**checkpoint, "args": arguments, "model_ema": None}, path)
        model = create_model("convit_tiny", **CONVIT)
        report = load_checkpoint(model, path)
        left_out = ("optimizer", "epoch", "args", "model_ema")
        assert report == LoadReport("timm", "model", left_out, None)
        assert_unchanged(model, reference.state_dict())

    def test_old_timm_buffer_of_positions(self):
        state = create_model("convit_tiny", **CONVIT).state_dict()
        state["blocks.0.attn.rel_indices"] = torch.zeros(1, 4, 4, 3)
        report = load_checkpoint(create_model("convit_tiny", **CONVIT), state)
        assert report.left_out == ("blocks.0.attn.rel_indices",)

    def test_missing_batch_counters_keep_the_model_s(self):
        model = randomize(create_model("vit_c_1gf", **VIT))
        state = {
            key: torch.zeros_like(value)
            for key, value in model.state_dict().items()
            if not key.endswith("num_batches_tracked")
        }
        load_checkpoint(model, state)
        assert model.patch_embed.backbone[0].bn.num_batches_tracked == 11
        assert not model.patch_embed.backbone[0].bn.running_mean.any()


class TestContainers:
    @pytest.fixture
    def reference(self):
        return randomize(create_model("convit_tiny", **CONVIT))

    @pytest.fixture
    def model(self):
        return create_model("convit_tiny", **CONVIT)

    @pytest.mark.parametrize("entry", ["model", "state_dict", "model_state"])
    def test_wrapped(self, reference, model, entry):
        checkpoint = {"epoch": 1, entry: reference.state_dict(), "ema_state": {}}
        report = load_checkpoint(model, checkpoint)
        assert (report.entry, report.left_out) == (entry, ("epoch", "ema_state"))
        assert_unchanged(model, reference.state_dict())

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda key: f"module.{key}",
            lambda key: f"_orig_mod.module.{key}",
            lambda key: key.replace("blocks.0.", "blocks.0._orig_mod."),
            lambda key: key.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."),
        ],
        ids=["data parallel", "compiled data parallel", "compiled block", "checkpointed block"],
    )
    def test_prefixes(self, reference, model, wrap):
        state = {wrap(key): value for key, value in reference.state_dict().items()}
        load_checkpoint(model, state)
        assert_unchanged(model, reference.state_dict())

    def test_real_data_parallel_and_compiled_modules(self, reference, model):
        wrapped = torch.nn.DataParallel(torch.compile(reference))
        load_checkpoint(model, wrapped.state_dict())
        assert_unchanged(model, reference.state_dict())

    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_file(self, reference, model, tmp_path, zipped):
        path = tmp_path / "weights.pth"
        torch.save(reference.state_dict(), path, _use_new_zipfile_serialization=zipped)
        load_checkpoint(model, os.fspath(path))
        assert_unchanged(model, reference.state_dict())

    def test_safetensors_file(self, reference, model, tmp_path):
        path = tmp_path / "weights.safetensors"
        safetensors.torch.save_file(reference.state_dict(), path)
        load_checkpoint(model, path)
        assert_unchanged(model, reference.state_dict())

    def test_safetensors_library_absent(self, model, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(RuntimeError, match="pip install safetensors"):
            load_checkpoint(model, tmp_path / "weights.safetensors")

    def test_values_take_the_model_s_dtype(self, reference):
        model = create_model("convit_tiny", **CONVIT, dtype=torch.bfloat16)
        load_checkpoint(model, reference.state_dict())
        assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
        assert torch.equal(model.head.weight, reference.head.weight.bfloat16())


class Payload:
    """Pickles as a call, which a reader of untrusted files must not make."""

    def __reduce__(self):
        return (sys.exit, ("the payload ran",))


class TestRefusals:
    @pytest.fixture
    def model(self):
        return create_model("vit_c_1gf", **VIT)

    def test_every_misfit_is_listed_and_nothing_loaded(self, model):
        state = torchvision_vit(True).state_dict()
        del state["encoder.ln.bias"], state["class_token"]
        state["heads.head.weight"] = torch.zeros(1000, 192)
        state["encoder.pos_embedding"] = torch.zeros(1, 17, 8)
        state["conv_proj.conv_last.bias"] = torch.zeros(192, dtype=torch.int8)
        state["heads.head.bias"] = [0.0] * 7
        state["encoder.layers.encoder_layer_2.ln_1.bias"] = torch.zeros(192)
        state["surprise"] = torch.zeros(1)
        before = snapshot(model)
        with pytest.raises(RuntimeError) as caught:
            load_checkpoint(model, state)
        assert str(caught.value).splitlines() == [
            "checkpoint (layout: torchvision) does not fit VisionTransformer, which was left "
            "unchanged",
            "missing (2):",
            "  cls_token",
            "  norm.bias",
            "unexpected (2):",
            "  encoder.layers.encoder_layer_2.ln_1.bias",
            "  surprise",
            "wrong (4):",
            "  pos_embed (in the checkpoint: encoder.pos_embedding): "
            "expected shape (1, 17, 192), got (1, 17, 8)",
            "  patch_embed.backbone.4.conv.bias (in the checkpoint: conv_proj.conv_last.bias): "
            "expected dtype torch.float32, got torch.int8",
            "  head.weight (in the checkpoint: heads.head.weight): "
            "expected shape (7, 192), got (1000, 192)",
            "  head.bias (in the checkpoint: heads.head.bias): expected a tensor, got list",
        ]
        assert_unchanged(model, before)

    def test_another_number_of_classes(self, model):
        state = create_model("vit_c_1gf", **{**VIT, "num_classes": 9}).state_dict()
        before = snapshot(model)
        with pytest.raises(RuntimeError, match=r"head.weight: expected shape \(7, 192\), got \(9"):
            load_checkpoint(model, state)
        with pytest.raises(RuntimeError, match=r"then call model\.reset_classifier"):
            load_checkpoint(model, state)
        assert_unchanged(model, before)

    def test_another_model(self, model):
        """A ConViT's GPSA keys are named as unexpected, the missing ones as missing."""
        state = timm.create_model("convit_tiny", depth=2, local_up_to_layer=1).state_dict()
        before = snapshot(model)
        with pytest.raises(RuntimeError) as caught:
            load_checkpoint(model, state)
        for line in ("  blocks.0.attn.gating_param", "  blocks.0.attn.qkv.weight"):
            assert line in str(caught.value).splitlines()
        assert_unchanged(model, before)

    def test_unknown_layout(self, model):
        with pytest.raises(RuntimeError, match=r"layout: unknown"):
            load_checkpoint(model, {"vit.embeddings.cls_token": torch.zeros(1, 1, 192)})

    @pytest.mark.parametrize(
        "value",
        [torch.empty(7, device="meta"), torch.zeros(7).to_sparse()],
        ids=["meta", "sparse"],
    )
    def test_tensor_without_dense_data(self, model, value):
        state = {**model.state_dict(), "head.bias": value}
        before = snapshot(model)
        with pytest.raises(RuntimeError, match=r"head.bias: expected a dense tensor"):
            load_checkpoint(model, state)
        assert_unchanged(model, before)

    def test_two_entries_for_one_parameter(self, model):
        state = model.state_dict()
        state["module.head.bias"] = torch.zeros(7)
        with pytest.raises(ValueError, match=r"'head.bias' and 'module.head.bias' both mean"):
            load_checkpoint(model, state)

    def test_averaged_weights_are_not_chosen(self, model):
        with pytest.raises(ValueError, match=r"got entries \['model_ema'\].*pass that entry"):
            load_checkpoint(model, {"model_ema": model.state_dict()})

    def test_several_sets_of_weights(self, model):
        state = model.state_dict()
        with pytest.raises(ValueError, match=r"several sets.*'model', 'state_dict'"):
            load_checkpoint(model, {"model": state, "state_dict": state})

    def test_empty_checkpoint(self, model):
        with pytest.raises(ValueError, match="holds no weights"):
            load_checkpoint(model, {})

    def test_foreign_objects_are_not_unpickled(self, model, tmp_path):
        path = tmp_path / "evil.pth"
        torch.save({"model": model.state_dict(), "payload": Payload()}, path)
        before = snapshot(model)
        with pytest.raises(RuntimeError, match="objects besides tensors"):
            load_checkpoint(model, path)
        assert_unchanged(model, before)

    def test_file_that_is_no_checkpoint(self, model, tmp_path):
        path = tmp_path / "notes.pth"
        path.write_text("weights, one day\n")
        with pytest.raises(RuntimeError, match=r"no file of torch\.save"):
            load_checkpoint(model, path)

    def test_file_that_holds_a_tensor(self, model, tmp_path):
        path = tmp_path / "tensor.pth"
        torch.save(torch.zeros(1), path)
        with pytest.raises(ValueError, match="holds a Tensor, expected a dict"):
            load_checkpoint(model, path)

    def test_missing_file(self, model, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
            load_checkpoint(model, tmp_path / "absent.pth")

    def test_types(self, model):
        with pytest.raises(TypeError, match="path_or_dict must be a path or a dict, got Linear"):
            load_checkpoint(model, nn.Linear(2, 2))
        with pytest.raises(TypeError, match=r"got DataParallel; unwrap .*model\.module"):
            load_checkpoint(nn.DataParallel(model), model.state_dict())

    def test_model_on_meta(self):
        model = create_model("vit_c_1gf", **VIT, device="meta")
        with pytest.raises(ValueError, match="must be materialised"):
            load_checkpoint(model, create_model("vit_c_1gf", **VIT).state_dict())

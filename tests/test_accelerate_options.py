# SPDX-License-Identifier: Apache-2.0
"""Accelerated layers honour the library's options, optional arguments and methods."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from library_models import (
    CONVIT,
    HEADS,
    MODELS,
    PATCH,
    SIZE,
    WIDTH,
    authors_convit,
    build,
    hugging_face,
    images,
    output,
    randomize,
    timm_convit,
    timm_vit,
)
from timm.layers import PatchEmbed
from torch import Tensor, nn

import fastvit

MODEL_NAMES = list(MODELS)


def accelerated(model: nn.Module, **options: object) -> nn.Module:
    model = copy.deepcopy(model)
    assert fastvit.accelerate(model, **options)
    return model


def agree(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize(
    "images_of",
    [
        pytest.param(lambda: images().to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(lambda: images(2, 2 * SIZE, SIZE)[:, :, ::2], id="strided"),
        pytest.param(lambda: images(1), id="one"),
        pytest.param(lambda: images(2)[:0], id="empty"),
    ],
)
def test_layouts_and_batches(name: str, images_of: Callable[[], Tensor]) -> None:
    model = build(name)
    if images_of().numel() == 0 and name.startswith("transformers"):
        pytest.skip("its attention refuses an empty batch")
    with torch.no_grad():
        agree(output(accelerated(model), images_of()), output(model, images_of()))


@pytest.mark.parametrize(
    ("options", "size"),
    [
        pytest.param({}, (SIZE, SIZE), id="plain"),
        pytest.param({"norm_layer": nn.LayerNorm}, (SIZE, SIZE), id="norm"),
        pytest.param({"bias": False}, (SIZE, SIZE), id="no-bias"),
        pytest.param({"flatten": False}, (SIZE, SIZE), id="not-flat"),
        pytest.param({"patch_size": (4, 8)}, (SIZE, SIZE), id="oblong-patch"),
        pytest.param({"in_chans": 1}, (SIZE, SIZE), id="gray"),
        pytest.param({"img_size": None}, (24, 40), id="any-size"),
        pytest.param({"strict_img_size": False}, (24, 40), id="not-strict"),
        pytest.param({"dynamic_img_pad": True, "strict_img_size": False}, (27, 33), id="padded"),
        *[pytest.param({"output_fmt": f}, (SIZE, SIZE), id=f) for f in ("NCHW", "NHWC", "NLC")],
        pytest.param({"output_fmt": "NCL"}, (SIZE, SIZE), id="NCL"),
    ],
)
def test_options_of_patch_embed(options: dict[str, object], size: tuple[int, int]) -> None:
    sizes = {"img_size": SIZE, "patch_size": PATCH, "in_chans": 3, "embed_dim": WIDTH}
    layer = randomize(PatchEmbed(**{**sizes, **options}))
    x = images(2, *size)[:, : options.get("in_chans", 3)]
    ours = accelerated(layer)
    agree(ours(x), layer(x))
    if not options:
        for wrong in (images(2, 24), images(2)[:, :2], images(2).to(torch.uint8), images(2)[0, 0]):
            with pytest.raises(Exception) as theirs:
                layer(wrong)
            with pytest.raises(theirs.type):
                ours(wrong)


@pytest.mark.parametrize("pad", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("tokens", [True, False], ids=["class-token", "none"])
def test_dynamic_image_size(tokens: bool, pad: bool) -> None:
    options = {"dynamic_img_size": True, "dynamic_img_pad": pad, "class_token": tokens}
    model = randomize(timm_vit(global_pool="token" if tokens else "avg", **options)).eval()
    x = images(2, 45 if pad else 48, 24)
    agree(accelerated(model)(x), model(x))


@pytest.mark.parametrize(
    "options",
    [
        {"no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 2},
        {"pos_embed": "none"},
        {"pre_norm": True},
        {"qk_norm": True},
        {"patch_drop_rate": 0.5},
    ],
    ids=lambda o: next(iter(o)),
)
def test_options_of_vision_transformer(options: dict[str, object]) -> None:
    model = randomize(timm_vit(**options)).eval()
    ours = accelerated(model)
    agree(ours(images()), model(images()))
    torch.manual_seed(3)
    expected = model.train()(images())
    torch.manual_seed(3)
    agree(ours.train()(images()), expected)


def test_masks_fall_through() -> None:
    model = build("timm-vit")
    ours, x = accelerated(model), torch.randn(2, 17, WIDTH)
    mask = torch.randn(2, 1, 17, 17)
    attention, adapter = model.blocks[0].attn, ours.blocks[0].attn
    agree(adapter(x, attn_mask=mask), attention(x, attn_mask=mask))
    agree(adapter(x, mask), attention(x, mask))
    agree(ours(images(), attn_mask=mask), model(images(), attn_mask=mask))


def test_every_result_of_timm() -> None:
    for model in (build("timm-vit"), build("timm-convit")):
        ours, x = accelerated(model), images()
        agree(ours.forward_features(x), model.forward_features(x))
        pair = [m.forward_intermediates(x, indices=2) for m in (ours, model)]
        agree(pair[0][0], pair[1][0])
        for mine, theirs in zip(pair[0][1], pair[1][1], strict=True):
            agree(mine, theirs)


@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_options_of_hugging_face(kind: str) -> None:
    model = randomize(hugging_face(kind)).eval()
    ours = accelerated(model)
    larger = images(2, 48, 40)
    agree(
        ours(larger, interpolate_pos_encoding=True).logits,
        model(larger, interpolate_pos_encoding=True).logits,
    )
    hidden = [m(images(), output_hidden_states=True).hidden_states for m in (ours, model)]
    for mine, theirs in zip(*hidden, strict=True):
        agree(mine, theirs)
    with pytest.raises(ValueError, match="size"):
        ours(larger)


def test_masked_patches_of_hugging_face() -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    config = ViTConfig(**sizes, intermediate_size=64, image_size=SIZE, patch_size=PATCH)
    model = randomize(ViTModel(config, use_mask_token=True)).eval()
    masked = torch.arange(16).expand(2, -1) % 3 == 0
    expected = model(images(), bool_masked_pos=masked).last_hidden_state
    agree(accelerated(model)(images(), bool_masked_pos=masked).last_hidden_state, expected)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["timm-convit", "convit"])
def test_attention_maps(name: str, when: str) -> None:
    """Also before any forward, where timm's map has no positions yet."""
    model = build(name)
    ours = accelerated(model)
    x = torch.randn(2, 16, WIDTH)
    if when == "after":
        ours(images())
    for block, theirs in zip(ours.blocks, model.blocks, strict=True):
        got = block.attn.get_attention_map(x, return_map=True)
        theirs.attn(x)
        for mine, expected in zip(
            got, theirs.attn.get_attention_map(x, return_map=True), strict=True
        ):
            agree(mine, expected)
        agree(block.attn(x), theirs.attn(x))


@pytest.mark.parametrize("name", ["timm-convit", "convit"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hook_on_the_attention_map(name: str, when: str) -> None:
    """People read attention maps by a hook on ``attn_drop``."""

    def watched(model: nn.Module, hook_first: bool) -> list[Tensor]:
        maps = []
        if not hook_first:
            assert fastvit.accelerate(model)
        for block in model.blocks:
            block.attn.attn_drop.register_forward_hook(lambda m, args, out: maps.append(out))
        if hook_first:
            fastvit.accelerate(model)
        model(images())
        return maps

    expected = watched(build(name), hook_first=True)
    fresh = build(name)
    maps = watched(fresh, hook_first=when == "before")
    assert len(maps) == len(expected) == 3
    for mine, theirs in zip(maps, expected, strict=True):
        assert mine.shape[1] == HEADS
        agree(mine, theirs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.models.convit.GPSA(WIDTH, HEADS, attn_drop=0.3),
        lambda: timm.models.convit.MHSA(WIDTH, HEADS, attn_drop=0.3),
        lambda: timm.models.vision_transformer.Attention(WIDTH, HEADS, attn_drop=0.3),
        lambda: CONVIT.GPSA(WIDTH, HEADS, attn_drop=0.3),
    ],
    ids=["timm-gpsa", "timm-mhsa", "timm-attention", "convit-gpsa"],
)
def test_attention_dropout(make: Callable[[], nn.Module]) -> None:
    """The mean over many masks is the result without dropout, and masks differ."""
    layer = accelerated(randomize(make()))
    x = torch.randn(1, 9, WIDTH)
    with torch.no_grad():
        expected = layer.eval()(x)
        draws = layer.train()(x.expand(600, -1, -1))
    assert (draws[0] - draws[1]).abs().max() > 1e-3
    deviation = (draws.mean(0) - expected[0]).abs() / (draws.std(0) / 600**0.5)
    assert deviation.max() < 5


def test_wrong_geometry_of_timm_is_kept(recwarn: pytest.WarningsRecorder) -> None:
    """timm reads the 4x16 grid of 64x256 pixels as 8x8."""
    model = randomize(timm_convit(img_size=(32, 128))).eval()
    x = images(2, 32, 128)
    expected = model(x)
    ours = accelerated(model)
    warned = [str(w.message) for w in recwarn if "4" in str(w.message) and "16" in str(w.message)]
    agree(ours(x), expected)
    warned += [str(w.message) for w in recwarn if str(w.message) not in warned]
    assert len([text for text in warned if "grid" in text]) == 1, warned


@pytest.mark.parametrize("name", [n for n, case in MODELS.items() if "conv_stem" in case.swapped])
@pytest.mark.parametrize("frozen", ["first", "all", "none"])
def test_batch_norms_of_a_training_stem(name: str, frozen: str) -> None:
    """Some may be in eval mode, have a momentum of their own or none: as the library does."""
    model = build(name).train()
    ours = accelerated(model)
    results = []
    for m in (ours, model):
        norms = [n for n in m.modules() if isinstance(n, nn.BatchNorm2d)]
        norms[0].eval() if frozen == "first" else None
        for norm in norms:
            norm.train(norm.training and frozen != "all")
        norms[1].momentum = 0.4
        norms[2].momentum = None
        with torch.no_grad():
            results.append(m(images()))
    agree(*results)
    for (key, mine), theirs in zip(ours.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5, msg=key)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n in MODELS if n != "convit"])
def test_conversion_after_accelerate(name: str, dtype: torch.dtype) -> None:
    model = build(name)
    ours = accelerated(model).to(dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        got, expected = output(ours, images().to(dtype)), output(model, images())
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("cls", [CONVIT.GPSA, CONVIT.MHSA])
def test_scale_of_the_authors(cls: type) -> None:
    layer = randomize(cls(WIDTH, HEADS, qk_scale=0.9, qkv_bias=True))
    x = torch.randn(2, 16, WIDTH)
    agree(accelerated(layer)(x), layer(x))


def edited(**methods: Callable) -> nn.Module:
    """The authors' ConViT from a copy of their file that somebody changed."""
    cls = authors_convit("project.models.convit").VisionTransformer
    for name, method in methods.items():
        setattr(cls, name, method)
    return randomize(cls()).eval()


def tokens_then_blocks(self: nn.Module, x: Tensor) -> Tensor:
    x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
    return self.norm(self.blocks[-1](x))[:, 0]


@pytest.mark.parametrize(
    "sum_of",
    [
        lambda self, x: x + self.pos_embed,
        lambda self, x: self.pos_embed + x,
        lambda self, x: torch.add(x, self.pos_embed),
        lambda self, x: x + 2 * self.pos_embed,
        lambda self, x: 2 * x + self.pos_embed,
        lambda self, x: x.add_(self.pos_embed),
        lambda self, x: self.pos_drop(x) + self.pos_embed[:, : x.shape[1]],
        lambda self, x: (x + self.pos_embed) + x.mean(dim=1, keepdim=True),
        lambda self, x: x,
        lambda self, x: x.view(x.size(0), -1, WIDTH) if x.is_contiguous() else x.clone(),
        lambda self, x: torch.stack([row for row in x]),  # noqa: C416
        lambda self, x: x * (x > 0).float(),
    ],
    ids=lambda f: str(f.__code__.co_firstlineno),
)
def test_edited_copies_of_convit(sum_of: Callable[[nn.Module, Tensor], Tensor]) -> None:
    def forward_features(self: nn.Module, x: Tensor) -> Tensor:
        return tokens_then_blocks(self, sum_of(self, self.patch_embed(x)))

    model = edited(forward_features=forward_features)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            agree(accelerated(model)(images()), model(images()))


def test_edited_copy_without_the_flag_of_positions() -> None:
    model = edited()
    del model.use_pos_embed
    type(model).forward_features = lambda self, x: tokens_then_blocks(self, self.patch_embed(x))
    agree(accelerated(model)(images()), model(images()))


@pytest.mark.filterwarnings("ignore")
def test_quantised_linear_layers() -> None:
    model = build("timm-vit")
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    expected = model(images())
    report = fastvit.accelerate(model)
    assert [e.layer for e in report.swapped] == ["patch_embed"]
    assert all("quant" in e.reason.lower() for e in report.skipped)
    agree(model(images()), expected)


def test_layers_of_fastvit_do_not_count() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = fastvit.GPSA(WIDTH, HEADS)
            self.theirs = CONVIT.GPSA(WIDTH, HEADS)

    report = fastvit.accelerate(Mixed(), strict=True)
    assert [e.name for e in report.swapped] == ["theirs"]

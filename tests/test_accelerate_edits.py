# SPDX-License-Identifier: Apache-2.0
"""Modules that look like a match and are not, and models that somebody edits afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from library_models import (
    HEADS,
    PATCH,
    SIZE,
    STEM,
    WIDTH,
    ViTStemConv,
    build,
    images,
    output,
    randomize,
    sequential_stem,
    timm_stem,
)
from timm.layers import HybridEmbedWithSize, PatchEmbedWithSize, convert_sync_batchnorm
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastvit


class LowRank(nn.Module):
    """A linear layer with an addition of low rank, as adapters for fine-tuning are."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoublingConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def child(path: str, change: Callable[[nn.Module], nn.Module | None]) -> Callable[..., None]:
    """An edit of a model: ``change`` the module at ``path``, or put what it returns there."""

    def edit(model: nn.Module) -> None:
        torch.manual_seed(1)
        new = change(model.get_submodule(path))
        if new is not None:
            model.set_submodule(path, new)

    return edit


def change_class(cls: type) -> Callable[[nn.Module], None]:
    return lambda module: setattr(module, "__class__", cls)


def doubled(module: nn.Module, args: object, out: Tensor) -> Tensor:
    return 2 * out


def hook(module: nn.Module) -> None:
    module.register_forward_hook(doubled)


def pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))


def own_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def new_weight(module: nn.Module) -> None:
    module.weight = nn.Parameter(torch.randn_like(module.weight))


def changed_data(module: nn.Module) -> None:
    module.weight.data.mul_(-1.5)


def parametrized(module: nn.Module) -> None:
    parametrizations.weight_norm(module)
    module.parametrizations.weight.original0.data.mul_(1.5)


def pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", 0.5)


def attribute(name: str, value: object) -> Callable[[nn.Module], None]:
    return lambda module: setattr(module, name, value)


def sync(module: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


class Edit(NamedTuple):
    model: str
    apply: Callable[[nn.Module], None]


def edits_of(model: str, paths: str, changes: dict[str, Callable]) -> dict[str, Edit]:
    return {
        f"{model}-{path}-{name}": Edit(model, child(path, change))
        for path in paths.split()
        for name, change in changes.items()
    }


WATCHED = {"hook": hook, "pre-hook": pre_hook, "own-forward": own_forward}
WEIGHTS = {
    "new-weight": new_weight,
    "data": changed_data,
    "parametrized": parametrized,
    "pruned": pruned,
}
LINEARS = {
    **WATCHED,
    **WEIGHTS,
    "low-rank": LowRank,
    "subclass": change_class(Doubling),
    "sequential": nn.Sequential,
}
CONVOLUTIONS = {
    **WATCHED,
    **WEIGHTS,
    "subclass": change_class(DoublingConv),
}
EDITS = {
    **edits_of(
        "timm-convit",
        "blocks.0.attn.qk blocks.0.attn.v blocks.0.attn.proj blocks.0.attn.pos_proj "
        "blocks.2.attn.qkv",
        LINEARS,
    ),
    **edits_of("timm-vit", "blocks.0.attn.qkv blocks.1.attn.proj", LINEARS),
    **edits_of(
        "timm-convit", "blocks.0.attn.attn_drop blocks.2.attn.attn_drop blocks.0.attn", WATCHED
    ),
    **edits_of(
        "timm-vit",
        "patch_embed patch_embed.norm pos_drop norm_pre patch_drop blocks.0.attn "
        "blocks.0.attn.proj_drop blocks.0.attn.q_norm",
        WATCHED,
    ),
    **edits_of("timm-vit", "patch_embed.norm pos_drop", {"scaled": lambda m: nn.Linear(32, 32)}),
    **edits_of(
        "timm-vit",
        "patch_embed.proj",
        {**CONVOLUTIONS, "sequential": nn.Sequential, "bias": attribute("bias", None)},
    ),
    **edits_of("timm-vit", "blocks.0.attn", {"scale": attribute("scale", 0.1)}),
    **edits_of("convit", "blocks.0.attn", {"scale": attribute("scale", 0.1)}),
    **edits_of("convit", "patch_embed pos_drop", WATCHED),
    **edits_of("pycls-vit_p", "stem.patchify", CONVOLUTIONS),
    **edits_of("torchvision-vit_p", "conv_proj", CONVOLUTIONS),
    **edits_of("transformers-vit", "vit.embeddings.patch_embeddings.projection", CONVOLUTIONS),
    **edits_of("transformers-vit", "vit.embeddings vit.embeddings.dropout", {"hook": hook}),
    **edits_of(
        "timm-vit_c",
        "patch_embed.backbone.0.conv patch_embed.backbone.3.conv",
        CONVOLUTIONS,
    ),
    **edits_of("timm-vit_c", "patch_embed.backbone.1", WATCHED),
    **edits_of(
        "timm-vit_c",
        "patch_embed.backbone.1.bn",
        {
            **WATCHED,
            "sync": sync,  # torch's conversion loses the activation of timm's BatchNormAct2d
            "sync-act": convert_sync_batchnorm,
            "eps": attribute("eps", 0.1),
            "gone": lambda m: nn.Identity(),
        },
    ),
    **edits_of("timm-vit_c", "patch_embed.backbone.1.bn.act", {"gelu": lambda m: nn.GELU()}),
    **edits_of("timm-vit_c", "patch_embed", WATCHED),
    **edits_of(
        "torchvision-vit_c",
        "conv_proj.conv_bn_relu_1.1",
        {**WATCHED, "sync": sync, "eps": attribute("eps", 0.1)},
    ),
    **edits_of(
        "torchvision-vit_c",
        "conv_proj.conv_bn_relu_0.2",
        {**WATCHED, "gelu": lambda m: nn.GELU(), "leaky": lambda m: nn.LeakyReLU(0.3)},
    ),
    **edits_of("torchvision-vit_c", "conv_proj.conv_last conv_proj", WATCHED),
    **edits_of("pycls-vit_c", "stem.cstem0_conv stem.cstem_last_conv", CONVOLUTIONS),
    **edits_of("sequential", "0 9", CONVOLUTIONS),
    **edits_of("sequential", "2", {**WATCHED, "gelu": lambda m: nn.GELU()}),
}
#: Edits after which the library's numbers are the same: timm's fused attention reads no scale.
NEUTRAL = ("-sequential", "-sync", "-sync-act", "attn_drop-hook", "timm-vit-blocks.0.attn-scale")


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return output(model, images())


@pytest.mark.filterwarnings("ignore:fastvit")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", EDITS)
def test_edits_count(name: str, when: str) -> None:
    """What somebody hooks, replaces or wraps has its effect, whenever it is done."""
    model = build(EDITS[name].model)
    unedited = run(model)
    EDITS[name].apply(model)
    expected = run(model)
    if when == "after":
        model = build(EDITS[name].model)
        run(model)
        assert fastvit.accelerate(model)
        EDITS[name].apply(model)
    else:
        report = fastvit.accelerate(model)
        assert all(entry.reason for entry in report.skipped)
    # Most edits change the numbers, and not by rounding.
    assert name.endswith(NEUTRAL) or not torch.allclose(expected, unedited, atol=1e-3)
    torch.testing.assert_close(run(model), expected, rtol=5e-5, atol=5e-5)
    output(model, images()).sum().backward()
    if name.endswith("own-forward"):
        return  # it holds a method of the class that restore takes away
    try:
        fastvit.restore(model)
    except RuntimeError as error:  # its own parametrised class lies over ours
        assert name.endswith("parametrized")
        assert "Parametrized" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(run(model), expected)


class Subclass(Attention):
    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return 2 * super().forward(x, *args, **kwargs)


def stem_of(**conv: object) -> nn.Sequential:
    stem = sequential_stem()
    options = {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False, **conv}
    stem[3] = nn.Conv2d(STEM[0], STEM[1], **options)
    return stem


def replaced(stem: nn.Sequential, index: int, layer: nn.Module) -> nn.Sequential:
    stem[index] = layer
    return stem


LOOKALIKES = {
    "subclass-of-attention": lambda: Subclass(WIDTH, HEADS),
    "multihead-attention": lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
    "own-forward": lambda: (own_forward(a := Attention(WIDTH, HEADS)), a)[1],
    "stem-of-gelu": lambda: timm_stem(act_layer=nn.GELU),
    "stem-of-mobileclip": lambda: timm_stem(
        depth=3, channels=(8, 16, 32), kernel_size=(4, 2, 2), stride=(4, 2, 2), padding=0
    ),
    "pycls-gelu": lambda: (s := ViTStemConv()).set_submodule("cstem0_af", nn.GELU()) or s,
}
#: Of no library, so they are not said to be skipped; but they must not be taken.
NO_STEMS = {
    "5x5": lambda: stem_of(kernel_size=5, padding=2),
    "unpadded": lambda: stem_of(padding=0),
    "stride-3": lambda: stem_of(stride=3),
    "dilated": lambda: stem_of(dilation=2),
    "grouped": lambda: stem_of(groups=4),
    "bias": lambda: stem_of(bias=True),
    "reflecting": lambda: stem_of(padding_mode="reflect"),
    "group-norm": lambda: replaced(sequential_stem(), 1, nn.GroupNorm(2, STEM[0])),
    "no-affine": lambda: replaced(sequential_stem(), 1, nn.BatchNorm2d(STEM[0], affine=False)),
    "no-statistics": lambda: replaced(
        sequential_stem(), 1, nn.BatchNorm2d(STEM[0], track_running_stats=False)
    ),
    "cumulative": lambda: replaced(sequential_stem(), 1, nn.BatchNorm2d(STEM[0], momentum=None)),
    "relu6": lambda: replaced(sequential_stem(), 2, nn.ReLU6()),
    "no-last": lambda: sequential_stem()[:-1],
    "3x3-last": lambda: replaced(sequential_stem(), 9, nn.Conv2d(STEM[2], WIDTH, 3, padding=1)),
    "strided-last": lambda: replaced(sequential_stem(), 9, nn.Conv2d(STEM[2], WIDTH, 1, 2)),
    "more": lambda: nn.Sequential(*sequential_stem(), nn.ReLU()),
    "in-float64": lambda: sequential_stem().double().float(),
}


@pytest.mark.filterwarnings("ignore:fastvit")
@pytest.mark.parametrize("name", [*LOOKALIKES, *NO_STEMS])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_lookalikes(name: str, training: bool) -> None:
    """Left alone, with a reason if it is of a library; what is taken is right."""
    torch.manual_seed(0)
    layer = randomize({**LOOKALIKES, **NO_STEMS}[name]())
    model = nn.ModuleDict({"layer": layer}).train(training)
    other = copy.deepcopy(model)
    report = fastvit.accelerate(model)
    if name in LOOKALIKES:
        assert not report.swapped
        assert [e.name for e in report.skipped] == ["layer"]
        assert report.skipped[0].reason
        with pytest.raises(fastvit.NotAccelerated):
            fastvit.accelerate(model, strict=True)
        possible, reason = fastvit.supports(layer)
        assert not possible
        assert reason
    tokens = torch.randn(2, 9, WIDTH)
    inputs = {"multihead-attention": (tokens,) * 3, "subclass-of-attention": (tokens,)}
    arguments = inputs.get(name, (tokens,) if name == "own-forward" else (images(),))
    results = [m["layer"](*arguments) for m in (model, other)]
    if name == "multihead-attention":
        results = [r[0] for r in results]
    torch.testing.assert_close(*results, rtol=5e-5, atol=5e-5)
    for (key, mine), theirs in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=key)


@pytest.mark.filterwarnings("ignore:fastvit")
@pytest.mark.parametrize("cls", [PatchEmbedWithSize, HybridEmbedWithSize])
def test_embeddings_that_return_the_size(cls: type) -> None:
    torch.manual_seed(0)
    if cls is PatchEmbedWithSize:
        layer = cls(img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH)
    else:
        layer = cls(timm_stem(), img_size=SIZE, proj=False, embed_dim=WIDTH)
    expected, size = randomize(layer).eval()(images())
    report = fastvit.accelerate(nn.ModuleDict({"embed": layer}))
    got, same = layer(images())
    torch.testing.assert_close(got, expected, rtol=5e-5, atol=5e-5)
    assert same == size
    assert report.swapped or report.skipped[0].reason

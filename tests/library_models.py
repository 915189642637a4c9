# SPDX-License-Identifier: Apache-2.0
"""Small models of the libraries that ``fastvit.accelerate`` knows, with random weights.

timm's, torchvision's and Hugging Face's are the real ones. The ConViT authors' repository and
pycls are on no package index: their layers stand here, written from the formulas, with the names,
shapes and keys of the originals.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import timm
import torch
import torchvision
import transformers
from timm.layers import HybridEmbed
from timm.models.convit import ConVit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn
from torchvision.models.vision_transformer import ConvStemConfig

# 4x4 patches of 8x8 pixels.
SIZE, PATCH, HEADS, WIDTH, CLASSES = 32, 8, 4, 32, 5
# Three 3x3 convolutions of stride 2, as deep as the patch is large.
STEM = (8, 12, 16)


def module_of(name: str, *classes: type) -> ModuleType:
    """An importable module of that name with those classes, as if a file had defined them."""
    module = ModuleType(name)
    for cls in classes:
        cls.__module__, cls.__qualname__ = name, cls.__name__
        setattr(module, cls.__name__, cls)
    *packages, _ = name.split(".")
    for depth in range(len(packages)):
        package = ModuleType(".".join(packages[: depth + 1]))
        package.__path__ = []
        sys.modules.setdefault(package.__name__, package)
    sys.modules[name] = module
    return module


def authors_convit(name: str = "convit") -> ModuleType:
    """facebookresearch/convit's file, which people copy to any place under that name."""

    class PatchEmbed(nn.Module):
        def __init__(self, img_size: int = SIZE, patch_size: int = PATCH, dim: int = WIDTH):
            super().__init__()
            self.img_size = (img_size, img_size)
            self.patch_size = (patch_size, patch_size)
            self.num_patches = (img_size // patch_size) ** 2
            self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

        def forward(self, x: Tensor) -> Tensor:
            assert tuple(x.shape[2:]) == self.img_size, "image size does not match"
            return self.proj(x).flatten(2).transpose(1, 2)

    class GPSA(nn.Module):
        def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            qkv_bias: bool = False,
            qk_scale: float | None = None,
            attn_drop: float = 0.0,
            proj_drop: float = 0.0,
        ):
            super().__init__()
            self.num_heads, self.dim = num_heads, dim
            self.scale = qk_scale or (dim // num_heads) ** -0.5
            self.qk = nn.Linear(dim, dim * 2, bias=qkv_bias)
            self.v = nn.Linear(dim, dim, bias=qkv_bias)
            self.attn_drop = nn.Dropout(attn_drop)
            self.proj = nn.Linear(dim, dim)
            self.pos_proj = nn.Linear(3, num_heads)
            self.proj_drop = nn.Dropout(proj_drop)
            self.locality_strength = 1.0
            self.gating_param = nn.Parameter(torch.ones(num_heads))

        def forward(self, x: Tensor) -> Tensor:
            batch, tokens, dim = x.shape
            if not hasattr(self, "rel_indices") or self.rel_indices.size(1) != tokens:
                self.get_rel_indices(tokens)
            attn = self.get_attention(x)
            v = (
                self.v(x)
                .reshape(batch, tokens, self.num_heads, dim // self.num_heads)
                .permute(0, 2, 1, 3)
            )
            x = (attn @ v).transpose(1, 2).reshape(batch, tokens, dim)
            return self.proj_drop(self.proj(x))

        def get_attention(self, x: Tensor) -> Tensor:
            batch, tokens, dim = x.shape
            q, k = (
                self.qk(x)
                .reshape(batch, tokens, 2, self.num_heads, dim // self.num_heads)
                .permute(2, 0, 3, 1, 4)
            )
            position = self.pos_proj(self.rel_indices.expand(batch, -1, -1, -1))
            position = position.permute(0, 3, 1, 2).softmax(dim=-1)
            content = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
            gate = self.gating_param.view(1, -1, 1, 1).sigmoid()
            attn = (1.0 - gate) * content + gate * position
            attn = attn / attn.sum(dim=-1, keepdim=True)
            return self.attn_drop(attn)

        def get_attention_map(
            self, x: Tensor, return_map: bool = False
        ) -> Tensor | tuple[Tensor, Tensor]:
            attn = self.get_attention(x).mean(0)
            distances = self.rel_indices.squeeze()[:, :, -1] ** 0.5
            dist = torch.einsum("nm,hnm->h", distances, attn) / distances.size(0)
            return (dist, attn) if return_map else dist

        def get_rel_indices(self, tokens: int) -> None:
            side = int(tokens**0.5)
            offset = torch.arange(side).view(1, -1) - torch.arange(side).view(-1, 1)
            dx = offset.repeat(side, side)
            dy = offset.repeat_interleave(side, dim=0).repeat_interleave(side, dim=1)
            rel = torch.stack([dx, dy, dx**2 + dy**2], dim=-1).float()
            self.rel_indices = rel.unsqueeze(0).to(self.qk.weight.device)

    class MHSA(nn.Module):
        def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            qkv_bias: bool = False,
            qk_scale: float | None = None,
            attn_drop: float = 0.0,
            proj_drop: float = 0.0,
        ):
            super().__init__()
            self.num_heads = num_heads
            self.scale = qk_scale or (dim // num_heads) ** -0.5
            self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
            self.attn_drop = nn.Dropout(attn_drop)
            self.proj = nn.Linear(dim, dim)
            self.proj_drop = nn.Dropout(proj_drop)

        def forward(self, x: Tensor) -> Tensor:
            batch, tokens, dim = x.shape
            qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            attn = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1))
            x = (attn @ v).transpose(1, 2).reshape(batch, tokens, dim)
            return self.proj_drop(self.proj(x))

        def get_attention_map(
            self, x: Tensor, return_map: bool = False
        ) -> Tensor | tuple[Tensor, Tensor]:
            batch, tokens, dim = x.shape
            qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
            q, k, _ = qkv.permute(2, 0, 3, 1, 4)
            attn = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1).mean(0)
            side = int(tokens**0.5)
            place = torch.stack(
                [torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)],
                dim=-1,
            ).float()
            distances = torch.cdist(place, place)
            dist = torch.einsum("nm,hnm->h", distances, attn) / tokens
            return (dist, attn) if return_map else dist

    class Block(nn.Module):
        def __init__(self, dim: int, num_heads: int, use_gpsa: bool):
            super().__init__()
            self.norm1 = nn.LayerNorm(dim, eps=1e-6)
            self.attn = (GPSA if use_gpsa else MHSA)(dim, num_heads=num_heads)
            self.norm2 = nn.LayerNorm(dim, eps=1e-6)
            self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    class VisionTransformer(nn.Module):
        def __init__(self, dim: int = WIDTH, depth: int = 3, local_up_to_layer: int = 2):
            super().__init__()
            self.local_up_to_layer = local_up_to_layer
            self.num_features = self.embed_dim = dim
            self.use_pos_embed = True
            self.patch_embed = PatchEmbed(dim=dim)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
            self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches, dim))
            self.pos_drop = nn.Dropout(0.0)
            self.blocks = nn.ModuleList(
                [Block(dim, HEADS, i < local_up_to_layer) for i in range(depth)]
            )
            self.norm = nn.LayerNorm(dim, eps=1e-6)
            self.head = nn.Linear(dim, CLASSES)

        def forward_features(self, x: Tensor) -> Tensor:
            cls = self.cls_token.expand(x.shape[0], -1, -1)
            x = self.patch_embed(x)
            if self.use_pos_embed:
                x = x + self.pos_embed
            x = self.pos_drop(x)
            for i, block in enumerate(self.blocks):
                if i == self.local_up_to_layer:
                    x = torch.cat((cls, x), dim=1)
                x = block(x)
            return self.norm(x)[:, 0]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.forward_features(x))

    return module_of(name, PatchEmbed, GPSA, MHSA, Block, VisionTransformer)


class ViTStemConv(nn.Module):
    """pycls's, of a ViT_C."""

    def __init__(self, channels: tuple[int, ...] = STEM, dim: int = WIDTH):
        super().__init__()
        width = 3
        for i, out in enumerate(channels):
            self.add_module(f"cstem{i}_conv", nn.Conv2d(width, out, 3, 2, 1, bias=False))
            self.add_module(f"cstem{i}_bn", nn.BatchNorm2d(out))
            self.add_module(f"cstem{i}_af", nn.ReLU(inplace=True))
            width = out
        self.cstem_last_conv = nn.Conv2d(width, dim, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class ViTStemPatchify(nn.Module):
    """pycls's, of a ViT_P."""

    def __init__(self, patch: int = PATCH, dim: int = WIDTH):
        super().__init__()
        self.patchify = nn.Conv2d(3, dim, patch, stride=patch, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.patchify(x)


class ViT(nn.Module):
    """pycls's: sequence first, with nn.MultiheadAttention."""

    def __init__(self, stem: nn.Module):
        super().__init__()
        self.stem = stem
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        tokens = (SIZE // PATCH) ** 2 + 1
        self.pos_embedding = nn.Parameter(torch.zeros(tokens, 1, WIDTH))
        self.self_attention = nn.MultiheadAttention(WIDTH, HEADS)
        self.ln = nn.LayerNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).permute(2, 0, 1)
        x = torch.cat([self.class_token.expand(-1, x.shape[1], -1), x], dim=0)
        x = x + self.pos_embedding
        x = x + self.self_attention(x, x, x, need_weights=False)[0]
        return self.head(self.ln(x)[0])


CONVIT = authors_convit()
PYCLS = module_of("pycls.models.vit", ViTStemConv, ViTStemPatchify, ViT)


def timm_convit(**options: object) -> nn.Module:
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH // HEADS, "depth": 3}
    return ConVit(
        **{**sizes, "num_heads": HEADS, "local_up_to_layer": 2, "num_classes": CLASSES, **options}
    )


def timm_vit(cls: Callable[..., nn.Module] = TimmVisionTransformer, **options: object) -> nn.Module:
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2}
    return cls(**{**sizes, "num_heads": HEADS, "num_classes": CLASSES, **options})


def timm_stem(**options: object) -> nn.Module:
    """timm's ConvStem in the shape of ViT_C."""
    depth = len(STEM) + 1
    shape = {
        "depth": depth,
        "channels": (*STEM, WIDTH),
        "kernel_size": (3,) * (depth - 1) + (1,),
        "stride": (2,) * (depth - 1) + (1,),
        "norm_layer": timm.layers.BatchNormAct2d,
    }
    return ConvStem(**{**shape, **options})


def hybrid_embed(img_size: int = SIZE, embed_dim: int = WIDTH, **options: object) -> nn.Module:
    kept = {k: v for k, v in options.items() if k in ("in_chans", "dynamic_img_pad", "output_fmt")}
    kept |= {k: v for k, v in options.items() if k in ("flatten", "strict_img_size")}
    return HybridEmbed(timm_stem(), img_size=img_size, proj=False, embed_dim=embed_dim, **kept)


def torchvision_vit(stem: bool = False, **options: object) -> nn.Module:
    configs = [ConvStemConfig(width, 3, 2) for width in STEM] if stem else None
    return torchvision.models.VisionTransformer(
        SIZE, PATCH, 2, HEADS, WIDTH, 64, num_classes=CLASSES, conv_stem_configs=configs, **options
    )


def hugging_face(kind: str, **options: object) -> nn.Module:
    """``kind``: the prefix of the classes, "ViT" or "DeiT"."""
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=64,
        image_size=SIZE,
        patch_size=PATCH,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return getattr(transformers, f"{kind}ForImageClassification")(config)


def sequential_stem() -> nn.Sequential:
    layers: list[nn.Module] = []
    width = 3
    for out in STEM:
        layers += [nn.Conv2d(width, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        width = out
    return nn.Sequential(*layers, nn.Conv2d(width, WIDTH, 1))


class Case(NamedTuple):
    """A model and how many of its modules ``accelerate`` takes, by kind of layer."""

    build: Callable[[], nn.Module]
    swapped: dict[str, int]


MODELS = {
    "timm-convit": Case(timm_convit, {"gpsa": 2, "mhsa": 1, "patch_embed": 1}),
    "timm-vit": Case(timm_vit, {"mhsa": 2, "patch_embed": 1}),
    "timm-vit_c": Case(partial(timm_vit, embed_layer=hybrid_embed), {"mhsa": 2, "conv_stem": 1}),
    "timm-deit-distilled": Case(
        partial(timm_vit, VisionTransformerDistilled), {"mhsa": 2, "patch_embed": 1}
    ),
    "convit": Case(CONVIT.VisionTransformer, {"gpsa": 2, "mhsa": 1, "patch_embed": 1}),
    "pycls-vit_p": Case(lambda: ViT(ViTStemPatchify()), {"patch_embed": 1}),
    "pycls-vit_c": Case(lambda: ViT(ViTStemConv()), {"conv_stem": 1}),
    "torchvision-vit_p": Case(torchvision_vit, {"patch_embed": 1}),
    "torchvision-vit_c": Case(partial(torchvision_vit, stem=True), {"conv_stem": 1}),
    "transformers-vit": Case(partial(hugging_face, "ViT"), {"patch_embed": 1}),
    "transformers-deit": Case(partial(hugging_face, "DeiT"), {"patch_embed": 1}),
    "sequential": Case(sequential_stem, {"conv_stem": 1}),
}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter and BatchNorm statistic off its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 1.0 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 0.1
            parameter += spread * torch.randn(parameter.shape, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
                module.running_mean.normal_(0.0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model


def build(name: str) -> nn.Module:
    """The model of that name in eval mode, the same at every call."""
    torch.manual_seed(0)
    return randomize(MODELS[name].build()).eval()


def images(batch: int = 2, height: int = SIZE, width: int | None = None, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width or height, generator=generator)


def output(model: nn.Module, x: Tensor) -> Tensor:
    """The model's result as one tensor."""
    out = model(x)
    if isinstance(out, tuple):  # the two heads of a distilled model in training
        return torch.cat(out, dim=-1)
    return getattr(out, "logits", out)

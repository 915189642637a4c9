# SPDX-License-Identifier: Apache-2.0
"""Layers and whole models against what else computes the same: who takes part.

A contest has the library's layer, fastvit's with the same weights, further peers, and where that
is meaningful its "products": the layer's matrix products or convolutions alone, which no
implementation in the same dtype can leave out.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit
from fastvit.ops.linear import linear
from fastvit.testing import Agreement, agreement

LIBRARY, FASTVIT, PRODUCTS, COMPILED = "library", "fastvit", "products", "torch.compile"
CHANNELS_LAST = "channels_last"
DEIT, FASTVIT_DEIT = "timm's DeiT", "fastvit's DeiT"

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIDE = 14
#: Channels of ViT_C-4GF's stem.
_STEM = (48, 96, 192, 384)
#: (width, heads) of ConViT's published sizes.
_SIZES = {"Ti": (192, 4), "S": (432, 9), "B": (768, 16)}

Run = Callable[[], Any]


@dataclass
class Contest:
    """Callables that do the same work, by contender, and whether they agree."""

    runs: dict[str, Run]
    agreement: Agreement
    #: Library and fastvit with a backward, for the peak of what they allocate; else empty.
    memory: dict[str, Run] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A contest that is built when its turn comes."""

    name: str
    dtype: torch.dtype
    batch: int
    build: Callable[[torch.dtype, int], Contest]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def id(self) -> str:
        return f"{self.name} {self.dtype_name} batch {self.batch}"


def entries(batch: int = 8) -> list[Entry]:
    """All contests, in the order of the table."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for size in ("S", "B"):
            found.append(Entry(f"GPSA {size} forward", dtype, batch, _gpsa(size, False)))
            found.append(Entry(f"GPSA {size} forward+backward", dtype, batch, _gpsa(size, True)))
        if batch > 1:
            found.append(Entry("GPSA S forward+backward", dtype, 1, _gpsa("S", True)))
        found.append(Entry("MHSA S forward+backward", dtype, batch, _mhsa("S")))
        found.append(Entry("ViT_C-4GF stem eval", dtype, batch, _stem(False)))
        found.append(Entry("ViT_C-4GF stem training", dtype, batch, _stem(True)))
        found.append(Entry("patch embedding 768", dtype, batch, _patch_embed))
        found.append(Entry("patch embedding 768 uint8", dtype, batch, _patch_embed_uint8))
        for size in ("tiny", "small", "base"):
            found.append(Entry(f"ConViT-{size} against DeiT", dtype, batch, _convit(size)))
        for name, model in (("ConViT-small", _timm_convit), ("ViT_C-4GF", _torchvision_vit_c)):
            found.append(Entry(f"{name} accelerated", dtype, batch, _accelerated(model)))
    return found + _variants(batch)


def _variants(batch: int) -> list[Entry]:
    """What people do to a layer, which must not cost it its speed."""
    step, found = "GPSA S forward+backward", []
    for how, build in (
        ("autocast to bfloat16", _gpsa("S", True, autocast=True)),
        ("13 x 13", _gpsa("S", True, side=13)),
        ("input transposed", _gpsa("S", True, transposed=True)),
    ):
        found.append(Entry(f"{step} {how}", torch.float32, batch, build))
    for dtype in (torch.float32, torch.bfloat16):
        found.append(Entry("patch embedding 768 channels_last", dtype, batch, _patch_embed_last))
        found.append(
            Entry("ConViT-small both compiled", dtype, batch, _convit("small", compiled=True))
        )
    return found


def select(all_entries: Iterable[Entry], patterns: Iterable[str]) -> list[Entry]:
    """The entries whose name, dtype and batch match one of the shell patterns.

    Raises:
        ValueError: a pattern matches none; the message has the nearest names.
    """
    all_entries = list(all_entries)
    chosen: dict[str, Entry] = {}
    for pattern in patterns:
        matching = [e for e in all_entries if fnmatch.fnmatch(e.id, f"*{pattern}*")]
        if not matching:
            raise ValueError(f"no contest matches {pattern!r}; {_nearest(pattern, all_entries)}")
        chosen.update({e.id: e for e in matching})
    return [e for e in all_entries if e.id in chosen]


def _nearest(pattern: str, known: Iterable[Entry]) -> str:
    names = list(dict.fromkeys(entry.name for entry in known))
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    listed = ", ".join(map(repr, near or names))
    return f"the nearest names are {listed}" if near else f"the contests are {listed}"


def _compare(
    theirs: Callable[[Tensor], Tensor],
    ours: Callable[[Tensor], Tensor],
    exact: nn.Module,
    x: Tensor,
) -> Agreement:
    """The numbers rule by root mean squares, on the first images."""
    with torch.no_grad():
        expected = exact.double()(x[:2].double())
        return agreement(ours(x[:2]), theirs(x[:2]), expected, rms=True)


def _randomized(layer: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of a trained layer's size: fresh ones have gates that are all equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if p.ndim > 1 and "pos_proj" not in name:
                p.normal_(0.0, p[0].numel() ** -0.5, generator=generator)
            elif "gating" in name:
                p.uniform_(-2.0, 2.0, generator=generator)
    return layer


def _training_step(layer: nn.Module, x: Tensor, first: bool = False) -> Run:
    """Forward and backward; ``x`` gets a gradient too, unless the layer is a model's first."""
    parameters = [p for p in layer.parameters() if p.requires_grad]
    grad = torch.randn_like(layer(x))

    def step() -> None:
        layer(x.detach().requires_grad_(not first)).backward(grad)
        for p in parameters:
            p.grad = None

    return step


def _forward(layer: Callable[[Tensor], Tensor], x: Tensor) -> Run:
    @torch.inference_mode()
    def forward() -> None:
        layer(x)

    return forward


def _linear_products(weights: list[Tensor], x: Tensor, backward: bool) -> Run:
    """The products of linear layers of the attention's width, forward and perhaps backward."""
    rows = x.reshape(-1, x.shape[-1])
    grads = [torch.randn(rows.shape[0], w.shape[0], dtype=x.dtype) for w in weights]

    @torch.inference_mode()
    def products() -> None:
        for w, g in zip(weights, grads, strict=True):
            linear(rows, w, None)
            if backward:
                g @ w
                g.mT @ rows

    return products


def _attention(theirs: nn.Module, ours: nn.Module, x: Tensor, backward: bool) -> Contest:
    compared = _compare(theirs.eval(), ours.eval(), copy.deepcopy(theirs), x)
    weights = [m.weight.detach() for m in theirs.modules() if isinstance(m, nn.Linear)]
    weights = [w for w in weights if w.shape[1] == x.shape[-1]]
    products = _linear_products(weights, x, backward)
    if not backward:
        compiled = torch.compile(theirs)
        runs = {
            LIBRARY: _forward(theirs, x),
            FASTVIT: _forward(ours, x),
            COMPILED: _forward(compiled, x),
            PRODUCTS: products,
        }
        return Contest(runs, compared)
    steps = {LIBRARY: _training_step(theirs.train(), x), FASTVIT: _training_step(ours.train(), x)}
    return Contest({**steps, PRODUCTS: products}, compared, memory=steps)


def _gpsa(
    size: str,
    backward: bool,
    *,
    side: int = _SIDE,
    transposed: bool = False,
    autocast: bool = False,
) -> Callable[[torch.dtype, int], Contest]:
    def build(dtype: torch.dtype, batch: int) -> Contest:
        from timm.models.convit import GPSA

        width, heads = _SIZES[size]
        theirs = _randomized(GPSA(width, heads)).to(dtype)
        x = torch.randn(batch, side * side, width).to(dtype)
        if transposed:
            x = x.mT.contiguous().mT
        theirs(x)  # makes its cache of positions outside of inference mode
        contest = _attention(theirs, fastvit.GPSA.from_module(theirs), x, backward)
        if autocast:
            contest.runs = {LIBRARY: contest.runs[LIBRARY], FASTVIT: contest.runs[FASTVIT]}
            contest.runs = {name: _autocast(run) for name, run in contest.runs.items()}
            contest.memory = {}
        return contest

    return build


def _autocast(run: Run) -> Run:
    return torch.autocast("cpu", torch.bfloat16)(run)


def _mhsa(size: str) -> Callable[[torch.dtype, int], Contest]:
    def build(dtype: torch.dtype, batch: int) -> Contest:
        from timm.layers import Attention

        width, heads = _SIZES[size]
        theirs = _randomized(Attention(width, heads)).to(dtype)
        ours = fastvit.MHSA(width, heads).to(dtype)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(batch, _SIDE * _SIDE + 1, width).to(dtype)
        return _attention(theirs, ours, x, backward=True)

    return build


def _stem(training: bool) -> Callable[[torch.dtype, int], Contest]:
    def build(dtype: torch.dtype, batch: int) -> Contest:
        from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

        stages = [ConvStemConfig(channels, 3, 2) for channels in _STEM]
        model = VisionTransformer(224, 16, 1, 6, 384, 384, conv_stem_configs=stages)
        theirs = nn.Sequential(model.conv_proj, nn.Flatten(2)).to(dtype)
        ours = fastvit.ConvStem.from_module(model.conv_proj)
        x = torch.randn(batch, 3, 224, 224).to(dtype)
        theirs.train()(x)  # running statistics of a layer that has seen images
        theirs.eval(), ours.eval()
        exact = copy.deepcopy(theirs)
        compared = _compare(lambda t: theirs(t).mT, ours, nn.Sequential(exact, _Transpose()), x)
        if training:
            pair = ((LIBRARY, theirs.train()), (FASTVIT, ours.train()))
            runs = {n: _training_step(m, x, first=True) for n, m in pair}
            return Contest(runs, compared, memory=dict(runs))
        channels_last = x.to(memory_format=torch.channels_last)
        runs = {
            LIBRARY: _forward(theirs, x),
            FASTVIT: _forward(ours, x),
            CHANNELS_LAST: _forward(theirs, channels_last),
            COMPILED: _forward(torch.compile(theirs), x),
            PRODUCTS: _convolutions(theirs, channels_last),
        }
        return Contest(runs, compared)

    return build


class _Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


def _convolutions(stem: nn.Module, x: Tensor) -> Run:
    """The stem's convolutions alone, each on what the one before gave it."""
    layers = [m for m in stem.modules() if isinstance(m, nn.Conv2d)]

    @torch.inference_mode()
    def run() -> None:
        y = x
        for layer in layers:
            y = F.conv2d(y, layer.weight, None, layer.stride, layer.padding)

    return run


def _patch_embed_last(dtype: torch.dtype, batch: int) -> Contest:
    return _patch_embed(dtype, batch, torch.channels_last)


def _patch_embed(
    dtype: torch.dtype, batch: int, layout: torch.memory_format = torch.contiguous_format
) -> Contest:
    from timm.layers import PatchEmbed

    theirs = PatchEmbed(224, 16, 3, 768).to(dtype).eval()
    ours = fastvit.PatchEmbed(224, 16, 3, 768).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(batch, 3, 224, 224).to(dtype).to(memory_format=layout)
    rows = torch.randn(batch * _SIDE * _SIDE, 768).to(dtype)
    runs = {
        LIBRARY: _forward(theirs, x),
        FASTVIT: _forward(ours, x),
        PRODUCTS: _linear_products([theirs.proj.weight.detach().flatten(1)], rows, False),
    }
    return Contest(runs, _compare(theirs, ours, copy.deepcopy(theirs), x))


def _patch_embed_uint8(dtype: torch.dtype, batch: int) -> Contest:
    from timm.layers import PatchEmbed

    theirs = PatchEmbed(224, 16, 3, 768).to(dtype).eval()
    ours = fastvit.PatchEmbed(224, 16, 3, 768, mean=_MEAN, std=_STD).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    x = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8)
    rows = torch.randn(batch * _SIDE * _SIDE, 768).to(dtype)

    def normalized(u: Tensor) -> Tensor:
        return theirs(u.float().div_(255).sub_(mean).div_(std).to(dtype))

    class Exact(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = copy.deepcopy(theirs)

        def forward(self, u: Tensor) -> Tensor:
            return self.layer((u / 255 - mean.double()) / std.double())

    runs = {
        LIBRARY: _forward(normalized, x),
        FASTVIT: _forward(ours, x),
        PRODUCTS: _linear_products([theirs.proj.weight.detach().flatten(1)], rows, False),
    }
    return Contest(runs, _compare(normalized, ours, Exact(), x))


def _convit(size: str, compiled: bool = False) -> Callable[[torch.dtype, int], Contest]:
    def build(dtype: torch.dtype, batch: int) -> Contest:
        import timm

        def pair(name: str, ours_name: str) -> tuple[nn.Module, nn.Module]:
            theirs = timm.create_model(name)
            ours = fastvit.create_model(ours_name)
            fastvit.models.load_checkpoint(ours, theirs.state_dict())
            return theirs.to(dtype).eval(), ours.to(dtype).eval()

        x = torch.randn(batch, 3, 224, 224).to(dtype)
        theirs, ours = pair(f"convit_{size}", f"convit_{size}")
        compared = _compare(theirs, ours, copy.deepcopy(theirs), x)
        if compiled:
            both = {LIBRARY: torch.compile(theirs), FASTVIT: torch.compile(ours)}
            return Contest({name: _forward(m, x) for name, m in both.items()}, compared)
        deit, our_deit = pair(f"deit_{size}_patch16_224", f"deit_{size}")
        runs = {
            LIBRARY: _forward(theirs, x),
            FASTVIT: _forward(ours, x),
            DEIT: _forward(deit, x),
            FASTVIT_DEIT: _forward(our_deit, x),
        }
        return Contest(runs, compared)

    return build


def _timm_convit() -> nn.Module:
    import timm

    return timm.create_model("convit_small")


def _torchvision_vit_c() -> nn.Module:
    from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

    stages = [ConvStemConfig(channels, 3, 2) for channels in _STEM]
    return VisionTransformer(224, 16, 11, 6, 384, 1152, conv_stem_configs=stages)


def _accelerated(model: Callable[[], nn.Module]) -> Callable[[torch.dtype, int], Contest]:
    """A library's model against itself after ``fastvit.accelerate``, in inference."""

    def build(dtype: torch.dtype, batch: int) -> Contest:
        # torchvision's head begins at zero.
        theirs = _randomized(model()).to(dtype).eval()
        ours = copy.deepcopy(theirs)
        fastvit.accelerate(ours)
        x = torch.randn(batch, 3, 224, 224).to(dtype)
        compared = _compare(theirs, ours, copy.deepcopy(theirs), x)
        return Contest({LIBRARY: _forward(theirs, x), FASTVIT: _forward(ours, x)}, compared)

    return build

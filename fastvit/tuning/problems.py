# SPDX-License-Identifier: Apache-2.0
"""What is tuned: the papers' shapes, the most valuable first, or those that were asked for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence

from fastvit.kernels import stem_configs
from fastvit.kernels.tuned import Attention, Layer, Posed
from fastvit.reference import stage_grids

OPS = ("gpsa", "mhsa", "conv_stem", "gpsa_dropout")
#: Arithmetic of the kernels by dtype.
DTYPES = {"bfloat16": "half", "float16": "half", "float32": "ieee", "tf32": "tf32"}

#: Heads and channels of a head of the ConViTs (arXiv 2103.10697), and DeiT-B's.
_S, _B, _TI, _S_PLUS, _DEIT_B = (9, 48), (16, 48), (4, 48), (9, 64), (12, 64)
#: Channels and D of the ViT_C's stems (arXiv 2106.14881), by their size.
STEMS = {
    "1GF": ((24, 48, 96, 192), 192),
    "4GF": ((48, 96, 192, 384), 384),
    "18GF": ((64, 128, 128, 256, 256, 512), 768),
    "36GF": ((64, 128, 128, 256, 256, 512), 1024),
}
_FORM = "BxHxROWSxCOLUMNSxd, BxHxNxd or a stem such as 4GF or 4GF:64 (images)"


def default(ops: Sequence[str], arithmetic: str, arch: str) -> list[Posed]:
    """The problems of these ops; without dropout unless it is asked for."""
    found: list[Posed] = []
    for images in (256, 64, 8, 1):
        for heads in (_S, _B):
            found += _attention(ops, arithmetic, images, heads, (14, 14))
        found += _attention(ops, arithmetic, images, _S, 197)
        found += _attention(ops, arithmetic, images, _DEIT_B, 197)
        if "conv_stem" in ops and images != 8:
            for size in ("4GF", "1GF", "18GF", "36GF") if images == 256 else ("4GF", "1GF"):
                found += stem(size, images, arithmetic, arch)
    for heads in (_S_PLUS, _TI):
        found += _attention(ops, arithmetic, 256, heads, (14, 14))
    for side in (24, 32):
        found += _attention(ops, arithmetic, 32, _S, (side, side))
    # A layer may be part of several stems.
    return list(dict.fromkeys(found))


def _attention(
    ops: Sequence[str],
    arithmetic: str,
    images: int,
    heads: tuple[int, int],
    tokens: tuple[int, int] | int,
) -> Iterator[Posed]:
    H, d = heads
    gated = isinstance(tokens, tuple)
    grid = tokens if isinstance(tokens, tuple) else None
    count = tokens[0] * tokens[1] if isinstance(tokens, tuple) else tokens
    for op in ops:
        if op in (("gpsa", "gpsa_dropout") if gated else ("mhsa",)):
            for direction in ("forward", "backward"):
                yield Attention(op, direction, arithmetic, images, H, count, d, grid)


def stem(size: str, images: int, arithmetic: str, arch: str, side: int = 224) -> Iterator[Posed]:
    """The layers of a ViT_C's stem in inference, in training, and of its backward."""
    channels, D = STEMS[size]
    strides = (2, 2, 2, 2) if len(channels) == 4 else (2, 2, 1, 2, 1, 2)
    return layers((3, *channels, D), strides, images, (side, side), arithmetic, arch)


def layers(
    widths: tuple[int, ...],
    strides: tuple[int, ...],
    images: int,
    size: tuple[int, int],
    arithmetic: str,
    arch: str,
) -> Iterator[Posed]:
    """The same of a stem with channels from the images' to D."""
    sides = [size, *stage_grids(size, strides)]
    positions = tuple(images * rows * columns for rows, columns in sides[1:])
    for keeps in (False, True):
        level = 0
        posed = stem_configs.Problem(arch, arithmetic, positions, widths, keeps)
        for kernel, _ in stem_configs.forward(posed):
            after = level + (2 if kernel == "stem_pair" else 1)
            yield Layer(
                kernel, "forward", arithmetic, images, sides[level], widths[level : after + 1],
                strides[level:after], keeps, False,
            )  # fmt: skip
            level = after
    for level in reversed(range(len(widths) - 1)):
        if level == 0 and not stem_configs.gathers(widths[0]):
            continue
        kernels = (
            ("stem_input_gradient", "stem_weight_gradient") if level else ("stem_image_gradient",)
        )
        for kernel in kernels:
            yield Layer(
                kernel, "backward", arithmetic, images, sides[level], widths[level : level + 2],
                strides[level : level + 1], True, False,
            )  # fmt: skip


def asked(shapes: Iterable[str], ops: Sequence[str], arithmetic: str, arch: str) -> list[Posed]:
    """The problems of shapes in words.

    Raises:
        ValueError: one is no shape, or none of these ops has it; the message has the nearest.
    """
    found: list[Posed] = []
    for text in shapes:
        posed = list(_parsed(text, ops, arithmetic, arch))
        if not posed:
            raise ValueError(f"--shapes: {text!r} is no shape of {', '.join(ops)}")
        found += posed
    return list(dict.fromkeys(found))


def _parsed(text: str, ops: Sequence[str], arithmetic: str, arch: str) -> Iterable[Posed]:
    size, _, images = text.partition(":")
    if size in STEMS and (not images or re.fullmatch(r"[1-9]\d*", images)):
        return stem(size, int(images or 256), arithmetic, arch) if "conv_stem" in ops else ()
    if re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3,4}", text):
        B, H, *tokens, d = map(int, text.split("x"))
        if d > 128:
            raise ValueError(f"--shapes: {text!r} has {d} channels a head, the kernels take 128")
        grid = (tokens[0], tokens[1]) if len(tokens) == 2 else tokens[0]
        return _attention(ops, arithmetic, B, (H, d), grid)
    close = difflib.get_close_matches(size.upper(), STEMS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"expected {_FORM}"
    raise ValueError(f"--shapes: {text!r} is no shape; {hint}")

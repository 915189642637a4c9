# SPDX-License-Identifier: Apache-2.0
"""Which problems are checked and timed on a GPU."""

from __future__ import annotations

from gpu.plan import Plan
from gpu.shapes import SIZES, Embedding, Group, Shape, Stem


def _full() -> Plan:
    groups = [Group(f"ConViT-{size}", "gpsa", 8, *heads, (14, 14)) for size, heads in SIZES.items()]
    # From 264 heads in all, one program keeps the keys and values of a whole head.
    groups += [Group(f"ConViT-{s} B=64", "gpsa", 64, *SIZES[s], (14, 14)) for s in ("S", "B+")]
    groups += [
        Group("plain 197", "mhsa", 8, 9, 48, (1, 197)),
        Group("plain 197 B=64", "mhsa", 64, 6, 64, (1, 197)),
        Group("layouts", "gpsa", 4, 9, 48, (14, 14), ("permuted", "expanded", "misaligned")),
        Group("24x24", "gpsa", 2, 9, 48, (24, 24)),
        Group("32x32", "gpsa", 2, 9, 48, (32, 32)),
        Group("49", "gpsa", 8, 3, 48, (7, 7)),
        Group("256", "gpsa", 8, 3, 48, (16, 16)),
        Group("256 B=100", "gpsa", 100, 3, 48, (16, 16)),
        Group("7x28", "gpsa", 8, 4, 48, (7, 28)),
        Group("4x16", "gpsa", 8, 4, 48, (4, 16)),
        Group("64x64", "gpsa", 1, 1, 48, (64, 64)),
        Group("no images", "gpsa", 0, 9, 48, (14, 14)),
        Group("plain 49", "mhsa", 8, 3, 48, (1, 49)),
        Group("plain 256", "mhsa", 8, 3, 64, (1, 256)),
        Group("plain 577", "mhsa", 2, 3, 64, (1, 577)),
    ]
    groups += [Group(f"d={d}", "gpsa", 4, 2, d, (14, 14)) for d in (16, 24, 40, 80, 128)]
    groups += [Group(f"plain d={d}", "mhsa", 4, 2, d, (1, 197)) for d in (24, 80, 128)]
    groups += [
        Group("dropout", "gpsa_dropout", 8, 9, 48, (14, 14)),
        Group("dropout 24x24", "gpsa_dropout", 2, 3, 48, (24, 24)),
        Group("dropout d=128", "gpsa_dropout", 2, 3, 128, (5, 9)),
        Group("dropout layouts", "gpsa_dropout", 2, 3, 24, (5, 9), ("permuted", "misaligned")),
    ]
    shapes = [_shape(size, 256, 196) for size in SIZES]
    shapes += [_shape(size, 64, 196) for size in ("S", "B")]
    shapes += [_shape(size, B, 196) for B in (1, 8) for size in ("S", "B")]
    shapes += [_shape(size, 32, N) for N in (576, 1024) for size in ("S", "B")]
    shapes += [_shape(size, B, 197) for B in (256, 64) for size in ("S", "S+", "B", "B+")]
    shapes += [_shape(size, B, 196) for B in (64, 8, 1) for size in ("S+", "B+", "Ti")]
    shapes += [_shape(size, B, 197) for B in (8, 1) for size in ("S", "B")]
    main = [_shape(size, B, 196) for B in (256, 64) for size in ("S", "B")]
    timed_shapes = [(shape, "bfloat16") for shape in shapes]
    others = [(shape, dtype) for shape in main for dtype in ("float16", "tf32", "float32")]
    # Behind single images and the first of the long sequences.
    timed_shapes[13:13] = others
    compiled = (shapes[0], shapes[1], _shape("S", 64, 196), _shape("S", 32, 576))
    layers = [(256 * 196, C, n * C) for C in (432, 768) for n in (1, 3)]
    dtypes = ("bfloat16", "float32")
    planar, layouts = ("planar",), ("planar", "channels_last", "cropped")
    embedded = (
        (Embedding(8, 768, 16, (224, 224)), layouts),
        (Embedding(8, 384, 14, (224, 224)), layouts),
        (Embedding(3, 1000, 16, (48, 80)), layouts),
        (Embedding(3, 768, 14, (42, 70)), layouts),
        (Embedding(8, 1000, 16, (224, 224)), planar),
    )
    stems = [_stem(size, 256) for size in ("4GF", "1GF", "18GF", "36GF")]
    stems += [_stem("4GF", B) for B in (64, 8, 1)] + [_stem("1GF", B) for B in (64, 1)]
    stems_timed = [(stem, "bfloat16") for stem in stems]
    stems_timed[3:3] = [(stems[0], dtype) for dtype in ("float16", "tf32", "float32")]
    sizes = [(768, 256), (768, 1), (384, 256), (1024, 256), (768, 8), (768, 64)]
    sizes += [(D, B) for B in (1, 8, 64) for D in (384, 1024)]
    timed = [(Embedding(B, D, 16, (224, 224)), "bfloat16") for D, B in sizes]
    timed[1:1] = [(timed[0][0], "tf32"), (timed[0][0], "float16")]
    return Plan(
        groups=tuple(groups),
        shapes=tuple(shapes),
        timed=tuple(timed_shapes),
        compiled=compiled,
        autotuned=(shapes[0],),
        copied=2**30,
        products=((8192, 8192, 8192), *layers, (64, 1024, 1024, 1024), (2304, 196, 64, 196)),
        exponents=2**22,
        rounds=20,
        hosted=50,
        far=2**31 + 64,
        embedded=embedded,
        embedding_dtypes=("bfloat16", "float16", "float32", "tf32"),
        embeddings=tuple(timed),
        stems_checked=(
            (_stem("4GF", 4), ("planar", "channels_last")),
            (_stem("1GF", 4), ("planar",)),
            (_stem("18GF", 2), ("planar",)),
            (Stem("odd", 3, (45, 67), (24, 40, 48), (2, 1, 2), 136), ("planar", "channels_last")),
        ),
        stems=tuple(stems),
        stems_timed=tuple(stems_timed),
        stems_compiled=(_stem("4GF", 256), _stem("1GF", 256), _stem("18GF", 256)),
        sanitized=(
            *(("gpsa", dtype, 2, 2, (5, 7), 48) for dtype in dtypes),
            ("gpsa", "bfloat16", 2, 2, (3, 90), 48),
            ("gpsa", "bfloat16", 140, 2, (4, 4), 48),
            *(("mhsa", dtype, 2, 2, (1, 50), 64) for dtype in dtypes),
            *(("gpsa_dropout", dtype, 2, 2, (5, 7), 48) for dtype in dtypes),
            *(
                (f"patch_embed{pixels}", dtype, 2, patch, (3, 5), 136)
                for pixels in ("", " uint8")
                for dtype in dtypes
                for patch in (16, 14)
            ),
            *(
                (f"conv_stem{pixels}", dtype, 2, 24, (19, 21), 40)
                for pixels in ("", " uint8")
                for dtype in dtypes
            ),
        ),
    )


def _shape(size: str, B: int, N: int) -> Shape:
    side = round(N**0.5)
    return Shape(size, B, *SIZES[size], N, (side, side) if side * side == N else None)


def _stem(size: str, B: int) -> Stem:
    """The stem of a ViT_C (arXiv 2106.14881)."""
    channels, D = {
        "1GF": ((24, 48, 96, 192), 192),
        "4GF": ((48, 96, 192, 384), 384),
        "18GF": ((64, 128, 128, 256, 256, 512), 768),
        "36GF": ((64, 128, 128, 256, 256, 512), 1024),
    }[size]
    strides = (2, 2, 2, 2) if len(channels) == 4 else (2, 2, 1, 2, 1, 2)
    return Stem(size, B, (224, 224), channels, strides, D)


FULL = _full()

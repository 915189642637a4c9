# SPDX-License-Identifier: Apache-2.0
"""The least time that a computation can take on a machine with the measured ceilings.

Bytes: every input read once, every output written once. FLOPs: two for each multiply-add that no
implementation without stored N x N maps can leave out. C = H d channels, N tokens, B images;
a patch embedding makes D channels of the K pixels of a patch. Convolutions are counted as they are
defined: Winograd's algorithm does those of stride 1 with fewer multiplications, and no library is
known to do so here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from gpu.shapes import Stem


class Work(NamedTuple):
    """What has to be moved and computed."""

    bytes: float
    flops: float


def core(B: int, N: int, H: int, d: int, itemsize: int, *, backward: bool) -> Work:
    """Attention of q, k, v. Forward: 4 tensors, 2 products; backward: 7 tensors, 5 products."""
    tensors, products = (4 + 7, 2 + 5) if backward else (4, 2)
    return Work(tensors * B * N * H * d * itemsize, 2 * products * B * H * N * N * d)


def module(B: int, N: int, H: int, d: int, itemsize: int, *, backward: bool) -> Work:
    """A GPSA layer: four C x C projections of x around :func:`core`."""
    C, passes = H * d, 3 if backward else 1
    tokens, weights = B * N * C, 4 * C * C
    # Forward reads x and the weights and writes the output; backward reads x, the weights and a
    # gradient, and writes those of x and of the weights.
    moved = (5 * tokens + 3 * weights) if backward else (2 * tokens + weights)
    inner = core(B, N, H, d, itemsize, backward=backward).flops
    return Work(moved * itemsize, passes * 2 * tokens * 4 * C + inner)


def patch_embed(
    B: int, N: int, K: int, D: int, itemsize: int, pixelsize: int, *,
    backward: bool, assembled: bool = True,
) -> Work:  # fmt: skip
    """N patches of K pixels to D channels, and their weight's gradient; none of the images.

    Args:
        itemsize, pixelsize: bytes of an element of the tokens and weights, and of a pixel.
        backward: whether the images and a gradient of the tokens are read again, and gradients of
            weight, bias, positions and class token written.
        assembled: whether the tokens have a class token before them, and positions added.
    """
    passes = 2 if backward else 1
    tokens = (N + 1) * D if assembled else N * D
    parameters = D * K + D + (tokens + D if assembled else 0)
    moved = B * N * K * pixelsize + (B * tokens + parameters) * itemsize
    return Work(passes * moved, passes * 2 * B * N * K * D)


def stem(problem: Stem, itemsize: int, *, backward: bool) -> Work:
    """A stem whose maps all stay on the chip: images and weights in, tokens out; without the few
    numbers of the batch norms, which some fold into the weights. Backward, the images, the weights
    and a gradient of the tokens are read again and gradients of the weights written; the images
    have none.
    """
    (height, width), before = problem.size, 3
    flops, weights, first = 0, 0, 0
    for channels, stride in zip(problem.channels, problem.strides, strict=True):
        height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
        flops += 2 * problem.B * height * width * 9 * before * channels
        weights += 9 * before * channels
        first = first or flops
        before = channels
    flops += 2 * problem.B * height * width * before * problem.D
    weights += before * problem.D
    pixels = problem.B * 3 * problem.size[0] * problem.size[1]
    tokens = problem.B * height * width * problem.D
    if backward:
        return Work((2 * (pixels + tokens) + 3 * weights) * itemsize, 3 * flops - first)
    return Work((pixels + tokens + weights) * itemsize, flops)


def seconds(work: Work, ceilings: dict[str, Any], dtype: str) -> float:
    """The larger of the two terms."""
    return max(work.bytes / ceilings["bandwidth"], work.flops / rate(ceilings["rates"], dtype))


def rate(rates: dict[str, float], dtype: str) -> float:
    """FLOP/s of a dtype. Three products of tf32 make one as exact as float32's, which is faster
    than float32's own units and what some libraries do: no less may be taken for the most.
    """
    if dtype != "float32":
        return rates[dtype]
    return max(rates["float32"], rates.get("tf32", 0.0) / 3)


def share(floor: float, measured: float) -> tuple[float, str | None]:
    """Part of the floor's speed that was reached, and what is wrong if it is more than all."""
    reached = floor / measured
    if reached > 1.0:
        return reached, f"{100 * reached:.0f} % of its floor: a fault of the measurement"
    return reached, None

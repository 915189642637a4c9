# SPDX-License-Identifier: Apache-2.0
"""The least that a whole model has to move and compute, from its row.

Bytes: in inference the weights, the images and the logits, once each. No activation counts: what
one image leaves between two layers fits on a chip, and the weights serve all images, so that an
implementation could pass image by image. In training with AdamW the weights and both moments are
read and written, the gradients never need be, and the images are read once.

FLOPs: two for each multiply-add of convolutions, linear layers and the two products of content
attention, in the order in which the models have them. The classifier looks at the class token
alone, so that of the last block only keys and values need all tokens. GPSA's position term is
none: its map is the same for all images, and mixing it with the content's costs no product.
Training is three times the forward, less the gradient of the images, which nobody asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gpu.floors import Work

if TYPE_CHECKING:
    from fastvit.benchmark.rows import Row

_CLASSES = 1000
# Read and written: weight, first and second moment.
_ADAMW = 6


def work(row: Row, parameters: int, batch: int, itemsize: int, *, training: bool) -> Work:
    """Of ``batch`` images through the model of a row that has so many parameters."""
    images = batch * 3 * row.image_size**2
    embedding = list(_embedding(row))
    products = sum(embedding) + sum(_blocks(row)) + row.embed_dim * _CLASSES
    if training:
        moved = _ADAMW * parameters + images
        return Work(moved * itemsize, 2 * batch * (3 * products - embedding[0]))
    moved = parameters + images + batch * _CLASSES
    return Work(moved * itemsize, 2 * batch * products)


def _embedding(row: Row) -> Iterator[int]:
    """Multiply-adds of an image in each layer in front of the blocks."""
    side = row.image_size
    for layer in row.stem:
        side = (side + 2 * layer.padding - layer.kernel) // layer.stride + 1
        yield side**2 * layer.kernel**2 * layer.in_ch * layer.out_ch


def _blocks(row: Row) -> Iterator[int]:
    """Multiply-adds of an image in each block."""
    patches = (row.image_size // 16) ** 2
    for index in range(row.depth):
        local = row.local_up_to_layer is not None and index < row.local_up_to_layer
        tokens = patches if local else patches + 1
        # A class token that no block has seen yet has nothing to say: such a row is none of ours.
        asked = 1 if index == row.depth - 1 else tokens
        yield _block(tokens, asked, row.embed_dim, row.mlp_ratio)


def _block(tokens: int, asked: int, width: int, ratio: int) -> int:
    """One block, of whose tokens ``asked`` are needed afterwards."""
    keys_and_values = 2 * tokens * width**2
    attention = 2 * asked * tokens * width
    # Query, projection, and the two layers of the MLP.
    return keys_and_values + attention + (2 + 2 * ratio) * asked * width**2

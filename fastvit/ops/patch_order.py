# SPDX-License-Identifier: Apache-2.0
"""The two orders in which native kernels read the pixels of a patch, those of memory: planar,
(C, ph, pw), and interleaved, (ph, pw, C), for channels_last images.
"""

from __future__ import annotations

from torch import Tensor


def is_planar(images: Tensor, patch_width: int) -> bool:
    """Whether the pixels of a patch's row follow each other in each channel."""
    return patch_width == 1 or images.stride(3) == 1


def is_interleaved(images: Tensor, patch_width: int) -> bool:
    """Whether the channels of a pixel, and the pixels of a patch's row, follow each other."""
    channels, stride = images.shape[1], images.stride()
    return stride[1] == 1 and (patch_width == 1 or stride[3] == channels)


def matrix(weight: Tensor, interleaved: bool) -> Tensor:
    """The weight (D, C, ph, pw) as (D, K), its columns in the order of the rows'."""
    return (weight.permute(0, 2, 3, 1) if interleaved else weight).flatten(1)


def weight_of(matrix: Tensor, weight: Tensor, interleaved: bool) -> Tensor:
    """The contiguous (D, C, ph, pw) of such a matrix (D, K)."""
    D, channels, ph, pw = weight.shape
    if interleaved:
        return matrix.view(D, ph, pw, channels).permute(0, 3, 1, 2).contiguous()
    return matrix.view(weight.shape)


def image_gradient(dx: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    """Gradient (B, C, H, W) from that of the tokens (B N, D)."""
    batch, channels, height, width = images.shape
    ph, pw = weight.shape[-2:]
    patches = (dx @ weight.flatten(1)).view(batch, height // ph, width // pw, channels, ph, pw)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)

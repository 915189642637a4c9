# SPDX-License-Identifier: Apache-2.0
"""Patch embedding of ViT, Dosovitskiy et al. 2021, arXiv 2010.11929, equation 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.reference.arguments import (
    check_images,
    check_normalization,
    floating_dtype,
    pair,
    untraced,
)

OUTPUT_FORMATS = ("NCHW", "NHWC", "NCL", "NLC")


def normalize_images(
    images: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """uint8 images (B, C, H, W) as ``(images / 255 - mean) / std``; float images as they are.

    Computed in float32 (float64 for a float64 result) and rounded to ``dtype`` once.
    """
    if images.dtype != torch.uint8:
        return images
    x = images.to(torch.promote_types(dtype, torch.float32)) / 255.0
    if mean is not None and std is not None:
        x = (x - _per_channel(x, mean)) / _per_channel(x, std)
    return x.to(dtype)


def _per_channel(x: Tensor, values: Sequence[float]) -> Tensor:
    """(1, C, 1, 1). Made on the device: a copy to it could not be captured in a CUDA graph."""
    numbers = [x.new_full((1,), float(value)) for value in values]
    return torch.cat(numbers or [x.new_empty(0)]).view(1, -1, 1, 1)


def assemble_tokens(x: Tensor, pos_embed: Tensor | None, cls_token: Tensor | None) -> Tensor:
    """Put the class token (1, 1, D) before the tokens (B, N, D) and add the positions.

    ``pos_embed`` (1, N, D) belongs to the patches alone, (1, N + 1, D) to the class token too.
    The result has the dtype of ``x``, whatever theirs.
    """
    pos_embed = None if pos_embed is None else pos_embed.to(x.dtype)
    if pos_embed is not None and _belongs_to_patches(pos_embed, x):
        x = x + pos_embed
        pos_embed = None
    if cls_token is not None:
        x = torch.cat((cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x), dim=1)
    return x if pos_embed is None else x + pos_embed


@untraced
def _belongs_to_patches(pos_embed: Tensor, x: Tensor) -> bool:
    return pos_embed.shape[1] == x.shape[1]


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    cls_token: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Patches to tokens by a strided convolution: what :func:`fastvit.functional.patch_embed`
    computes, with its arguments. Returns (B, N[+1], D).
    """
    x = normalize_images(images, mean, std, weight.dtype)
    x = F.conv2d(x, weight, bias, stride=weight.shape[-2:])
    return assemble_tokens(x.flatten(2).transpose(1, 2), pos_embed, cls_token)


def resample_patch_weight(weight: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Resize the kernels of a patch embedding (D, C, ph, pw) to another patch size.

    PI-resize of FlexiViT (Beyer et al. 2023, arXiv 2212.08013, section 3.4): the kernels that
    give patches resized by the bicubic map B the tokens that the old kernels gave the originals,
    ``pinv(B^T) w``, computed in float64.
    """
    old_size = tuple(weight.shape[-2:])
    if old_size == tuple(patch_size):
        return weight
    pixels = math.prod(old_size)
    basis = torch.eye(pixels, dtype=torch.float64, device=weight.device).view(-1, 1, *old_size)
    # Row p holds the resized image of pixel p alone, so this is B transposed: (old, new).
    resize = F.interpolate(basis, size=patch_size, mode="bicubic", antialias=True).flatten(1)
    flat = weight.flatten(2).double() @ torch.linalg.pinv(resize).T
    return flat.view(*weight.shape[:2], *patch_size).to(weight.dtype)


class PatchEmbed(nn.Module):
    """Image to patch tokens, with timm's arguments, behaviour, parameters and keys.

    Args:
        img_size: (height, width) in pixels, or one number; None accepts any size.
        patch_size: (height, width) of a patch in pixels, or one number.
        in_chans: C.
        embed_dim: D.
        norm_layer: called with ``embed_dim``, device and dtype for a norm after the projection.
        flatten: (B, N, D); otherwise (B, D, gh, gw).
        output_fmt: "NCHW", "NHWC", "NCL" or "NLC" instead of ``flatten``.
        bias: whether the projection has a bias.
        strict_img_size: refuse any other size than ``img_size``.
        dynamic_img_pad: pad the bottom and the right with zeros to whole patches.
        mean, std: C numbers each in 0..1 that normalise uint8 images; without them uint8 is
            divided by 255. Padding then means that the normalised image is zero.

    Shapes: images (B, C, H, W), floating or uint8. Parameters: ``proj`` (D, C, ph, pw), ``norm``.

    Raises:
        ValueError: an unknown ``output_fmt``, a size that is not positive, mean and std that do
            not fit; at the call, an image of the wrong size or with other channels, or one that
            does not divide into patches.
        TypeError: at the call, images neither floating nor uint8.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if output_fmt is not None and str(output_fmt) not in OUTPUT_FORMATS:
            raise ValueError(
                f"output_fmt: expected one of {', '.join(OUTPUT_FORMATS)}, got {output_fmt!r}"
            )
        check_normalization(mean, std, in_chans)
        self.in_chans = in_chans
        self.patch_size = pair(patch_size, "patch_size")
        self._set_img_size(img_size)
        self.flatten = flatten and output_fmt is None
        self.output_fmt = "NCHW" if output_fmt is None else str(output_fmt)
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)
        self.proj = nn.Conv2d(
            in_chans,
            embed_dim,
            kernel_size=self.patch_size,
            stride=self.patch_size,
            bias=bias,
            **factory,
        )
        self.norm = norm_layer(embed_dim, **factory) if norm_layer else nn.Identity()

    def _set_img_size(self, img_size: int | tuple[int, int] | None) -> None:
        self.img_size = None if img_size is None else pair(img_size, "img_size")
        self.grid_size: tuple[int, int] | None = None
        self.num_patches: int | None = None
        if self.img_size is not None:
            (height, width), (ph, pw) = self.img_size, self.patch_size
            self.grid_size = (height // ph, width // pw)
            self.num_patches = math.prod(self.grid_size)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the image size, or the patch size by resampling the kernels."""
        if patch_size is not None and pair(patch_size, "patch_size") != self.patch_size:
            self.patch_size = pair(patch_size, "patch_size")
            weight = resample_patch_weight(self.proj.weight.detach(), self.patch_size)
            requires_grad = self.proj.weight.requires_grad
            self.proj.weight = nn.Parameter(weight, requires_grad=requires_grad)
            self.proj.kernel_size = self.proj.stride = self.patch_size
        self._set_img_size(self.img_size if img_size is None else img_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per token: the larger side of a patch, or (height, width)."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: Sequence[int]) -> tuple[int, int]:
        """The grid (gh, gw) of an image of this size, padding included."""
        (height, width), (ph, pw) = img_size, self.patch_size
        if self.dynamic_img_pad:
            return -(-height // ph), -(-width // pw)
        return height // ph, width // pw

    @untraced
    def _check_size(self, images: Tensor) -> None:
        check_images("images", images, self.in_chans)
        size, (ph, pw) = (images.shape[-2], images.shape[-1]), self.patch_size
        if self.img_size is not None and self.strict_img_size and size != self.img_size:
            raise ValueError(
                f"images: expected {self.img_size[0]} x {self.img_size[1]} pixels, "
                f"got {size[0]} x {size[1]} (strict_img_size=False accepts other sizes)"
            )
        if not self.dynamic_img_pad and (size[0] % ph or size[1] % pw):
            raise ValueError(
                f"images: expected sides divisible by the patch size {ph} x {pw}, "
                f"got {size[0]} x {size[1]} (dynamic_img_pad=True pads)"
            )

    def _normalize(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images
        return normalize_images(images, self.mean, self.std, floating_dtype(self.proj))

    def _pad(self, images: Tensor) -> Tensor:
        """Check the size and pad to whole patches; padding normalises uint8 images first."""
        self._check_size(images)
        (ph, pw), (height, width) = self.patch_size, images.shape[-2:]
        if not self.dynamic_img_pad or (height % ph == 0 and width % pw == 0):
            return images
        return F.pad(self._normalize(images), (0, -width % pw, 0, -height % ph))

    def _finish(self, tokens: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Tokens (B, N, D) in the output format, then the norm."""
        if not self.flatten and self.output_fmt != "NLC":
            channels_first = tokens.transpose(1, 2)
            if self.output_fmt == "NCHW":
                # Not by unflatten, for which ONNX's older export fixes the batch size.
                tokens = channels_first.reshape(*channels_first.shape[:2], *grid_size)
            elif self.output_fmt == "NHWC":
                B, _N, D = tokens.shape
                tokens = tokens.reshape(B, *grid_size, D)
            else:
                tokens = channels_first
        return self.norm(tokens)

    def forward(self, images: Tensor) -> Tensor:
        images = self._pad(images)
        grid_size = self.dynamic_feat_size(images.shape[-2:])
        x = self.proj(self._normalize(images))
        return self._finish(x.flatten(2).transpose(1, 2), grid_size)

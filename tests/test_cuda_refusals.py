# SPDX-License-Identifier: Apache-2.0
"""What the binding of the CUDA kernels refuses, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_kernels import (
    MEAN,
    STD,
    draw_images,
    lay_out,
    poisoned,
    problem,
)
from torch import Tensor


def forward_call() -> dict[str, Any]:
    p = problem(batch=2, image=(8, 12), patch=(4, 4), width=8)
    return {
        "images": p["images"], "weight": p["weight"].flatten(1), "bias": p["bias"],
        "pos_embed": p["pos_embed"], "cls_token": p["cls_token"], "mean": None, "std": None,
        "patch_height": 4, "patch_width": 4, "interleaved": False, "tf32": False,
        "out": poisoned((2, 7, 8), torch.float32),
    }  # fmt: skip


def uint8_call(**changes: Any) -> dict[str, Any]:
    images = draw_images((2, 3, 8, 12), torch.uint8)
    return {"images": images, "mean": MEAN[:3], "std": STD[:3], **changes}


def every_other(*shape: int) -> Tensor:
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


MANY = torch.zeros(1, 129, 4, 4, dtype=torch.uint8)
DOUBLE = torch.float64

FORWARD_REFUSALS = {
    "no tensor": ({"images": [1.0]}, TypeError, r"images: expected a torch.Tensor .*, got list"),
    "no memory": ({"images": torch.zeros(2, 3, 8, 12, device="meta")}, ValueError, "images: "),
    "rank of weight": (
        {"weight": torch.randn(8, 12, 4)}, ValueError,
        r"weight: expected 2 dimensions, got shape \(8, 12, 4\)",
    ),
    "shape of a whole weight": (
        {"weight": torch.randn(8, 3, 2, 8)}, ValueError,
        r"weight: expected shape \(8, 3, 4, 4\), got \(8, 3, 2, 8\)",
    ),
    "stride of a whole weight": (
        {"weight": every_other(8, 3, 4, 4)}, ValueError, "weight: expected a contiguous tensor",
    ),
    "a whole weight for channels_last": (
        {"images": lay_out(torch.randn(2, 3, 8, 12), True), "interleaved": True,
         "weight": torch.randn(8, 3, 4, 4)}, ValueError, "weight: expected 2 dimensions",
    ),
    "gaps for the portable kernel": (
        {"weight": torch.randn(8, 56)[:, :48]}, ValueError, "weight: expected a contiguous tensor",
    ),
    "gaps in float32": (
        {"weight": torch.randn(8, 56)[:, :48], "hopper": True}, ValueError,
        "weight: expected a contiguous tensor",
    ),
    "rows that overlap": (
        {"weight": torch.randn(1, 48).expand(8, -1)}, ValueError,
        "weight: expected a contiguous tensor",
    ),
    "stride of weight": (
        {"weight": every_other(8, 48)}, ValueError, "weight: expected a contiguous tensor",
    ),
    "dtype of weight": (
        {"weight": torch.randn(8, 48, dtype=DOUBLE)}, TypeError,
        "weight: expected float32 or float16 or bfloat16, got float64",
    ),
    "dtype of images": (
        {"images": torch.zeros(2, 3, 8, 12).half()}, TypeError,
        "images: expected float32 or uint8, got float16",
    ),
    "rank of images": (
        {"images": torch.randn(3, 8, 12)}, ValueError,
        r"images: expected 4 dimensions, got shape \(3, 8, 12\)",
    ),
    "patch of nothing": (
        {"patch_height": 0}, ValueError, "patch size: expected positive sides, got 0 x 4",
    ),
    "part of a patch": (
        {"patch_width": 5}, ValueError,
        "images: expected sides divisible by the patch size 4 x 5, got 8 x 12",
    ),
    "pixels apart": (
        {"images": every_other(2, 3, 8, 12)}, ValueError,
        r"images: expected the pixels of a row to follow each other .*any and 1.* got strides "
        r"\d+ and 2",
    ),
    "another layout": (
        {"interleaved": True}, ValueError,
        r"images: expected the pixels of a row to follow each other .*1 and 3.* got strides 96 and",
    ),
    "too many patches": (
        {"images": torch.zeros(1, 3, 1, 1).expand(2**31, -1, -1, -1), "patch_height": 1,
         "patch_width": 1}, ValueError,
        r"images: expected at most 2\^30 patches",
    ),
    "no images": (
        {"images": torch.zeros(0, 3, 8, 12)}, ValueError,
        "images: expected at least one patch with a channel, got none",
    ),
    "no channels": (
        {"images": torch.zeros(2, 0, 8, 12)}, ValueError, "images: expected at least one patch",
    ),
    "mean of floats": (
        {"mean": MEAN[:3], "std": STD[:3]}, ValueError,
        "mean, std: expected None for images that are not uint8, got numbers",
    ),
    "std of floats": ({"std": STD[:3]}, ValueError, "mean, std: expected None"),
    "too few means": (
        uint8_call(mean=[0.5]), ValueError,
        "mean: expected 3 values, one for each image channel of images, got 1",
    ),
    "std of 0": (
        uint8_call(std=[1.0, 0.0, 1.0]), ValueError,
        "std: expected values other than 0, got 0 for channel 1",
    ),
    "no std": (
        uint8_call(std=None), TypeError, "std: expected a sequence of numbers, got NoneType",
    ),
    "129 channels": (
        {"images": MANY, "mean": [0.5] * 129, "std": [1.0] * 129}, ValueError,
        "images: expected at most 128 channels of uint8 on a GPU, got 129",
    ),
    "columns of weight": (
        {"weight": torch.randn(8, 47)}, ValueError,
        r"weight: expected shape \(8, 48\), got \(8, 47\)",
    ),
    "shape of bias": (
        {"bias": torch.randn(7)}, ValueError, r"bias: expected shape \(8,\), got \(7,\)",
    ),
    "dtype of bias": (
        {"bias": torch.randn(8).half()}, TypeError, "bias: expected float32 like weight, got float",
    ),
    "stride of bias": ({"bias": every_other(8)}, ValueError, "bias: expected a contiguous tensor"),
    "shape of class": (
        {"cls_token": torch.randn(8)}, ValueError,
        r"cls_token: expected shape \(1, 1, 8\), got \(8,\)",
    ),
    "dtype of class": (
        {"cls_token": torch.randn(1, 1, 8, dtype=DOUBLE)}, TypeError,
        "cls_token: expected float32 like weight, got float64",
    ),
    "shape of positions": (
        {"pos_embed": torch.randn(1, 5, 8)}, ValueError,
        r"pos_embed: expected shape \(1, 6, 8\), got \(1, 5, 8\)",
    ),
    "a position without its token": (
        {"pos_embed": torch.randn(1, 7, 8), "cls_token": None}, ValueError,
        r"pos_embed: expected shape \(1, 6, 8\), got \(1, 7, 8\)",
    ),
    "dtype of positions": (
        {"pos_embed": torch.randn(1, 6, 8).bfloat16()}, TypeError,
        "pos_embed: expected float32 like weight, got bfloat16",
    ),
    "shape of out": (
        {"out": torch.zeros(2, 6, 8)}, ValueError,
        r"out: expected shape \(2, 7, 8\), got \(2, 6, 8\)",
    ),
    "dtype of out": (
        {"out": torch.zeros(2, 7, 8).half()}, TypeError, "out: expected float32 like weight",
    ),
    "stride of out": (
        {"out": every_other(2, 7, 8)}, ValueError, "out: expected a contiguous tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARD_REFUSALS)
def test_forward_refuses(kernels, name):
    changes, error, message = FORWARD_REFUSALS[name]
    with pytest.raises(error, match=message):
        kernels.module.patch_embed(**(forward_call() | changes))


def fold_call() -> dict[str, Any]:
    return {
        "weight": torch.randn(8, 3, 4, 4), "bias": torch.randn(8), "mean": MEAN[:3],
        "std": STD[:3], "interleaved": False, "folded": torch.zeros(8, 48),
        "folded_bias": torch.zeros(8),
    }  # fmt: skip


FOLD_REFUSALS = {
    "rank of weight": ({"weight": torch.randn(8, 48)}, ValueError, "weight: expected 4 dimensions"),
    "stride of weight": (
        {"weight": every_other(8, 3, 4, 4)}, ValueError, "weight: expected a contiguous tensor",
    ),
    "dtype of weight": (
        {"weight": torch.randn(8, 3, 4, 4, dtype=DOUBLE)}, TypeError,
        "weight: expected float32 or float16 or bfloat16, got float64",
    ),
    "too few means": (
        {"mean": [0.5]}, ValueError,
        "mean: expected 3 values, one for each image channel of weight, got 1",
    ),
    "no mean": ({"mean": None}, TypeError, "mean: expected a sequence of numbers, got NoneType"),
    "std of 0": ({"std": [0.0] * 3}, ValueError, "std: expected values other than 0"),
    "129 channels": (
        {"weight": torch.zeros(8, 129, 1, 1), "mean": [0.5] * 129, "std": [1.0] * 129}, ValueError,
        "weight: expected at most 128 channels of uint8 on a GPU, got 129",
    ),
    "shape of bias": ({"bias": torch.randn(7)}, ValueError, r"bias: expected shape \(8,\)"),
    "dtype of bias": (
        {"bias": torch.randn(8).half()}, TypeError, "bias: expected float32 like weight",
    ),
    "shape of folded": (
        {"folded": torch.zeros(8, 3, 4, 4)}, ValueError, r"folded: expected shape \(8, 48\)",
    ),
    "dtype of folded": (
        {"folded": torch.zeros(8, 48).half()}, TypeError, "folded: expected float32 like weight",
    ),
    "rows of folded that overlap": (
        {"folded": torch.zeros(1, 48).expand(8, -1)}, ValueError,
        "folded: expected a contiguous tensor",
    ),
    "stride of folded": (
        {"folded": every_other(8, 48)}, ValueError, "folded: expected a contiguous tensor",
    ),
    "shape of folded_bias": (
        {"folded_bias": torch.zeros(9)}, ValueError, r"folded_bias: expected shape \(8,\)",
    ),
    "dtype of folded_bias": (
        {"folded_bias": torch.zeros(8).half()}, TypeError,
        "folded_bias: expected float32, got float16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLD_REFUSALS)
def test_fold_refuses(kernels, name):
    changes, error, message = FOLD_REFUSALS[name]
    with pytest.raises(error, match=message):
        kernels.module.fold_patch_weight(**(fold_call() | changes))


def gradient_call() -> dict[str, Any]:
    return {
        "images": torch.randn(2, 3, 8, 12), "grad": torch.randn(2, 6, 8), "mean": None,
        "std": None, "dbias": None, "patch_height": 4, "patch_width": 4, "interleaved": False,
        "tf32": False, "partial": torch.zeros(2, 8, 48), "dweight": torch.zeros(8, 48),
    }  # fmt: skip


GRADIENT_REFUSALS = {
    "dtype of grad": (
        {"grad": torch.randn(2, 6, 8, dtype=DOUBLE)}, TypeError,
        "grad: expected float32 or float16 or bfloat16, got float64",
    ),
    "dtype of images": (
        {"images": torch.randn(2, 3, 8, 12).half()}, TypeError,
        "images: expected float32 or uint8, got float16",
    ),
    "rank of grad": ({"grad": torch.randn(12, 8)}, ValueError, "grad: expected 3 dimensions"),
    "shape of grad": (
        {"grad": torch.randn(2, 7, 8)}, ValueError,
        r"grad: expected shape \(2, 6, 8\), got \(2, 7, 8\)",
    ),
    "stride of grad": (
        {"grad": every_other(2, 6, 8)}, ValueError,
        "grad: expected contiguous rows, got a stride of 2",
    ),
    "an expanded row": (
        {"grad": torch.randn(2, 6, 1).expand(-1, -1, 8)}, ValueError,
        "grad: expected contiguous rows, got a stride of 0",
    ),
    "part of a patch": ({"patch_width": 5}, ValueError, "images: expected sides divisible"),
    "no images": (
        {"images": torch.zeros(0, 3, 8, 12)}, ValueError, "images: expected at least one patch",
    ),
    "mean of floats": ({"mean": MEAN[:3], "std": STD[:3]}, ValueError, "mean, std: expected None"),
    "dbias of floats": (
        {"dbias": torch.zeros(8)}, ValueError,
        "dbias: expected None, since the images are not uint8",
    ),
    "no dbias": (
        uint8_call(), ValueError, "dbias: expected a tensor, since the images are uint8",
    ),
    "dtype of dbias": (
        uint8_call(dbias=torch.zeros(8).half()), TypeError, "dbias: expected float32, got float16",
    ),
    "shape of dbias": (
        uint8_call(dbias=torch.zeros(7)), ValueError, r"dbias: expected shape \(8,\), got \(7,\)",
    ),
    "129 channels": (
        {"images": MANY, "mean": [0.5] * 129, "std": [1.0] * 129, "dbias": torch.zeros(8)},
        ValueError, "images: expected at most 128 channels of uint8 on a GPU, got 129",
    ),
    "rank of partial": (
        {"partial": torch.zeros(8, 48)}, ValueError, "partial: expected 3 dimensions",
    ),
    "shape of partial": (
        {"partial": torch.zeros(2, 8, 47)}, ValueError,
        r"partial: expected shape \(2, 8, 48\), got \(2, 8, 47\)",
    ),
    "dtype of partial": (
        {"partial": torch.zeros(2, 8, 48).half()}, TypeError, "partial: expected float32, got",
    ),
    "no share": (
        {"partial": torch.zeros(0, 8, 48)}, ValueError,
        "partial: expected 1 to 12 shares, got 0",
    ),
    "too many shares": (
        {"partial": torch.zeros(13, 8, 48)}, ValueError,
        "partial: expected 1 to 12 shares, got 13",
    ),
    "shape of dweight": (
        {"dweight": torch.zeros(8, 3, 4, 4)}, ValueError, r"dweight: expected shape \(8, 48\)",
    ),
    "dtype of dweight": (
        {"dweight": torch.zeros(8, 48).half()}, TypeError, "dweight: expected float32 like grad",
    ),
    "stride of dweight": (
        {"dweight": every_other(8, 48)}, ValueError, "dweight: expected a contiguous tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADIENT_REFUSALS)
def test_weight_gradient_refuses(kernels, name):
    changes, error, message = GRADIENT_REFUSALS[name]
    with pytest.raises(error, match=message):
        kernels.module.patch_weight_gradient(**(gradient_call() | changes))


def test_no_outputs_launch_nothing(kernels):
    out = torch.zeros(2, 7, 0)
    rest = {"weight": torch.zeros(0, 48), "bias": torch.zeros(0), "pos_embed": None}
    kernels.module.patch_embed(
        **(forward_call() | rest | {"cls_token": torch.zeros(1, 1, 0), "out": out})
    )
    empty = {"grad": torch.zeros(2, 6, 0), "partial": torch.zeros(2, 0, 48)}
    kernels.module.patch_weight_gradient(
        **(gradient_call() | empty | {"dweight": torch.zeros(0, 48)})
    )

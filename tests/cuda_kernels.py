# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the patch embedding as the emulator runs them, their problems and the numbers
rule for them: what test_cuda_forward.py, test_cuda_gradient.py and test_cuda_refusals.py share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import reference
from fastvit.testing import assert_agreement

NAN, INF = float("nan"), float("inf")
MEAN, STD = (0.485, 0.1, 0.406, 0.9), (0.229, 0.224, 1.0, 0.05)
TF32_FLOOR = 4 * 2.0**-10
KINDS = {
    "ieee": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
}
# Multiprocessors and bytes of shared memory, of a block and in all: they decide how many tiles are
# in flight, 3 and 4 on an H100, 2 and 4 on an A100, 3 of any on the rest.
H100 = (132, 227 * 1024, 228 * 1024)
DEVICES = {"sm_80": (108, 163 * 1024, 164 * 1024), "sm_89": (142, 99 * 1024, 100 * 1024)}

Numbers = Sequence[float] | None


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.full(tuple(shape), NAN, dtype=dtype)


class Kernels:
    """Calls the module with outputs full of NaN and no memory allowed but that of the tensors."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def _allow(self, *tensors: Tensor | None, writes: bool = False) -> None:
        """The bytes of the elements, and none between them."""
        for tensor in tensors:
            if tensor is None or tensor.numel() == 0:
                continue
            places = torch.zeros((), dtype=torch.int64)
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
                places = places[..., None] + torch.arange(size) * stride
            places = places.flatten().unique()
            breaks = (places.diff() != 1).nonzero().flatten() + 1
            for run in places.tensor_split(breaks):
                begin = tensor.data_ptr() + int(run[0]) * tensor.element_size()
                self.module.allow(begin, len(run) * tensor.element_size(), writes)

    def allow(self, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> None:
        self.module.clear_tensors()
        self._allow(*inputs)
        self._allow(*outputs, writes=True)

    def fold(
        self, weight: Tensor, bias: Tensor | None, mean: Numbers, std: Numbers, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        folded = poisoned((weight.shape[0], weight[0].numel()), weight.dtype)
        folded_bias = poisoned(weight.shape[:1], torch.float32)
        self.allow((weight, bias), (folded, folded_bias))
        self.module.fold_patch_weight(weight, bias, mean, std, interleaved, folded, folded_bias)
        return folded, folded_bias

    def forward(
        self,
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        pos_embed: Tensor | None = None,
        cls_token: Tensor | None = None,
        mean: Numbers = None,
        std: Numbers = None,
        interleaved: bool = False,
        tf32: bool = False,
        small: bool | None = True,
    ) -> Tensor:
        if images.dtype == torch.uint8:
            matrix, bias = self.fold(weight, bias, mean, std, interleaved)
        else:
            matrix = (weight.permute(0, 2, 3, 1) if interleaved else weight).flatten(1).contiguous()
        (D, _, ph, pw), (B, _, height, width) = weight.shape, images.shape
        tokens = (height // ph) * (width // pw) + (cls_token is not None)
        out = poisoned((B, tokens, D), weight.dtype)
        self.allow((images, matrix, bias, pos_embed, cls_token), (out,))
        self.module.patch_embed(
            images, matrix, bias, pos_embed, cls_token, mean, std, ph, pw, interleaved, tf32, out,
            small,
        )  # fmt: skip
        return out

    def weight_gradient(
        self,
        images: Tensor,
        grad: Tensor,
        patch: tuple[int, int],
        *,
        mean: Numbers = None,
        std: Numbers = None,
        interleaved: bool = False,
        tf32: bool = False,
        splits: int = 2,
    ) -> Tensor:
        C, D = images.shape[1], grad.shape[2]
        columns = C * patch[0] * patch[1]
        raw = images.dtype == torch.uint8
        dbias = grad.sum((0, 1), dtype=torch.float32) if raw else None
        partial = poisoned((splits, D, columns), torch.float32)
        dweight = poisoned((D, columns), grad.dtype)
        self.allow((images, grad, dbias), (partial, dweight))
        self.module.patch_weight_gradient(
            images, grad, mean, std, dbias, *patch, interleaved, tf32, partial, dweight
        )
        if interleaved:
            return dweight.view(D, *patch, C).permute(0, 3, 1, 2)
        return dweight.view(D, C, *patch)


def double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def lay_out(images: Tensor, interleaved: bool) -> Tensor:
    return images.contiguous(
        memory_format=torch.channels_last if interleaved else torch.contiguous_format
    )


def draw_images(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(256, tuple(shape), dtype=dtype)
    return torch.randn(*shape).to(dtype)


def problem(
    batch=3, channels=3, image=(32, 24), patch=(16, 8), width=72, dtype=torch.float32, *,
    uint8=False, bias=True, positions="patches", class_token=True, interleaved=False,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of ``reference.patch_embed``."""
    patches = (image[0] // patch[0]) * (image[1] // patch[1])
    scale = (channels * patch[0] * patch[1]) ** -0.5
    images = draw_images((batch, channels, *image), torch.uint8 if uint8 else dtype)
    p: dict[str, Any] = {
        "images": lay_out(images, interleaved),
        "weight": (torch.randn(width, channels, *patch) * scale).to(dtype),
    }
    if uint8:
        p |= {"mean": MEAN[:channels], "std": STD[:channels]}
    if bias:
        p["bias"] = torch.randn(width).to(dtype)
    if positions:
        p["pos_embed"] = torch.randn(1, patches + (positions == "all"), width).to(dtype)
    if class_token:
        p["cls_token"] = torch.randn(1, 1, width).to(dtype)
    return p


def check_forward(kernels: Kernels, p: dict[str, Any], *, tf32=False, **options: Any) -> None:
    actual = kernels.forward(**p, tf32=tf32, **options)
    p = {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in p.items()}
    assert_agreement(
        actual,
        reference.patch_embed(**p).to(actual.dtype),
        reference.patch_embed(**{name: double(x) for name, x in p.items()}),
        floor=TF32_FLOOR if tf32 else 0.0,
    )


def reference_gradient(p: dict[str, Any], grad: Tensor, dtype: torch.dtype) -> Tensor:
    weight = p["weight"].to(dtype).requires_grad_()
    images = p["images"] if p["images"].dtype == torch.uint8 else p["images"].to(dtype)
    out = reference.patch_embed(images, weight, mean=p.get("mean"), std=p.get("std"))
    out.backward(grad.to(dtype))
    return weight.grad


def check_gradient(
    kernels: Kernels, p: dict[str, Any], grad: Tensor, *, tf32=False, limit=None, **options: Any
) -> None:
    actual = kernels.weight_gradient(
        p["images"], grad, p["weight"].shape[2:], mean=p.get("mean"), std=p.get("std"), tf32=tf32,
        **options,
    )  # fmt: skip
    expected = reference_gradient(p, grad, torch.float64)
    assert_agreement(
        actual,
        reference_gradient(p, grad, grad.dtype),
        expected,
        floor=TF32_FLOOR if tf32 else 0.0,
    )
    if limit is not None:
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert error <= limit


every_kind = pytest.mark.parametrize("kind", KINDS)
every_input = pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
every_layout = pytest.mark.parametrize(
    "interleaved", [False, True], ids=["planar", "channels_last"]
)
every_tile = pytest.mark.parametrize("small", [False, True], ids=["large", "small"])

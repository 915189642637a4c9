# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the weight's gradient, in the emulator as in test_cuda_forward.py."""

from __future__ import annotations

import pytest
import torch
from cuda_kernels import (
    DEVICES,
    INF,
    KINDS,
    MEAN,
    NAN,
    STD,
    check_gradient,
    draw_images,
    every_input,
    every_kind,
    every_layout,
    problem,
)


@every_layout
@every_input
@every_kind
def test_weight_gradient(kernels, kind, uint8, interleaved):
    dtype, tf32 = KINDS[kind]
    p = problem(dtype=dtype, uint8=uint8, interleaved=interleaved, batch=13, width=40)
    # Of the patch tokens behind the class token, as autograd hands it over.
    grad = torch.randn(13, 7, 40).to(dtype)[:, 1:]
    limit = 1e-5 if kind == "ieee" else None
    check_gradient(kernels, p, grad, tf32=tf32, interleaved=interleaved, splits=3, limit=limit)


GRADIENTS = {
    "one share": {"splits": 1},
    "a share for each patch": {"splits": 18},
    "shares without patches": {"splits": 11},
    "no class token": {"prefix": 0},
    "D not divisible by 4": {"width": 41},
    "D not divisible by 8": {"width": 42, "prefix": 0},
    "D = 1": {"width": 1},
    "several tiles": {"width": 136, "channels": 4, "batch": 1, "image": (16, 16), "splits": 1},
    "K = 1": {"channels": 1, "patch": (1, 1), "image": (4, 4)},
    "patch 14": {"patch": (14, 14), "image": (28, 42)},
    "patch 7, C=1": {"patch": (7, 7), "image": (14, 21), "channels": 1},
}


@every_input
@pytest.mark.parametrize("name", GRADIENTS)
def test_weight_gradient_of_every_geometry(kernels, name, uint8):
    options = {"width": 24, "splits": 2, "prefix": 1, **GRADIENTS[name]}
    splits, prefix = options.pop("splits"), options.pop("prefix")
    turn = list(GRADIENTS).index(name)
    for i, dtype in enumerate((torch.bfloat16, torch.float32)):
        interleaved = bool((turn + i) & 1)
        p = problem(**options, dtype=dtype, uint8=uint8, interleaved=interleaved)
        patches = p["pos_embed"].shape[1]
        grad = torch.randn(len(p["images"]), patches + prefix, options["width"])
        grad = grad.to(dtype)[:, prefix:]
        limit = 1e-5 if dtype == torch.float32 else None
        check_gradient(kernels, p, grad, interleaved=interleaved, splits=splits, limit=limit)


GRADS = {
    "expanded over the images": lambda g: g[:1].expand(3, -1, -1),
    "expanded over the tokens": lambda g: g[:, :1].expand(-1, 6, -1),
    "some outputs": lambda g: g[..., 1:],
    "an offset of one element": lambda g: (
        g.new_zeros(g.numel() + 1)[1:].view(g.shape).copy_(g)[:, :, :23]
    ),
    "tokens before images": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("name", GRADS)
def test_strided_gradients(kernels, name):
    for dtype in (torch.float16, torch.float32):
        grad = GRADS[name](torch.randn(3, 6, 24).to(dtype))
        p = problem(dtype=dtype, width=grad.shape[2])
        check_gradient(kernels, p, grad)


@pytest.mark.parametrize("kind", ["bfloat16", "tf32"])
def test_gradient_bits_depend_neither_on_order_nor_device(kernels, kind):
    dtype, tf32 = KINDS[kind]
    images, grad = draw_images((30, 3, 32, 24), torch.uint8), torch.randn(30, 6, 40).to(dtype)

    def run():
        return kernels.weight_gradient(
            images, grad, (16, 8), mean=MEAN[:3], std=STD[:3], tf32=tf32, splits=1
        )

    first = run()
    kernels.module.set_shuffle(1)
    assert torch.equal(first, run())
    kernels.module.set_device(*DEVICES["sm_89"])
    assert torch.equal(first, run())


@every_input
@every_kind
def test_nan_and_inf_stay_in_their_part_of_the_gradient(kernels, kind, uint8):
    dtype, tf32 = KINDS[kind]
    images = draw_images((3, 3, 10, 18), torch.uint8 if uint8 else dtype)
    grad = torch.randn(3, 6, 21).to(dtype)
    numbers = {"mean": MEAN[:3], "std": STD[:3]} if uint8 else {}

    def run():
        return kernels.weight_gradient(images, grad, (5, 6), tf32=tf32, **numbers)

    clean = run()
    # The first of the second share, and the last of all.
    grad[1, 3, 2], grad[2, 5, 20] = NAN, INF
    rows = torch.ones(21, dtype=torch.bool)
    rows[2] = rows[20] = False
    dirty = run()
    assert torch.equal(dirty[rows], clean[rows])
    assert dirty[2].isnan().all()
    assert not dirty[20].isfinite().any()
    if uint8:
        return
    grad[1, 3, 2] = grad[2, 5, 20] = 1
    clean = run()
    images[0, 1, 4, 5] = INF
    dirty = run()
    at = torch.zeros(3, 5, 6, dtype=torch.bool)
    at[1, 4, 5] = True
    assert torch.equal(dirty[:, ~at], clean[:, ~at])
    assert not dirty[:, at].isfinite().any()

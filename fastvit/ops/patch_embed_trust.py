# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels of the patch embedding must show before ``auto`` takes them.

Small images in every layout and both tiles, and one of many small patches that gives all
multiprocessors several tiles; computed on the GPU and, by PyTorch's operators, on the processor in
float64 and in the call's dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit import _native, testing
from fastvit.ops import patch_embed_cuda, patch_embed_torch, patch_order, trust
from fastvit.ops.patch_embed_cuda import Kernels
from fastvit.ops.trust import Candidate, source_hash
from fastvit.testing import Agreement, agreement

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: The processor has no tf32 to compare with: four of its units in the last place.
_TF32 = 4 * 2.0**-10


class _Case(NamedTuple):
    """Images whose rows are copied 16 bytes, 4 bytes or one element at a time."""

    name: str
    patch: tuple[int, int]
    size: tuple[int, int]
    outputs: int
    layout: torch.memory_format = torch.contiguous_format
    #: Columns left of the images in a larger one.
    crop: int = 0


_LAYOUTS = (
    _Case("16x16", (16, 16), (48, 80), 136),
    _Case("14x14", (14, 14), (42, 70), 130),
    _Case("16x16 cropped", (16, 16), (32, 48), 137, crop=1),
    _Case("16x16 channels_last", (16, 16), (48, 80), 136, torch.channels_last),
)
#: Rows of the largest tile.
_TILE = 128


def _cases(device: torch.device) -> tuple[_Case, ...]:
    side = 4 * math.isqrt(2 * _TILE * patch_embed_cuda.multiprocessors(device))
    half = side // 2
    return (
        *_LAYOUTS,
        _Case("many tiles", (4, 4), (side, side + 4), 200),
        # The rows of its weight begin at no multiples of 16 bytes.
        _Case("many tiles of 2x2", (2, 2), (half, half + 2), 200),
    )


#: Kernels of calls that are trusted: they need not be named and looked up again.
_settled: dict[tuple[Any, ...], Kernels] = {}


def trusted_kernels(direction: str, images: Tensor, weight: Tensor, asked: str) -> Kernels | None:
    """The kernels to run in the "forward" or "backward", or None if none are trusted.

    Raises:
        RuntimeError: they failed their check, and were ``asked`` for by name.
    """
    dtype, device = weight.dtype, weight.device
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    raw = images.dtype == torch.uint8
    call = (trust.generation(), direction, device, dtype, raw, tf32)
    found = _settled.get(call)
    if found is not None:
        return found
    for kernels in _choices(direction, dtype, device, tf32):
        candidate = _candidate(direction, kernels, device, dtype, raw)
        # One that is faster may fail: the other is what was asked for, too.
        if trust.trusts(candidate, "auto" if kernels.hopper else asked):
            if trust.is_known(candidate):
                _settled[call] = kernels
            return kernels
    return None


def _choices(
    direction: str, dtype: torch.dtype, device: torch.device, tf32: bool
) -> Iterator[Kernels]:
    """The kernels for a device, the fastest first."""
    built = "90a" in _native.load().build_info()["cuda_archs"]
    if direction == "forward" and dtype != torch.float32 and built and _is_hopper(device):
        yield Kernels(tf32, hopper=True)
    yield Kernels(tf32)


def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def _candidate(
    direction: str, kernels: Kernels, device: torch.device, dtype: torch.dtype, raw: bool
) -> Candidate:
    capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    arithmetic = str(dtype).removeprefix("torch.") + (",tf32" if kernels.tf32 else "")
    pixels = "uint8" if raw else "float"
    path = "wgmma" if kernels.hopper else "mma"
    key = f"patch_embed/{direction}/{arithmetic}/{pixels}/{path}/{code()}/{capability}"
    check = functools.partial(_check, direction, kernels, device, dtype, raw)
    if kernels.hopper:
        return Candidate(key, check, instead="the portable CUDA kernel")
    return Candidate(key, check)


def code() -> str:
    """The kernels at hand, as keys name them."""
    build = _native.load().build_info()
    return f"{_hash()}-{build['sources']}/nvcc-{build['nvcc']}"


@functools.cache
def _hash() -> str:
    own = (__file__, patch_embed_cuda.__file__, patch_order.__file__, testing.__file__)
    return source_hash(*map(Path, own))


def _inputs(case: _Case, dtype: torch.dtype, raw: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    """Images, (weight, bias, pos_embed, cls_token) and the gradient of the tokens."""
    generator = torch.Generator().manual_seed(0)
    (height, width), (ph, pw), D = case.size, case.patch, case.outputs
    shape = (2, 3, height, width + case.crop)
    if raw:
        images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    else:
        images = torch.randn(shape, generator=generator).to(dtype)
    images = images[..., case.crop :]
    if case.layout == torch.channels_last:
        images = images.contiguous(memory_format=case.layout)
    N = (height // ph) * (width // pw)
    scale = (3 * ph * pw) ** -0.5
    shapes = ((D, 3, ph, pw), (D,), (1, N + 1, D), (1, 1, D), (2, N + 1, D))
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    drawn[0] *= scale
    *parameters, grad = (x.to(dtype) for x in drawn)
    return images, parameters, grad


def _check(
    direction: str, kernels: Kernels, device: torch.device, dtype: torch.dtype, raw: bool
) -> Iterator[Agreement]:
    statistics = (_MEAN, _STD) if raw else (None, None)
    floor = _TF32 if kernels.tf32 else 0.0
    for case in _cases(device):
        images, parameters, grad = _inputs(case, dtype, raw)
        tiles = (None,) if kernels.hopper or direction == "backward" else (True, False)
        for small_tile in tiles:
            chosen = kernels._replace(small_tile=small_tile, poisoned=True)
            found = [
                _run(chosen, direction, images, parameters, grad, statistics, device),
                _run(patch_embed_torch, direction, images, parameters, grad, statistics),
                _run(
                    patch_embed_torch, direction, images if raw else images.double(),
                    [x.double() for x in parameters], grad.double(), statistics,
                ),
            ]  # fmt: skip
            tile = {True: ", small tile", False: ", large tile", None: ""}[small_tile]
            for name, actual, reference, expected in zip(_NAMES[direction], *found, strict=True):
                yield agreement(
                    actual.cpu(), reference, expected,
                    name=f"{name} of {case.name}{tile}", floor=floor,
                )  # fmt: skip


_NAMES = {"forward": ("out",), "backward": ("dweight", "dbias", "dpos_embed", "dcls_token")}


def _run(
    implementation: Any,
    direction: str,
    images: Tensor,
    parameters: list[Tensor],
    grad: Tensor,
    statistics: tuple[Any, Any],
    device: torch.device | None = None,
) -> list[Tensor]:
    if device is not None:
        # As a whole: a copy of a view would not keep its strides.
        images = _moved(images, device)
        parameters, grad = [x.to(device) for x in parameters], grad.to(device)
    if direction == "forward":
        return [implementation.forward(images, *parameters, *statistics)]
    wanted = [False, True, True, True, True]
    return list(implementation.backward(grad, images, *parameters, *statistics, wanted))


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """The same view of a copy of its memory."""
    size = x.untyped_storage().nbytes() // x.element_size()
    whole = torch.as_strided(x, (size,), (1,), 0)
    return whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())

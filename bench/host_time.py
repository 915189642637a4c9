# SPDX-License-Identifier: Apache-2.0
"""What ``fastvit.functional.patch_embed`` takes of the host, for each call, beside its kernels.

    python bench/host_time.py

No GPU is needed: tensors of the processor are taken for a GPU's, their kernels do nothing, and
have passed their check. So the arguments are checked, the backend and the kernels chosen, and the
outputs allocated, as on a GPU, by the processor's allocator; the binding's C++ and the launch are
left out. Beside it what PyTorch takes for one number.
"""

from __future__ import annotations

import contextlib
import timeit
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastvit import _native
from fastvit.functional import patch_embed
from fastvit.ops import patch_embed as op
from fastvit.ops import patch_embed_trust, trust

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Rounds of less than a millisecond, of which some are not interrupted on a busy machine either.
CALLS, ROUNDS = 30, 600


def microseconds(call: Callable[[], Any]) -> float:
    """The best of the rounds: whatever else the machine does only adds."""
    return min(timeit.repeat(call, number=CALLS, repeat=ROUNDS)) / CALLS * 1e6


def kernels(module: ModuleType) -> SimpleNamespace:
    """The functions of the compiled module that a GPU runs, doing nothing."""

    def nothing(*args: Any) -> None:
        pass

    return SimpleNamespace(
        build_info=module.build_info, fold_patch_weight=nothing, patch_embed=nothing,
        patch_weight_gradient=nothing, hopper_has_work=lambda *args: False, MOST_PIXEL_CHANNELS=128,
    )  # fmt: skip


@contextlib.contextmanager
def gpu() -> Iterator[None]:
    """The processor, taken for an H100."""
    module = kernels(_native.load())
    path = SimpleNamespace(
        forward=lambda images, weight, *rest: patch_embed_trust.trusted_kernels(
            "forward", images, weight, "native"
        ).forward(images, weight, *rest)
    )
    with pytest.MonkeyPatch.context() as change:
        change.setattr(_native, "load", lambda: module)
        change.setattr(op, "patch_embed_cpu", path)
        change.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        change.setattr(trust, "trusts", lambda *args: True)
        change.setattr(trust, "is_known", lambda candidate: True)
        yield


def main() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 48).bfloat16()
    pixels = torch.randint(256, images.shape, dtype=torch.uint8)
    weight, bias = torch.randn(40, 3, 16, 16).bfloat16(), torch.randn(40).bfloat16()
    tokens = {
        "pos_embed": torch.randn(1, 7, 40).bfloat16(),
        "cls_token": torch.randn(1, 1, 40).bfloat16(),
    }
    calls: dict[str, Callable[[], Any]] = {
        "float": lambda: patch_embed(images, weight, bias, backend="native"),
        "float, class token, positions": lambda: patch_embed(
            images, weight, bias, **tokens, backend="native"
        ),
        "uint8, class token, positions": lambda: patch_embed(
            pixels, weight, bias, **tokens, mean=MEAN, std=STD, backend="native"
        ),
    }
    with gpu():
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                for name, call in calls.items():
                    print(f"{mode.__name__:15} {name:30} {microseconds(call):6.1f} us")
    row, column = torch.randn(1, 1), torch.randn(1, 1)
    with torch.no_grad():
        print(f"{'F.linear, 1 x 1':46} {microseconds(lambda: F.linear(row, column)):6.1f} us")


if __name__ == "__main__":
    main()

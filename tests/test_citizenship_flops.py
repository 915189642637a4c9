# SPDX-License-Identifier: Apache-2.0
"""PyTorch's counter of flops sees in our ops the products and convolutions of the reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from citizenship_cases import (
    GRID,
    HEAD_DIM,
    HEADS,
    LAYERS,
    MODELS,
    OPS,
    WIDTH,
    Case,
    each,
    small_model,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastvit
from fastvit.functional import attention, gpsa_attention

ATTENTION_WITH_MAPS = ("mhsa", "MHSA", "convit_tiny", "deit_tiny", "vit_p_1gf", "vit_c_1gf")


def counted(module: nn.Module, x: Tensor, backend: str) -> tuple[int, int]:
    """Flops of a forward and of its backward."""
    with fastvit.backend(backend):
        with FlopCounterMode(display=False) as forward:
            out = module(x)
        with FlopCounterMode(display=False) as backward:
            out.square().sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@each(OPS, LAYERS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("leaf", [False, True], ids=["", "input_gradient"])
def test_as_many_as_the_reference(case: Case, training: bool, leaf: bool) -> None:
    module, x = case.make(training)
    x.requires_grad_(leaf)
    forward, backward = counted(module, x, "torch")
    expected_forward, expected_backward = counted(module, x, "reference")
    assert forward == expected_forward > 0
    if case.name in ATTENTION_WITH_MAPS:
        # PyTorch's formula counts the scores again in the backward.
        N = x.shape[1]
        expected_backward += 2 * x.shape[0] * HEADS * N * N * HEAD_DIM
    assert backward == expected_backward > 0


@each(MODELS)
def test_models(case: Case) -> None:
    module, x = case.make()
    forward, _ = counted(module, x, "torch")
    expected, _ = counted(module, x, "reference")
    assert forward == expected


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gpsa_by_hand(dropout: float) -> None:
    """The kernels' flops are fewer, and more in their backward; a rate per second that is told of
    them would compare with nobody's.
    """
    B, N = 2, GRID[0] * GRID[1]
    if dropout:
        pytest.importorskip("triton", reason="Triton is not installed")
    q, k, v = (torch.randn(B, HEADS, N, 16, requires_grad=True) for _ in range(3))
    weight = torch.randn(HEADS, 3, requires_grad=True)
    gate = torch.zeros(HEADS, requires_grad=True)
    backend = "triton" if dropout else "torch"
    with FlopCounterMode(display=False) as forward:
        out = gpsa_attention(q, k, v, weight, gate, GRID, dropout_p=dropout, backend=backend)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    products = 2 * B * HEADS * N * N * 16
    positions = 2 * B * N * N * 3 * HEADS
    assert forward.get_total_flops() == 2 * products + positions
    assert backward.get_total_flops() == 4 * products + positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_by_hand(dtype: torch.dtype) -> None:
    """PyTorch's operator in float32, ours in half precision: the same count."""
    B, N = 2, 17
    q, k, v = (torch.randn(B, HEADS, N, 16, dtype=dtype, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as forward:
        out = attention(q, k, v, backend="torch")
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    product = 2 * B * HEADS * N * N * 16
    assert forward.get_total_flops() == 2 * product
    assert backward.get_total_flops() == 5 * product
    ours = {str(op) for op in forward.get_flop_counts()["Global"]}
    assert ours == {
        "aten._scaled_dot_product_flash_attention_for_cpu"
        if dtype == torch.float32
        else "fastvit._mhsa_forward"
    }


def test_convolutions_by_hand() -> None:
    stem = fastvit.ConvStem(3, (4, 6), (2, 1), 10)
    forward, backward = counted(stem, torch.randn(2, 3, 9, 12), "torch")
    # 5 x 6 positions in each stage; the image takes no gradient.
    first, second, last = (2 * 2 * 30 * n for n in (4 * 3 * 9, 6 * 4 * 9, 10 * 6))
    assert forward == first + second + last
    assert backward == first + 2 * second + 2 * last

    embed = fastvit.PatchEmbed((8, 12), 4, embed_dim=10)
    assert counted(embed, torch.randn(2, 3, 8, 12), "torch") == (2 * 2 * 6 * 10 * 48,) * 2


@pytest.mark.parametrize("learned", [(), (0,), (1,), (2,), (0, 2)], ids=str)
def test_frozen_stages_count_nothing(learned: tuple[int, ...]) -> None:
    stem = fastvit.ConvStem(3, (4, 6, 8), (2, 2, 1), 5)
    for i, stage in enumerate(stem.stages):
        stage.requires_grad_(i in learned)
    x = torch.randn(2, 3, 16, 16)
    assert counted(stem, x, "torch") == counted(stem, x, "reference")


def test_by_module() -> None:
    model, x = small_model("convit_tiny")
    with FlopCounterMode(display=False) as counter:
        model(x)
    counts = counter.get_flop_counts()
    assert torch.ops.fastvit._gpsa_forward in counts["ConViT.blocks.0.attn"]
    assert torch.ops.fastvit._patch_embed_forward in counts["ConViT.patch_embed"]


@pytest.mark.parametrize(
    "order", ["fastvit.GPSA; {counter}", "{counter}; fastvit.GPSA"], ids=["before", "after"]
)
def test_whichever_is_imported_first(order: str, tmp_path: Path) -> None:
    """PyTorch's counter takes longer to import than all of fastvit, which waits for it."""
    code = "import sys, fastvit; " + order.format(counter="import torch.utils.flop_counter as f")
    code += f"; m = fastvit.GPSA({WIDTH}, {HEADS}); print('registered', len([op for op in "
    code += "f.flop_registry if 'fastvit' in str(op)]) > 5)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert result.stdout == "registered True\n", result.stderr

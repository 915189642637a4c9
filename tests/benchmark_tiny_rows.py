# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin that gives ``bench/`` three rows of tiny models, and faults on demand.

Used by test_benchmark_run.py with ``-p benchmark_tiny_rows``, in a process of its own.
"""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from fastvit.benchmark import rows, weights
from fastvit.benchmark.counter import count

SIZE, WIDTH, HEADS, DEPTH = 32, 64, 4, 2
SLEEP = 0.1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fault",
        action="append",
        default=[],
        choices=["remove", "slow", "disagree", "raise", "interrupt"],
        help="remove ViT_P-1GF, make ConViT-S slow or disagree, raise or interrupt at ViT_P-1GF",
    )


# The conftest of bench/ reads the rows in this hook.
@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    faults = config.getoption("--fault")
    tiny = [_shrunk(name) for name in ("ConViT-S", "ViT_P-1GF", "ResNet-50")]
    if "remove" in faults:
        del tiny[1]
    rows.load_rows = lambda: tuple(tiny)
    rows.SMOKE_ROWS = tuple(row.name for row in tiny)
    weights.build_library = _library
    weights.build_fastvit = lambda row: _fastvit(row, faults)


def _shrunk(name: str) -> rows.Row:
    (row,) = rows.select_rows([name])
    with torch.device("meta"):
        verified = count(_library(row), SIZE)
    return dataclasses.replace(row, image_size=SIZE, verified=verified)


def _library(row: rows.Row) -> torch.nn.Module:
    from timm.models.convit import ConVit
    from torchvision.models.resnet import BasicBlock, ResNet
    from torchvision.models.vision_transformer import VisionTransformer

    if row.family == "ResNet":
        return ResNet(BasicBlock, [1, 1, 1, 1])
    if row.family == "ConViT":
        return ConVit(
            img_size=SIZE,
            embed_dim=WIDTH // HEADS,
            depth=DEPTH,
            num_heads=HEADS,
            local_up_to_layer=1,
        )
    return VisionTransformer(SIZE, 16, DEPTH, HEADS, WIDTH, 4 * WIDTH)


def _fastvit(row: rows.Row, faults: list[str]) -> torch.nn.Module:
    from fastvit.models import create_model

    kwargs = {"img_size": SIZE, "embed_dim": WIDTH, "num_heads": HEADS, "depth": DEPTH}
    if row.family == "ConViT":
        kwargs["local_up_to_layer"] = 1
    else:
        kwargs["mlp_ratio"] = 4.0
    model = create_model(row.fastvit, **kwargs)
    if row.name == "ConViT-S":
        if "slow" in faults:
            model.register_forward_pre_hook(lambda *_: time.sleep(SLEEP))
        if "disagree" in faults:
            model.register_forward_hook(lambda _, args, out: out * 1.001)
    elif "raise" in faults:
        raise RuntimeError("no such luck")
    elif "interrupt" in faults:
        raise KeyboardInterrupt
    return model

# SPDX-License-Identifier: Apache-2.0
"""Stage: whole ConViTs against DeiTs of the same size, timm's and fastvit's, bfloat16."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fastvit
from fastvit.models import load_checkpoint
from fastvit.testing import Agreement, agreement
from gpu.contests import with_positions
from gpu.device import Call, Device
from gpu.record import Record
from gpu.timing import compete, draws

_DTYPE = torch.bfloat16
_MODES = ("inference", "training")


def run(device: Device, record: Record) -> None:
    for batch in device.plan.batches:
        for size in device.plan.models:
            if record.left() < 0:
                record.miss(f"{size}, batch {batch}")
                continue
            _size(device, record, size, batch)
            device.release()


def _size(device: Device, record: Record, size: str, batch: int) -> None:
    models = _models(device, size)
    images = [_images(device, batch, i) for i in range(2)]
    checks = [
        _check(models[f"timm {name}"], models[f"fastvit {name}"], images[0][:2], f"{name}_{size}")
        for name in ("convit", "deit")
    ]
    for check in checks:
        if not check.ok:
            record.fail(f"not timed: {check}")
            return
    for mode in _MODES:
        make = _inference if mode == "inference" else _training
        makers = {
            name: lambda m=m, make=make: make(device, m, images) for name, m in models.items()
        }
        found = compete(device, makers, graphs=False)
        for times in found.values():
            if "median" in times:
                times["images_per_s"] = batch / times["median"]
        record.add(
            size=size, batch=batch, mode=mode, contenders=found,
            checks=[check._asdict() for check in checks],
        )  # fmt: skip


def _models(device: Device, size: str) -> dict[str, nn.Module]:
    import timm

    found: dict[str, nn.Module] = {}
    for family in ("convit", "deit"):
        options = device.plan.model_options[family]
        torch.manual_seed(0)
        name = f"{family}_{size}"
        library = f"deit_{size}_patch16_224" if family == "deit" else name
        theirs = timm.create_model(library, **options).to(device.device, _DTYPE)
        with_positions(theirs, (device.plan.image_size // 16) ** 2)
        for parameter_name, parameter in theirs.named_parameters():
            if parameter_name.endswith("gating_param"):
                nn.init.uniform_(parameter, -2.0, 2.0)
        ours = fastvit.create_model(name, **options).to(device.device, _DTYPE)
        load_checkpoint(ours, theirs.state_dict())
        # By name, so that the figures are the kernels' also where they have not proved themselves.
        for module in ours.modules():
            if isinstance(module, (fastvit.GPSA, fastvit.MHSA)):
                module.backend = "triton"
        found |= {f"timm {family}": theirs, f"fastvit {family}": ours}
    return found


def _images(device: Device, batch: int, seed: int) -> torch.Tensor:
    side = device.plan.image_size
    return draws(device, batch, 3, side, side, dtype=_DTYPE, seed=seed)


def _check(theirs: nn.Module, ours: nn.Module, images: torch.Tensor, name: str) -> Agreement:
    with torch.no_grad():
        exact = with_positions(copy.deepcopy(theirs).double(), (images.shape[-1] // 16) ** 2)
        expected = exact.eval()(images.double())
        return agreement(ours.eval()(images), theirs.eval()(images), expected, name=name, rms=True)


def _inference(device: Device, model: nn.Module, images: list[torch.Tensor]) -> list[Call]:
    model.eval()

    def call(x: torch.Tensor) -> Call:
        def infer() -> torch.Tensor:
            with torch.no_grad():
                return model(x)

        return infer

    return [call(x) for x in images]


def _training(device: Device, model: nn.Module, images: list[torch.Tensor]) -> list[Call]:
    """Forward, cross-entropy, backward and a step of AdamW, as in the papers."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    labels = torch.zeros(len(images[0]), dtype=torch.long, device=device.device)

    def call(x: torch.Tensor) -> Call:
        def step() -> Any:
            F.cross_entropy(model(x).float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return [call(x) for x in images]

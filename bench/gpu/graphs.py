# SPDX-License-Identifier: Apache-2.0
"""Stage: what surrounds a call: CUDA graphs, torch.compile, streams, devices, large buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import fastvit
from fastvit.functional import gpsa_attention
from gpu.device import Device
from gpu.record import Record
from gpu.timing import draws, first_line

#: What a check says instead of passing, when this machine cannot make it.
_SKIPPED = "skipped: "


def run(device: Device, record: Record) -> None:
    for check in (
        capture_inference,
        capture_training,
        compile_training,
        side_stream,
        far_offset,
        far_strides,
        second_device,
    ):
        name = check.__name__.replace("_", " ")
        if record.left() < 0:
            record.miss(name)
            continue
        try:
            said = check(device)
        # Recorded as this check's failure; the others still run.
        except Exception as error:
            record.fail(f"{name}: {first_line(error)}")
            said = first_line(error)
        record.add(name=name, outcome=said or "equal")
        device.release()


def _layer(device: Device, dtype: torch.dtype = torch.bfloat16) -> tuple[fastvit.GPSA, Tensor]:
    shape = device.plan.shapes[0]
    torch.manual_seed(0)
    layer = fastvit.GPSA(
        shape.H * shape.d, shape.H, device=device.device, dtype=dtype, backend="triton"
    )
    x = draws(device, min(shape.B, 8), shape.N, shape.H * shape.d, dtype=dtype)
    return layer, x


def _training(layer: torch.nn.Module, x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    x = x.detach().requires_grad_()
    parameters = list(layer.parameters())

    def step() -> tuple[Tensor, ...]:
        out = layer(x)
        return out, *torch.autograd.grad(out.float().square().sum(), [x, *parameters])

    return step


def _same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if not torch.equal(a, e):
            worst = (a.double() - e.double()).abs().max().item()
            raise AssertionError(f"tensor {i} of {tuple(e.shape)} differs, by {worst:.2e} at most")


def _close(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """For another order of rounding: 2 % of the largest element."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error = (a.double() - e.double()).abs().max() / e.double().abs().max().clamp(min=1e-30)
        if not error <= 0.02:
            raise AssertionError(
                f"tensor {i} of {tuple(e.shape)} differs, relatively by {error:.2e}"
            )


def capture_inference(device: Device) -> str | None:
    layer, x = _layer(device)
    with torch.no_grad():
        replay, out = device.capture(lambda: layer(x))
        x.copy_(draws(device, *x.shape, dtype=x.dtype, seed=1))
        out.fill_(float("nan"))
        replay()
        device.synchronize()
        _same([out], [layer(x)])
    return None


def capture_training(device: Device) -> str | None:
    layer, x = _layer(device)
    step = _training(layer, x)
    replay, out = device.capture(step)
    with torch.no_grad():
        x.copy_(draws(device, *x.shape, dtype=x.dtype, seed=1))
        for tensor in out:
            tensor.fill_(float("nan"))
    replay()
    device.synchronize()
    _same(out, step())
    return None


def compile_training(device: Device) -> str | None:
    layer, x = _layer(device)
    _close(
        _training(device.compile(layer, fullgraph=True), x)(),
        _training(layer, x)(),
    )
    return None


def side_stream(device: Device) -> str | None:
    layer, x = _layer(device)
    step = _training(layer, x)
    expected = step()
    with device.stream():
        actual = step()
    _same(actual, expected)
    return None


def _problem(device: Device) -> dict[str, Tensor | tuple[int, int]]:
    H = 2
    return {
        "pos_weight": draws(device, H, 3, dtype=torch.float32, seed=3).mul(0.1).bfloat16(),
        "gating_param": draws(device, H, dtype=torch.bfloat16, seed=4),
        "grid_size": (4, 4),
    }


def _buffer(device: Device, size: int) -> Tensor | str:
    if not device.fits(2 * size):
        return f"{_SKIPPED}{2 * size / 2**30:.0f} GiB do not fit"
    return torch.empty(size, dtype=torch.bfloat16, device=device.device)


def far_offset(device: Device) -> str | None:
    """Tensors that begin behind 2**31 elements of their storage."""
    shape, count = (2, 16, 2, 16), 2 * 16 * 2 * 16
    buffer = _buffer(device, device.plan.far + 3 * count)
    if isinstance(buffer, str):
        return buffer
    near = [draws(device, *shape, dtype=torch.bfloat16, seed=i) for i in range(3)]
    far = [
        buffer[device.plan.far + i * count :][:count].view(shape).copy_(x)
        for i, x in enumerate(near)
    ]
    return _agree(device, near, far)


def far_strides(device: Device) -> str | None:
    """Images that lie 2**31 elements apart."""
    shape, count = (2, 16, 2, 16), 16 * 2 * 16
    buffer = _buffer(device, device.plan.far + 3 * count)
    if isinstance(buffer, str):
        return buffer
    near = [draws(device, *shape, dtype=torch.bfloat16, seed=i) for i in range(3)]
    strides = (device.plan.far, 32, 16, 1)
    far = [buffer.as_strided(shape, strides, i * count) for i in range(3)]
    for x, y in zip(near, far, strict=True):
        y.copy_(x)
    return _agree(device, near, far)


def _agree(device: Device, near: list[Tensor], far: list[Tensor]) -> str | None:
    results = []
    for inputs in (near, far):
        q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in inputs)
        out = gpsa_attention(q, k, v, **_problem(device), backend="triton")
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [q, k, v])])
    _same(results[1], results[0])
    return None


def second_device(device: Device) -> str | None:
    others = device.others()
    if not others:
        return _SKIPPED + "there is one device"
    layer, x = _layer(device)
    expected = _training(layer, x)()
    # The current device stays the first.
    actual = _training(layer.to(others[0]), x.to(others[0]))()
    _close([a.to(x.device) for a in actual], expected)
    return None

# SPDX-License-Identifier: Apache-2.0
"""Stage: what surrounds a call: CUDA graphs, torch.compile, streams, devices, large buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import fastvit
from fastvit.functional import gpsa_attention
from gpu.device import Device
from gpu.model_graphs import accelerated
from gpu.model_plan import PAIRS
from gpu.patch_compare import images
from gpu.patch_peers import Tokens
from gpu.record import Record
from gpu.stem_layers import our_layer, plain_layer, stem_images
from gpu.timing import draws, first_line

#: What a check says instead of passing, when this machine cannot make it.
_SKIPPED = "skipped: "


#: A layer and its input.
Make = Callable[[Device], tuple[torch.nn.Module, Tensor]]
Check = Callable[[Device], str | None]


def run(device: Device, record: Record) -> None:
    for name, check in _checks():
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


def _checks() -> list[tuple[str, Check]]:
    layers = (capture_inference, capture_training, compile_training, side_stream, second_device)
    checks: list[tuple[str, Check]] = [
        (_name(check), partial(check, make=_layer)) for check in layers
    ]
    checks += [
        (_name(check), check) for check in (capture_dropout, far_offset, far_strides, far_maps)
    ]
    for kind, make in (("plain attention", _attention), ("stem", _stem)):
        checks += [(f"{kind}: {_name(check)}", partial(check, make=make)) for check in layers]
    for pixels in (torch.bfloat16, torch.uint8):
        prefix = f"patches of {str(pixels).removeprefix('torch.')}: "
        make = partial(_tokens, pixels=pixels)
        checks += [(prefix + _name(check), partial(check, make=make)) for check in layers]
        checks.append((prefix + _name(far_images), partial(far_images, pixels=pixels)))
    for pair in PAIRS:
        for mode in ("train", "infer"):
            prefix = f"first of {pair}, accelerated to {mode}: "
            make = partial(accelerated, pair=pair, mode=mode)
            for check in (capture_inference, side_stream_inference):
                checks.append((prefix + _name(check), partial(check, make=make)))
    return checks


def _name(check: Callable[..., str | None]) -> str:
    return check.__name__.replace("_", " ")


def _layer(device: Device, dtype: torch.dtype = torch.bfloat16) -> tuple[fastvit.GPSA, Tensor]:
    shape = device.plan.shapes[0]
    torch.manual_seed(0)
    layer = fastvit.GPSA(
        shape.H * shape.d, shape.H, device=device.device, dtype=dtype, backend="triton"
    )
    x = draws(device, min(shape.B, 8), shape.N, shape.H * shape.d, dtype=dtype)
    return layer, x


def _attention(device: Device) -> tuple[fastvit.MHSA, Tensor]:
    shape = device.plan.shapes[0]
    torch.manual_seed(0)
    width, dtype = shape.H * shape.d, torch.bfloat16
    layer = fastvit.MHSA(width, shape.H, device=device.device, dtype=dtype, backend="triton")
    return layer, draws(device, min(shape.B, 8), shape.N + 1, width, dtype=dtype)


def _stem(device: Device) -> tuple[torch.nn.Module, Tensor]:
    """In training, where nothing depends on the running statistics that every step moves."""
    stem = device.plan.stems[0]
    stem = stem._replace(B=min(stem.B, 8))
    layer = our_layer(plain_layer(device, stem, torch.bfloat16), "triton").train()
    return layer, stem_images(device, stem, torch.bfloat16)


def _tokens(device: Device, pixels: torch.dtype) -> tuple[Tokens, Tensor]:
    problem = device.plan.embeddings[0][0]
    problem = problem._replace(B=min(problem.B, 8))
    return Tokens(device, problem, torch.bfloat16), images(device, problem, pixels)


def _training(layer: torch.nn.Module, x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    x = x.detach().requires_grad_(x.is_floating_point())
    leaves = [*([x] if x.requires_grad else []), *layer.parameters()]

    def step() -> tuple[Tensor, ...]:
        out = layer(x)
        return out, *torch.autograd.grad(out.float().square().sum(), leaves)

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


def capture_inference(device: Device, make: Make) -> str | None:
    layer, x = make(device)
    with torch.no_grad():
        replay, out = device.capture(lambda: layer(x))
        x.copy_(x.flip(-1))
        out.fill_(float("nan"))
        replay()
        device.synchronize()
        _same([out], [layer(x)])
    return None


def capture_training(device: Device, make: Make) -> str | None:
    layer, x = make(device)
    step = _training(layer, x)
    replay, out = device.capture(step)
    with torch.no_grad():
        x.copy_(x.flip(-1))
        for tensor in out:
            tensor.fill_(float("nan"))
    replay()
    device.synchronize()
    _same(out, step())
    return None


def capture_dropout(device: Device) -> str | None:
    """Every replay of a training step drops other weights, and its backward the same as its
    forward: the output is linear in the values, so their weight times its gradient is the output.
    """
    layer, x = _layer(device, torch.float32)
    layer.attn_drop.p = 0.5
    layer.train()

    def step() -> tuple[Tensor, Tensor]:
        out = layer(x)
        (gradient,) = torch.autograd.grad(out.square().sum(), layer.v.weight)
        return out.detach(), gradient

    replay, (out, gradient) = device.capture(step)
    outputs = []
    for _ in range(2):
        out.fill_(float("nan"))
        replay()
        device.synchronize()
        outputs.append(out.clone())
        expected = (2 * out * (out - layer.proj.bias)).double().sum()
        _close([(gradient * layer.v.weight.detach()).double().sum()], [expected.detach()])
    if torch.equal(*outputs):
        raise AssertionError("two replays dropped the same weights")
    return None


def compile_training(device: Device, make: Make) -> str | None:
    layer, x = make(device)
    _close(
        _training(device.compile(layer, fullgraph=True), x)(),
        _training(layer, x)(),
    )
    return None


def side_stream(device: Device, make: Make) -> str | None:
    layer, x = make(device)
    step = _training(layer, x)
    expected = step()
    with device.stream():
        actual = step()
    _same(actual, expected)
    return None


def side_stream_inference(device: Device, make: Make) -> str | None:
    layer, x = make(device)
    with torch.no_grad():
        expected = layer(x)
        with device.stream():
            actual = layer(x)
    _same([actual], [expected])
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


def far_images(device: Device, pixels: torch.dtype) -> str | None:
    """More than 2**31 pixels and as many channels of tokens: the last images must come out as by
    themselves, and so must their gradients.
    """
    problem = device.plan.embeddings[0][0]
    _, N, K, D = problem.problem
    count = device.plan.far // min(N * K, N * D) + 3
    # Pixels, which are drawn in float32; tokens, their gradient, and a copy of it.
    size = count * (N * K * (1 if pixels == torch.uint8 else 6) + 3 * (N + 1) * D * 2)
    if not device.fits(size):
        return f"{_SKIPPED}{size / 2**30:.0f} GiB do not fit"
    problem = problem._replace(B=count)
    _last_images(Tokens(device, problem, torch.bfloat16), images(device, problem, pixels))
    return None


def far_maps(device: Device) -> str | None:
    """The same of a stem, the first of whose maps has more than 2**31 elements. Its statistics are
    fixed, so that images have nothing to do with each other.
    """
    stem = device.plan.stems[0]
    height, width = stem.size
    largest = stem.channels[0] * height * width // stem.strides[0] ** 2
    count = device.plan.far // largest + 3
    # Images drawn in float32; sums of every stage, half of the one before, and their gradients.
    size = count * (3 * height * width * 6 + 4 * largest * 2)
    if not device.fits(size):
        return f"{_SKIPPED}{size / 2**30:.0f} GiB do not fit"
    layer = our_layer(plain_layer(device, stem, torch.bfloat16), "triton").eval()
    _last_images(layer, stem_images(device, stem._replace(B=count), torch.bfloat16))
    return None


def _last_images(layer: torch.nn.Module, x: Tensor) -> None:
    """The last two must give what they give by themselves."""
    out, near = layer(x), layer(x[-2:])
    cotangent = torch.zeros_like(out)
    cotangent[-2:] = near.detach()
    parameters = list(layer.parameters())
    _close(
        [out[-2:], *torch.autograd.grad(out, parameters, cotangent)],
        [near, *torch.autograd.grad(near, parameters, near.detach())],
    )


def _agree(device: Device, near: list[Tensor], far: list[Tensor]) -> str | None:
    results = []
    for inputs in (near, far):
        q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in inputs)
        out = gpsa_attention(q, k, v, **_problem(device), backend="triton")
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [q, k, v])])
    _same(results[1], results[0])
    return None


def second_device(device: Device, make: Make) -> str | None:
    others = device.others()
    if not others:
        return _SKIPPED + "there is one device"
    layer, x = make(device)
    expected = _training(layer, x)()
    # The current device stays the first.
    actual = _training(layer.to(others[0]), x.to(others[0]))()
    _close([a.to(x.device) for a in actual], expected)
    return None

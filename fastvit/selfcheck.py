# SPDX-License-Identifier: Apache-2.0
"""Every backend against the reference on the machine at hand, for ``fastvit.info(check=True)``.

Small inputs of odd sizes, forward and backward, judged by the numbers rule of
:mod:`fastvit.testing`: against the reference in float64, with the error of the reference in
float32 as the measure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from fastvit.layers import GPSA, MHSA, ConvStem, PatchEmbed
from fastvit.testing import CANCELLING, Agreement, agreement

if TYPE_CHECKING:
    from fastvit._info import BackendStatus


class _Case(NamedTuple):
    layer: Callable[[str], nn.Module]
    input_shape: tuple[int, ...]


_CASES = {
    # 3 heads of 24 channels on a grid of 3 x 5
    "gpsa": _Case(
        lambda name: GPSA(72, 3, qkv_bias=True, grid_size=(3, 5), backend=name), (2, 15, 72)
    ),
    "mhsa": _Case(lambda name: MHSA(72, 3, qkv_bias=True, backend=name), (2, 17, 72)),
    "conv_stem": _Case(
        lambda name: ConvStem(3, (8, 24), (2, 2), embed_dim=40, backend=name), (2, 3, 21, 19)
    ),
    "patch_embed": _Case(
        lambda name: PatchEmbed((32, 24), (16, 8), 3, embed_dim=10, backend=name), (2, 3, 32, 24)
    ),
}

#: Parameters whose gradients are sums that cancel.
_CANCELLING = ("pos_proj.weight", "pos_proj.bias", "gating_param")


def checked(status: BackendStatus) -> BackendStatus:
    """``status`` with the outcome of the comparison, for a backend that runs here."""
    if not status.available or status.backend == "reference" or status.op not in _CASES:
        return status
    try:
        # Building a layer draws weights, which the caller's random numbers must not feel.
        with torch.random.fork_rng(devices=[]):
            results = list(compare(status.op, status.backend))
    except Exception as error:  # whatever a kernel or its compiler raises is the finding
        failure = f"FAILED with {type(error).__name__}: {error}"
        return dataclasses.replace(status, checks=(failure,), agrees=False)
    return dataclasses.replace(
        status,
        checks=tuple(str(result) for result in results),
        agrees=all(result.ok for result in results),
    )


def compare(op: str, backend: str) -> Iterator[Agreement]:
    """The output of ``op`` and each of its gradients, compared in float32 on the best device."""
    case = _CASES[op]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.input_shape, generator=generator)
    plain = case.layer("reference")
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    cotangent = torch.randn(plain(x).shape, generator=generator)

    def run(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        layer = case.layer(name).to(device, dtype)
        layer.load_state_dict(plain.state_dict())
        # A tensor of its own: `to` alone would let the float32 runs share one gradient.
        leaf = x.to(device, dtype, copy=True).requires_grad_()
        output = layer(leaf)
        output.backward(cotangent.to(device, dtype))
        found = {"output": output.detach(), "gradient of x": leaf.grad}
        for key, parameter in layer.named_parameters():
            found[f"gradient of {key}"] = parameter.grad
        return {key: value for key, value in found.items() if value is not None}

    expected = run("reference", torch.float64)
    reference = run("reference", torch.float32)
    actual = run(backend, torch.float32)
    if actual.keys() != expected.keys():
        raise RuntimeError(
            f"{op}, {backend}: expected the tensors {sorted(expected)}, got {sorted(actual)}"
        )
    for key, value in expected.items():
        cancelling = key.removeprefix("gradient of ") in _CANCELLING
        # The bias shifts every positional logit alike: its gradient is zero in exact arithmetic.
        scale_key = "gradient of pos_proj.weight" if key.endswith("pos_proj.bias") else key
        yield agreement(
            actual[key],
            reference[key],
            value,
            name=key,
            floor=CANCELLING if cancelling else 0.0,
            scale=expected[scale_key].abs().max().item(),
        )

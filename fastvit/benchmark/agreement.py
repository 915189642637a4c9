# SPDX-License-Identifier: Apache-2.0
"""The gate before timing: the two models of a row compute the same thing."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.benchmark.rows import Row
from fastvit.testing import CANCELLING, Agreement, agreement

# Their gradients are sums over all positions and images whose terms cancel.
_CANCELLING = ("attn.pos_proj.weight", "attn.gating_param")


def compared_parameters(row: Row) -> tuple[str, str, str]:
    """The three parameters whose gradients are compared, by fastvit's names.

    They lie at the far end of the backward pass, so that their gradients depend on all of it,
    and are those of the layers that fastvit replaces.
    """
    if row.family == "ConViT":
        return (
            "patch_embed.proj.weight",
            "blocks.0.attn.pos_proj.weight",
            "blocks.0.attn.gating_param",
        )
    if row.family == "ViT_C":
        return (
            "patch_embed.backbone.0.conv.weight",
            "patch_embed.backbone.0.bn.weight",
            "blocks.0.attn.qkv.weight",
        )
    return ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight")


def confirm(
    row: Row, library: nn.Module, ours: nn.Module, batches: Iterable[Tensor], **options: Any
) -> list[Agreement]:
    """:func:`compare` on one batch after another, until every tensor has agreed on one.

    One batch can disagree by chance: where the input of a ReLU is within rounding of 0, rounding
    decides a gradient, and the largest error of a few elements scatters by more than a factor of
    two. A fault disagrees on every batch.

    Args:
        options: ``rms`` and ``floor`` of :func:`compare`.

    Returns:
        Per tensor the first comparison that agreed, else the last one.
    """
    kept: dict[str, Agreement] = {}
    for images in batches:
        for found in compare(row, library, ours, images, **options):
            if found.name not in kept or not kept[found.name].ok:
                kept[found.name] = found
        if all(found.ok for found in kept.values()):
            break
    return list(kept.values())


def compare(
    row: Row, library: nn.Module, ours: nn.Module, images: Tensor, *,
    rms: bool = False, floor: float = 0.0,
) -> list[Agreement]:  # fmt: skip
    """Compare ``ours`` with ``library``, which hold the same weights, by the numbers rule.

    What is compared: in training mode the output and the gradients of the images and of
    :func:`compared_parameters` for one random cotangent, then the output in evaluation mode. The
    expectation is a float64 copy of the library model on the same images.

    Args:
        images: (B, 3, S, S) in the models' dtype. Running statistics of BatchNorm move by one
            training step in both models.
        rms, floor: of :func:`fastvit.testing.agreement`.

    Returns:
        One :class:`~fastvit.testing.Agreement` per tensor.
    """
    from fastvit.models.layouts import translate

    names = compared_parameters(row)
    origin = translate(library.state_dict()).origin
    exact = copy.deepcopy(library).double()
    generator = torch.Generator(images.device).manual_seed(1)
    library_names = [origin[name] for name in names]

    # The exact model goes first and is freed: at 36GF its weights alone are 1.4 GB.
    expected = _results(exact, images.double(), library_names, generator)
    del exact
    reference = _results(library, images, library_names, generator)
    actual = _results(ours, images, list(names), generator)
    labels = ["output in eval()", "output in train()", "gradient of the images"]
    labels += [f"gradient of {name}" for name in names]
    return [
        agreement(
            actual[i],
            reference[i],
            expected[i],
            name=label,
            floor=max(floor, CANCELLING if label.endswith(_CANCELLING) else 0.0),
            rms=rms,
        )
        for i, label in enumerate(labels)
    ]


def _results(
    model: nn.Module, images: Tensor, names: list[str], generator: torch.Generator
) -> list[Tensor]:
    """Output in eval mode; output, image gradient and parameter gradients in training mode."""
    # Training first: timm's GPSA keeps the positions of its first forward, and those made in
    # inference mode cannot take part in a backward. Evaluation then uses the running statistics
    # that training has moved.
    model.train()
    images = images.detach().requires_grad_()
    out = model(images)
    generator.manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
    wanted = [images, *(model.get_parameter(name) for name in names)]
    gradients = torch.autograd.grad(out, wanted, cotangent)
    model.eval()
    with torch.inference_mode():
        inferred = model(images)
    model.train()
    return [inferred, out.detach(), *gradients]

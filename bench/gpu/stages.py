# SPDX-License-Identifier: Apache-2.0
"""The stages of ``make gpu``, the most valuable first, and where their results go.

Imports nothing that has to be built or could fail: the driver must outlive all stages.
"""

from __future__ import annotations

from typing import NamedTuple


class Stage(NamedTuple):
    """One process of the run."""

    name: str
    #: File of the results; several stages share one.
    file: str
    #: Share of the time: what a stage leaves over goes to the later ones in proportion.
    seconds: int
    what: str


STAGES = (
    Stage("build", "machine.json", 50, "the extension, for this card's architecture"),
    Stage("machine", "machine.json", 15, "processor, clocks, driver, versions, commit"),
    Stage("agreement", "checks.json", 100, "every Triton kernel against float64"),
    Stage("graphs", "checks.json", 45, "CUDA graphs, torch.compile, streams, far offsets"),
    Stage("sanitizer", "checks.json", 70, "compute-sanitizer's memcheck and racecheck"),
    Stage("ceilings", "machine.json", 20, "bandwidth, matrix products, launches, exponentials"),
    Stage("peers", "peers.json", 80, "other implementations at our shapes"),
    Stage("kernels", "kernels.json", 70, "fastvit at the same shapes"),
    Stage("patch_embed", "kernels.json", 80, "images to tokens: agreement, times with peers"),
    Stage("stem", "kernels.json", 80, "the convolutional stem: agreement, times with peers"),
    Stage("stem_choices", "kernels.json", 40, "which layers of the stem cuDNN does faster"),
    Stage("models", "models.json", 50, "ConViT against DeiT"),
)

BY_NAME = {stage.name: stage for stage in STAGES}

#: Pictures, each light and dark.
PICTURES = (
    *(f"roofline_{op}" for op in ("gpsa_core", "gpsa_module", "patch_embed", "conv_stem")),
    "ratios",
    "scaling",
    "epoch",
)

#: All that a run leaves, in one folder.
FILES = (
    *dict.fromkeys(stage.file for stage in STAGES),
    "verified.json",
    "stem_choices.json",
    "summary.md",
    *(f"{name}{variant}.svg" for name in PICTURES for variant in ("", "-dark")),
)

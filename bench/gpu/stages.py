# SPDX-License-Identifier: Apache-2.0
"""The stages of ``make gpu``, the most valuable first, and where their results go.

Imports nothing that has to be built or could fail: the driver must outlive all stages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Stage(NamedTuple):
    """One process of the run."""

    name: str
    #: File of the results; several stages share one.
    file: str
    #: Share of the time: what a stage leaves over goes to the later ones in proportion.
    seconds: int
    what: str
    #: Whether it measures only when asked for by name: it would take all the time.
    asked: bool = False


STAGES = (
    Stage("build", "machine.json", 90, "the extension, for this card's architecture"),
    Stage("machine", "machine.json", 15, "processor, clocks, driver, versions, commit"),
    Stage("ceilings", "machine.json", 20, "bandwidth, matrix products, launches, exponentials"),
    Stage("agreement", "checks.json", 100, "every Triton kernel against float64"),
    Stage("graphs", "checks.json", 45, "CUDA graphs, torch.compile, streams, far offsets"),
    Stage("sanitizer", "checks.json", 70, "compute-sanitizer's memcheck and racecheck"),
    Stage("kernels", "kernels.json", 90, "attention in turns with PyTorch's and timm's"),
    Stage("peers", "peers.json", 90, "attention in turns with what torch.compile makes"),
    Stage("patch_embed", "kernels.json", 80, "images to tokens: agreement, times with peers"),
    Stage("stem", "kernels.json", 80, "the convolutional stem: agreement, times with peers"),
    Stage("stem_choices", "kernels.json", 40, "which layers of the stem cuDNN does faster"),
    Stage("models", "models.json", 90, "ConViT against DeiT, ViT_C against ViT_P"),
    Stage("epoch", "models.json", 40, "minutes per ImageNet epoch of the papers' models"),
    Stage("tune", "tuned_search.json", 60, "the fastest launch configurations", asked=True),
)

BY_NAME = {stage.name: stage for stage in STAGES}

#: What else runs with a stage that is asked for by name: floors are of the same run, and compiled
#: kernels come from the build.
_NEEDS = {
    "graphs": ("build",),
    "sanitizer": ("build",),
    "kernels": ("ceilings",),
    "peers": ("ceilings",),
    "patch_embed": ("build", "ceilings"),
    "stem": ("ceilings",),
    "models": ("build", "ceilings"),
    "epoch": ("build",),
}

#: Names of ops that are more than one stage.
_OPS = {"gpsa": ("kernels", "peers"), "conv_stem": ("stem", "stem_choices")}

NAMES = (*BY_NAME, *_OPS)


def chosen(names: Iterable[str] | None, *, dry: bool) -> list[Stage]:
    """The stages of some of :data:`NAMES` with those that they need, in the run's order; None: all,
    but those that run when asked for, unless the run is dry.

    Args:
        names: of stages or ops.
    """
    if not names:
        return [stage for stage in STAGES if dry or not stage.asked]
    wanted = {stage for name in names for stage in _OPS.get(name, (name,))}
    wanted |= {need for name in wanted for need in _NEEDS.get(name, ())}
    return [stage for stage in STAGES if stage.name in wanted]


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
    "epoch.json",
    "epoch.md",
    "tuned.json",
    "summary.md",
    *(f"{name}{variant}.svg" for name in PICTURES for variant in ("", "-dark")),
)

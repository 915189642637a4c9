# SPDX-License-Identifier: Apache-2.0
"""Where cuDNN or the torch backend was measured to be faster than the kernels of the stem.

``stem_choices.json`` has for each architecture, as launch configurations name it, what was measured
on, and two lists: of single convolutions that cuDNN does faster (:func:`layer_key`) and of whole
calls that the torch backend does faster (:func:`call_key`). ``make gpu`` writes such a table.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastvit.kernels.configs import Config
from fastvit.kernels.stem_configs import Problem

#: Of a plan, with their configurations.
Kernels = tuple[tuple[str, Config], ...]

#: Stands for a kernel in a plan.
CUDNN = "cudnn"

_FILE = Path(__file__).resolve().parent.parent / "stem_choices.json"
_LAYER = r"(half|tf32|ieee) (infer|train) \d+-\d+ s[12] 2\^\d+"
_CALL = r"(half|tf32|ieee) (infer|train|backward) \d+(-\d+){2,} s[12](-[12])* 2\^\d+"


class Choices(NamedTuple):
    """What is faster than the kernels on an architecture, by keys."""

    cudnn: frozenset[str] = frozenset()
    torch: frozenset[str] = frozenset()


def layer_key(
    arithmetic: str, mode: str, before: int, after: int, stride: int, positions: int
) -> str:
    """A convolution: "half", "tf32" or "ieee"; "infer" or "train"; channels, stride, and the power
    of two below the positions of all images that it gives: "half train 48-96 s2 2^19".
    """
    return f"{arithmetic} {mode} {before}-{after} s{stride} 2^{positions.bit_length() - 1}"


def call_key(
    arithmetic: str, mode: str, widths: Sequence[int], strides: Sequence[int], pixels: int
) -> str:
    """A stem, in the mode "backward", too: channels from the images' to D, strides, and the power
    of two below the pixels of all images: "ieee infer 3-24-48-192 s2-2 2^23".
    """
    sizes, steps = ("-".join(map(str, numbers)) for numbers in (widths, strides))
    return f"{arithmetic} {mode} {sizes} s{steps} 2^{pixels.bit_length() - 1}"


def choices(arch: str) -> Choices:
    """Of the table that came with the package.

    Raises:
        ValueError: the table is malformed; the message has the file and what is wrong.
    """
    return _read(_FILE).get(arch, Choices())


@functools.cache
def _read(file: Path) -> dict[str, Choices]:
    try:
        table = json.loads(file.read_text("utf-8"))
        return {arch: _checked(f"{arch}.", **entry) for arch, entry in table.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a table of choices: {error}") from error


def _checked(name: str, *, measured: Any, cudnn: Any, torch: Any) -> Choices:
    wanted = {"date", "gpu", "torch", "cudnn"}
    if not isinstance(measured, dict) or not wanted <= measured.keys():
        raise ValueError(f"{name}measured: expected {', '.join(sorted(wanted))}, got {measured!r}")
    for list_name, keys, pattern in (("cudnn", cudnn, _LAYER), ("torch", torch, _CALL)):
        if not isinstance(keys, list):
            raise ValueError(f"{name}{list_name}: expected a list, got {keys!r}")
        for key in keys:
            if not re.fullmatch(pattern, str(key)):
                raise ValueError(f"{name}{list_name}: {key!r} is no key")
    return Choices(frozenset(cudnn), frozenset(torch))


def with_cudnn(kernels: Kernels, problem: Problem, strides: Sequence[int]) -> Kernels:
    """The kernels of a forward, with cuDNN in the place of those that it beats."""
    faster = choices(problem.arch).cudnn
    if not faster or not _cudnn_may(problem.arithmetic):
        return kernels
    places = exchangeable(kernels, problem, strides)
    return exchanged(kernels, [place for place, key in places.items() if key in faster])


def exchangeable(kernels: Kernels, problem: Problem, strides: Sequence[int]) -> dict[int, str]:
    """Places of what cuDNN could do, with their keys: the convolutions after the first kernel."""
    mode = "train" if problem.keeps else "infer"
    level = 1 if kernels[0][0] == "stem_pair" else 0
    found = {}
    for place in range(1, len(kernels) - 1):
        i = level + place
        before, after = problem.widths[i : i + 2]
        found[place] = layer_key(
            problem.arithmetic, mode, before, after, strides[i], problem.positions[i]
        )
    return found


def exchanged(kernels: Kernels, places: Collection[int]) -> Kernels:
    """With cuDNN at these places."""
    return tuple((CUDNN, Config()) if i in places else k for i, k in enumerate(kernels))


def _cudnn_may(arithmetic: str) -> bool:
    """Whether PyTorch's switches let cuDNN compute what the kernels would.

    Which of its algorithms runs may change from call to call: not where PyTorch was asked for
    deterministic ones, unless they are set for cuDNN itself.
    """
    cudnn = torch.backends.cudnn
    if not cudnn.enabled:
        return False
    if torch.are_deterministic_algorithms_enabled() and not cudnn.deterministic:
        return False
    tf32 = cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return arithmetic == "half" or tf32 == (arithmetic == "tf32")

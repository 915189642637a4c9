# SPDX-License-Identifier: Apache-2.0
"""Stage: whole models of two families against each other, timm's and fastvit's."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import fastvit
from fastvit.testing import Agreement
from gpu import ceilings, floors, model_floors
from gpu.device import Call, Device, fastest_convolutions, tf32
from gpu.model_calls import Training, check_training, inference, pinned_to
from gpu.model_contenders import Contender, contenders, random_images, side
from gpu.model_plan import COMPILED, EAGER, PAIRS, Contest, contests
from gpu.model_rows import rows
from gpu.patch_compare import number
from gpu.record import Record
from gpu.timing import compete, first_line

_LATE = "not reached in time"
# Seconds that have to be left for one more model to be compiled.
_COMPILATION = 40.0

Makers = dict[str, Callable[[], Sequence[Call]]]


def run(device: Device, record: Record) -> None:
    rates = ceilings.read(record)
    if rates is None:
        record.data["floors"] = "not known: the stage ceilings left none"
    for contest in contests(dry=bool(device.note)):
        if record.left() < contest.least:
            record.miss(contest.name)
            continue
        try:
            with tf32(contest.dtype == "tf32"), warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                _contest(device, record, rates, contest, said)
        # Recorded as this contest's failure; the others are still held.
        except Exception as error:
            traceback.print_exc()
            record.fail(f"{contest.name}: {first_line(error)}")
        device.release()
        # A kernel that broke the device would fail all that follows: this raises then.
        device.synchronize()


def _contest(
    device: Device, record: Record, rates: dict | None, contest: Contest,
    said: list[warnings.WarningMessage],
) -> None:  # fmt: skip
    images = random_images(device, contest)
    families, pair = PAIRS[contest.pair], rows(contest)
    first, second = (
        side(device, name, row, images[0]) for name, row in zip(families, pair, strict=True)
    )
    checks: list[Agreement] = []
    if contest.mode == "training":
        for which in (first, second):
            checks += check_training(device, which, contest)
        wrong = [str(check) for check in checks if not check.ok]
        if wrong:
            record.fail(f"{contest.name}, not timed: {'; '.join(wrong)}")
            return
    held = list(contenders(contest, (first, second)))
    makers = _makers(device, record, contest, held, images, checks)
    with fastest_convolutions():
        found = compete(device, makers, graphs=False)
    for contender in held:
        for name in (contender.name, f"{contender.name} graph"):
            if name in found:
                _judge(record, rates, contest, contender, name, found[name])
    more: dict[str, Any] = {}
    if contest.mode == "training" and contest.way == EAGER:
        more["memory"] = {c.name: _memory(device, c, images[0]) for c in held if c.pinned is None}
    # Among them why a kernel that has not proved itself was not used.
    if said:
        more["warnings"] = sorted({str(warning.message).strip()[:500] for warning in said})
    record.add(
        **contest._asdict(), contenders=found, checks=[check._asdict() for check in checks], **more
    )


def _makers(
    device: Device, record: Record, contest: Contest, held: list[Contender],
    images: list[torch.Tensor], checks: list[Agreement],
) -> Makers:  # fmt: skip
    makers: Makers = {}
    training = Training(device, images)
    if contest.way != EAGER:
        # Else the code of an earlier contest could serve.
        torch._dynamo.reset()
    for contender in held:
        forward = _forward(device, record, contest, contender)
        if contest.mode == "training":
            makers[contender.name] = partial(_trained, training, contender, forward)
            continue
        for graph in (False, True):
            makers[contender.name + graph * " graph"] = partial(
                _inferred, device, contest, contender, forward, images, graph=graph, checks=checks
            )
    return makers


Forward = Callable[[], Callable[[torch.Tensor], torch.Tensor]]


def _forward(device: Device, record: Record, contest: Contest, contender: Contender) -> Forward:
    """What makes the function to time, once, when its contender is called up: what fails then
    costs no other.
    """
    made: list[Any] = []

    def make() -> Any:
        if contender.frozen:
            fastvit.accelerate(contender.model.eval(), mode="infer", strict=True)
        if contest.way == EAGER:
            return contender.model
        if record.left() < _COMPILATION:
            raise TimeoutError(_LATE)
        options = {} if contest.way == COMPILED else {"mode": contest.way}
        return device.compile(contender.model, dynamic=False, **options)

    def forward() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return forward


def _inferred(
    device: Device, contest: Contest, contender: Contender, forward: Forward,
    images: list[torch.Tensor], **options: Any,
) -> Sequence[Call]:  # fmt: skip
    return inference(device, contest, contender, forward(), images, **options)


def _trained(training: Training, contender: Contender, forward: Forward) -> Sequence[Call]:
    return training.calls(contender, forward())


def _judge(
    record: Record, rates: dict | None, contest: Contest, contender: Contender, name: str,
    times: dict[str, Any],
) -> None:  # fmt: skip
    """Add speed and share of the floor; what is wrong with them fails the stage."""
    label = f"{contest.name}, {name}"
    error = times.get("error", "")
    if "Disagreement" in error:
        record.fail(f"{label}, not timed: {error}")
    elif error and contender.pinned is None and "fastvit" in name and not _excused(error):
        record.fail(f"{label}: {error}")
    if "median" not in times:
        return
    times["images_per_s"] = contest.batch / times["median"]
    if rates is None:
        return
    which = contender.side
    work = model_floors.work(
        which.row, sum(p.numel() for p in which.theirs.parameters()), contest.batch,
        number(contest.dtype).itemsize, training=contest.mode == "training",
    )  # fmt: skip
    times["floor"] = floors.seconds(work, rates, contest.dtype)
    times["share"], problem = floors.share(times["floor"], times["median"])
    if problem:
        record.fail(f"{label}: {problem}")


def _excused(error: str) -> bool:
    """Whether it says that the memory or the time of this machine did not suffice."""
    return "OutOfMemory" in error or _LATE in error


def _memory(device: Device, contender: Contender, images: torch.Tensor) -> dict[str, Any]:
    """Of forward and backward, beyond parameters and images."""
    model = contender.model.train()
    leaves = [p for p in model.parameters() if p.requires_grad]
    cotangent = torch.ones(len(images), 1000, dtype=images.dtype, device=images.device)
    try:
        with pinned_to(contender.pinned):
            return device.memory(lambda: model(images), leaves, cotangent)
    # Recorded as this contender's error: its times stand.
    except Exception as error:
        return {"error": first_line(error)}

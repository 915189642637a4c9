# SPDX-License-Identifier: Apache-2.0
"""What was hoped for and what was measured, from the files of a run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from gpu.answers import Answer, core_ratio, latency, model_ratio, other_cores, tokens_ratio
from gpu.cells import NOTHING, Records, markdown
from gpu.model_plan import CONVIT, CONVITS, STEMS, VIT_C

_UNMEASURED = "not measured"


class Target(NamedTuple):
    """One figure that was hoped for; ``answer`` finds it in a run, or says why not."""

    name: str
    stage: str
    wanted: float
    unit: str
    answer: Callable[[Records], Answer | str]
    #: Whether it is one of those that the project set itself; the others stand beside them.
    asked: bool = True

    @property
    def at_most(self) -> bool:
        return self.unit == "µs"

    def verdict(self, value: float) -> str:
        """Met, or missed by how much of what was wanted."""
        short = value / self.wanted - 1 if self.at_most else 1 - value / self.wanted
        return "met" if short <= 0 else f"missed by {100 * short:.2f} %"


def targets(records: Records) -> list[Target]:
    """Those that the project set itself, and the same questions at the shapes that a run has."""
    found = [
        Target(f"ConViT ÷ DeiT, {size}", "models", 0.98, "", model_ratio(CONVIT, size))
        for size in CONVITS
    ]
    found += [
        Target(f"ViT_C ÷ ViT_P, {size}", "models", 0.99, "", model_ratio(VIT_C, size))
        for size in STEMS
    ]
    found.append(
        Target("GPSA core ÷ fastest plain SDPA, S", "kernels", 1.0, "", core_ratio("S", 196, 256))
    )
    found += [
        Target("uint8 → tokens ÷ fastest eager chain", "patch_embed", 3.0, "", tokens_ratio),
        Target("batch-1 ConViT-small, CUDA graph", "models", 250.0, "µs", latency),
    ]
    return found + [
        Target(f"GPSA core ÷ fastest plain SDPA, {label} N={N} B={B}", "kernels", 1.0, "",
               core_ratio(label, N, B), asked=False)
        for label, N, B in other_cores(records)
    ]  # fmt: skip


def line(records: Records) -> str:
    """How many of the targets are met, in a sentence."""
    verdicts = [cells[3] for target, cells in _rows(records) if target.asked]
    met = verdicts.count("met")
    missed = sum(verdict.startswith("missed") for verdict in verdicts)
    unmeasured = len(verdicts) - met - missed
    return f"**Targets: {met} of {len(verdicts)} met, {missed} missed, {unmeasured} not measured.**"


def table(records: Records) -> str:
    """Every target with its figure and verdict; nothing where none of the project's was measured,
    as in a dry run.
    """
    rows = list(_rows(records))
    if all(cells[2] == NOTHING for target, cells in rows if target.asked):
        return ""
    heads = ["target", "wanted", "measured", "verdict", "what (median, 20–80 %)", "measured at"]
    return markdown(heads, [cells for _, cells in rows])


def _rows(records: Records) -> Iterator[tuple[Target, list[str]]]:
    for target in targets(records):
        found = target.answer(records)
        sign = "≤" if target.at_most else "≥"
        wanted = f"{sign} {target.wanted:g} {target.unit}".strip()
        if isinstance(found, str):
            reason = f"{_UNMEASURED}: {found}" if found else _UNMEASURED
            yield target, [target.name, wanted, NOTHING, reason, NOTHING, NOTHING]
            continue
        # Three digits of a ratio: 0.979 and 0.981 lie on either side of a target.
        value = f"{found.value:,.1f} µs" if target.at_most else f"{found.value:.3f}"
        verdict = target.verdict(found.value)
        yield target, [target.name, wanted, value, verdict, found.of, _origin(records, target)]


def _origin(records: Records, target: Target) -> str:
    """GPU, commit and day of the stage, whose files may come from several runs; and its status if
    that is not ok.
    """
    record = records.get(target.stage, {})
    machine = record.get("machine") or {}
    changes = "+changes" if machine.get("dirty") else ""
    commit = (machine.get("commit") or "no commit")[:12] + changes
    said = [machine.get("gpu") or "no GPU", commit, record.get("date", "no date")[:10]]
    if record.get("status") != "ok":
        said.append(f"stage {record.get('status')}")
    return ", ".join(said)

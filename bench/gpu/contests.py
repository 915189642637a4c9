# SPDX-License-Identifier: Apache-2.0
"""What all contests have in common: modes, dtypes, and the share of the floor."""

from __future__ import annotations

from typing import Any

from gpu import floors
from gpu.attention_peers import with_positions
from gpu.record import Record

__all__ = ["MODES", "ROUNDED", "WARM", "add_share", "judge", "with_positions"]

MODES = {"forward": False, "forward+backward": True}
#: How far a peer's root mean square may be off, relatively, and still have computed the same:
#: libraries round intermediate results in other places than the reference does.
ROUNDED = {"bfloat16": 2.0**-5, "float16": 2.0**-8, "tf32": 2.0**-7, "float32": 2.0**-16}
#: Images of a batch whose data a user finds in the L2 cache, where the call before has left them.
WARM = 8


def judge(
    record: Record, ceilings: dict[str, Any] | None, work: floors.Work, dtype: str, label: str,
    found: dict[str, dict[str, Any]],
) -> None:  # fmt: skip
    """Add to each contender's times its share of the floor; more than all is a failure."""
    for name, times in found.items():
        add_share(record, ceilings, work, dtype, f"{label}, {name}", times)


def add_share(
    record: Record, ceilings: dict[str, Any] | None, work: floors.Work, dtype: str, label: str,
    times: dict[str, Any],
) -> None:  # fmt: skip
    """The same for one contender, which ``label`` names in a failure; with the work itself."""
    times |= work._asdict()
    if ceilings is None:
        record.data["floors"] = "not known: no ceilings of this run"
    elif "median" in times:
        times["floor"] = floors.seconds(work, ceilings, dtype)
        times["share"], problem = floors.share(times["floor"], times["median"])
        if problem:
            record.fail(f"{label}: {problem}")

# SPDX-License-Identifier: Apache-2.0
"""Tables of the stages kernels and peers: the attention core and the GPSA layer."""

from __future__ import annotations

from typing import Any

from gpu.attention_names import SDPA
from gpu.cells import (
    Records,
    best_of,
    cases_of,
    host,
    markdown,
    median,
    megabytes,
    ratio,
    share,
    spread,
    warm,
)


def core(records: Records) -> str:
    """Ours with its position term, against plain attention, which does less."""
    rows = []
    for case in cases_of(records, "kernels", "core"):
        found, (ours, name, peer) = case["contenders"], best_of(case, SDPA)
        row = [_shape(case), case["dtype"], case["mode"], spread(ours), share(ours), warm(ours)]
        row += [median(found.get(name)) for name in SDPA]
        row += [name, share(peer), ratio(peer, ours), warm(peer), host(case)]
        rows.append(row)
    heads = ["shape", "dtype", "mode", "fastvit µs (20–80 %)", "of floor", "warm µs",
             *(f"{n} µs" for n in SDPA), "fastest SDPA", "of floor", "÷ fastvit", "warm µs",
             "host µs"]  # fmt: skip
    return markdown(heads, rows)


def compiled_core(records: Records) -> str:
    """The same against FlexAttention, alone and with the position pass."""
    rows = []
    for case in cases_of(records, "peers", "core"):
        found, (ours, name, peer) = case["contenders"], best_of(case, SDPA)
        both, flex = found.get("flex + position"), found.get("flex")
        row = [_shape(case), case["dtype"], case["mode"], spread(ours), share(ours)]
        row += [spread(both), share(both), ratio(both, ours)]
        row += [median(flex), ratio(flex, ours), name, median(peer), ratio(peer, ours)]
        rows.append(row)
    heads = ["shape", "dtype", "mode", "fastvit µs (20–80 %)", "of floor",
             "flex + position µs (20–80 %)", "of floor", "÷ fastvit", "flex alone µs", "÷ fastvit",
             "fastest SDPA", "µs", "÷ fastvit"]  # fmt: skip
    return markdown(heads, rows)


def module(records: Records) -> str:
    memory = {_key(case): case["memory"] for case in cases_of(records, "kernels", "memory")}
    rows = []
    for case in cases_of(records, "kernels", "module"):
        found = case["contenders"]
        ours, timm = found["fastvit"], found["timm eager"]
        row = [_shape(case), case["dtype"], case["mode"], spread(ours), share(ours), warm(ours)]
        row += [spread(timm), ratio(timm, ours), warm(timm), host(case)]
        # Of a training step.
        kept = memory.get(_key(case), {}) if "backward" in case["mode"] else {}
        row += [megabytes(kept, which, ("fastvit", "timm eager")) for which in ("kept", "peak")]
        rows.append(row)
    heads = ["shape", "dtype", "mode", "fastvit µs (20–80 %)", "of floor", "warm µs",
             "timm eager µs (20–80 %)", "÷ fastvit", "warm µs", "host µs",
             "kept MB, fastvit / timm", "peak MB, fastvit / timm"]  # fmt: skip
    return markdown(heads, rows)


def compiled_module(records: Records) -> str:
    rows = []
    for case in cases_of(records, "peers", "module"):
        found = case["contenders"]
        # Where our kernel had failed before, it is not among them.
        ours = found.get("fastvit")
        row = [_shape(case), case["dtype"], case["mode"], spread(ours), share(ours)]
        for name in ("fastvit compiled", "timm eager", "timm compiled", "timm max-autotune"):
            row += [median(found.get(name)), ratio(found.get(name), ours)]
        rows.append(row)
    heads = ["shape", "dtype", "mode", "fastvit µs (20–80 %)", "of floor",
             "fastvit compiled µs", "÷ fastvit", "timm eager µs", "÷ fastvit",
             "timm compiled µs", "÷ fastvit", "timm max-autotune µs", "÷ fastvit"]  # fmt: skip
    return markdown(heads, rows)


def _key(case: dict[str, Any]) -> tuple[str, str]:
    return _shape(case), case["dtype"]


def _shape(case: dict[str, Any]) -> str:
    shape = case["shape"]
    plain = "" if shape["grid"] else ", plain"
    return f"{shape['label']} {shape['H']}x{shape['d']} N={shape['N']} B={shape['B']}{plain}"

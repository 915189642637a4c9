# SPDX-License-Identifier: Apache-2.0
"""Tables of what makes tokens of images: the patch embedding and the convolutional stem."""

from __future__ import annotations

from typing import Any

from gpu.cells import (
    NOTHING,
    Records,
    best_of,
    cases_of,
    fastest_of,
    host,
    markdown,
    median,
    megabytes,
    ratio,
    share,
    spread,
    warm,
)

_CHAINS = ("timm", "timm channels_last", "linear")
_COMPILED_CHAINS = tuple(f"{name} compiled" for name in _CHAINS)
_EAGER_STEMS = ("eager", "eager channels_last", "cuDNN conv-bias-relu")
_COMPILED_STEMS = ("compiled", "max-autotune-no-cudagraphs")


def embedding(records: Records) -> str:
    rows = []
    for case in cases_of(records, "patch_embed", "eager"):
        found, (ours, name, peer) = case["contenders"], best_of(case, _CHAINS)
        row = [*_problem(case), spread(ours), share(ours), warm(ours), name, spread(peer)]
        row += [ratio(peer, ours), warm(peer), median(found.get("timm"))]
        row += [ratio(found.get("timm"), ours), host(case)]
        rows.append(row)
    heads = ["shape", "dtype", "pixels", "mode", "fastvit µs (20–80 %)", "of floor", "warm µs",
             "fastest eager", "µs (20–80 %)", "÷ fastvit", "warm µs", "timm µs", "÷ fastvit",
             "host µs"]  # fmt: skip
    return markdown(heads, rows)


def embedding_more(records: Records) -> str:
    """What does less, or takes long to make; compiled ones in turns with ours of that contest."""
    compiled = {_problem(c): c["contenders"] for c in cases_of(records, "patch_embed", "compiled")}
    rows = []
    for case in cases_of(records, "patch_embed", "eager"):
        found, others = case["contenders"], compiled.get(_problem(case), {})
        row = [*_problem(case)]
        for name in _COMPILED_CHAINS:
            row += [median(others.get(name)), ratio(others.get(name), others.get("fastvit"))]
        conv = found.get(fastest_of(found, ("conv alone", "conv alone channels_last")))
        portable, memory = found.get("fastvit portable"), case.get("memory", {})
        row += [median(conv), share(conv), median(portable), share(portable)]
        row += [megabytes(memory, which, ("fastvit", "timm")) for which in ("kept", "peak")]
        rows.append(row)
    peers = [head for name in _COMPILED_CHAINS for head in (f"{name} µs", "÷ fastvit")]
    heads = ["shape", "dtype", "pixels", "mode", *peers, "convolution alone µs", "of its floor",
             "fastvit with mma.sync µs", "of floor", "kept MB, fastvit / timm",
             "peak MB, fastvit / timm"]  # fmt: skip
    return markdown(heads, rows)


def stem(records: Records) -> str:
    rows = []
    for case in cases_of(records, "stem", "eager"):
        found, (ours, name, peer) = case["contenders"], best_of(case, _EAGER_STEMS)
        row = [*_stem(case), spread(ours), share(ours), warm(ours)]
        for other in _EAGER_STEMS:
            row += [median(found.get(other)), ratio(found.get(other), ours)]
        rows.append([*row, name, share(peer), warm(peer), host(case)])
    peers = [head for name in _EAGER_STEMS for head in (f"{name} µs", "÷ fastvit")]
    heads = ["stem", "dtype", "mode", "fastvit µs (20–80 %)", "of floor", "warm µs", *peers,
             "fastest of these", "of floor", "warm µs", "host µs"]  # fmt: skip
    return markdown(heads, rows)


def stem_more(records: Records) -> str:
    """Compiled in turns with ours of that contest, all in channels_last."""
    others = {
        (*_stem(case), what): case["contenders"]
        for what in _COMPILED_STEMS
        for case in cases_of(records, "stem", what)
    }
    rows = []
    for case in cases_of(records, "stem", "eager"):
        row = [*_stem(case)]
        for what in _COMPILED_STEMS:
            contest = others.get((*_stem(case), what), {})
            other = contest.get("compiled channels_last")
            row += [spread(other), ratio(other, contest.get("fastvit"))]
        memory, names = case.get("memory", {}), ("fastvit", "eager channels_last")
        row += [megabytes(memory, which, names) for which in ("kept", "peak")]
        if any(cell != NOTHING for cell in row[3:]):
            rows.append(row)
    heads = ["stem", "dtype", "mode", "compiled µs (20–80 %)", "÷ fastvit",
             "max-autotune µs (20–80 %)", "÷ fastvit", "kept MB, fastvit / eager",
             "peak MB, fastvit / eager"]  # fmt: skip
    return markdown(heads, rows)


def _stem(case: dict[str, Any]) -> tuple[str, str, str]:
    shape = case["shape"]
    height, width = shape["size"]
    name = f"{shape['label']} {height}x{width} B={shape['B']}"
    return name, case["dtype"], case["mode"]


def _problem(case: dict[str, Any]) -> tuple[str, str, str, str]:
    shape = case["shape"]
    height, width = shape["size"]
    name = f"p={shape['patch']} {height}x{width} D={shape['D']} B={shape['B']}"
    return name, case["dtype"], case["pixels"], case["mode"]

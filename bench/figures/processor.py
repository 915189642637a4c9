# SPDX-License-Identifier: Apache-2.0
"""Blocks from what ``pytest bench/ --benchmark`` measured on processors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from fastvit.benchmark import modules
from fastvit.benchmark.contests import DEIT, FASTVIT, LIBRARY
from fastvit.benchmark.modules import Outcome
from fastvit.benchmark.table import epoch_table
from fastvit.benchmark.text import NOTHING
from figures import load
from figures.sources import Source, results

_MODULES, _EPOCH, _ACCELERATED = "modules.json", "epoch.json", "accelerated/modules.json"
_DTYPES = "float32 and bfloat16"
_WHOSE = {"ConViT-small": "timm's", "ViT_C-4GF": "torchvision's"}


def blocks(root: Path, base: Path) -> dict[str, Callable[[], str]]:
    """What makes each block, by name, for a document in the folder ``base``."""
    return {
        "processor": lambda: results(root, _MODULES)[0].processor,
        "processors": lambda: _processors(root),
        "modules": lambda: _modules(root, base),
        "modules elsewhere": lambda: _elsewhere(root, base),
        "convit over deit": lambda: _over_deit(root, base),
        "accelerated": lambda: _accelerated(root, base),
        "patch embedding": lambda: _patches(root, base),
        "epoch": lambda: _epoch(root, base),
    }


def layers(source: Source) -> list[Outcome]:
    """All contests but those of accelerated models."""
    return [o for o in load.outcomes(source.data) if not o.entry.name.endswith("accelerated")]


def _processors(root: Path) -> str:
    names = [source.processor for source in results(root, _MODULES)]
    return " and ".join(names)


def _modules(root: Path, base: Path) -> str:
    source = results(root, _MODULES)[0]
    table = modules.tables(layers(source), markdown=True)[0]
    return f"{source.head(_DTYPES, base)}\n\n{table}"


def _elsewhere(root: Path, base: Path) -> str:
    """Of the other processors ratios only: their milliseconds stand beside their samples."""
    parts = []
    for source in results(root, _MODULES)[1:]:
        rows = []
        for o in layers(source):
            name = o.entry.name.removesuffix(" against DeiT")
            memory = f"{o.peaks[FASTVIT] / o.peaks[LIBRARY]:.2f}" if o.peaks else NOTHING
            ratios = [o.ratio(LIBRARY), o.ratio(LIBRARY, "products"), o.fastest_other()]
            cells = [NOTHING if r is None else f"{r:.2f}x" for r in ratios]
            rows.append([name, o.entry.dtype_name, str(o.entry.batch), *cells, memory])
        heads = ["what", "dtype", "batch", "speed-up", "at most", "otherwise", "memory"]
        parts.append(f"{source.head(_DTYPES, base)}\n\n{_table(heads, rows, left=2)}")
    return "\n\n".join(parts) or "On no other processor."


def _over_deit(root: Path, base: Path) -> str:
    """The last of the tables of a report, for every processor."""
    parts = []
    for source in results(root, _MODULES):
        table = modules.tables(load.outcomes(source.data), markdown=True)[-1]
        parts.append(f"{source.head(_DTYPES, base)}\n\n{table}")
    return "\n\n".join(parts)


def _accelerated(root: Path, base: Path) -> str:
    parts = []
    for name in (_MODULES, _ACCELERATED):
        for source in results(root, name):
            found = [o for o in load.outcomes(source.data) if o.entry.name.endswith("accelerated")]
            # Measured with the others since; what was measured before them is superseded.
            if found and not any(source.folder == folder for folder, _ in parts):
                command = "pytest bench/test_modules.py --benchmark --modules '*accelerated*'"
                head = source.head(_DTYPES, base, command=f"{command} --report DIR")
                rows = [_accelerated_row(o) for o in found]
                heads = ["what", "dtype", "batch", "library ms", "fastvit ms", "speed-up"]
                parts.append((source.folder, f"{head}\n\n{_table(heads, rows, left=2)}"))
    return "\n\n".join(text for _, text in parts)


def _accelerated_row(o: Outcome) -> list[str]:
    name = o.entry.name.removesuffix(" accelerated")
    return [
        f"{_WHOSE.get(name, '')} {name}".strip(),
        o.entry.dtype_name,
        str(o.entry.batch),
        *(_milliseconds(o, contender) for contender in (LIBRARY, FASTVIT)),
        f"{o.ratio(LIBRARY):.2f}x",
    ]


def _patches(root: Path, base: Path) -> str:
    """Best and slowest round: these calls are short, and what disturbs them shows."""
    parts = []
    for source in results(root, _MODULES):
        rows = []
        for o in layers(source):
            if not o.entry.name.startswith("patch embedding"):
                continue
            bound = o.ratio(LIBRARY, "products")
            rows.append(
                [
                    o.entry.name, o.entry.dtype_name, str(o.entry.batch),
                    *(_range(o, contender) for contender in (LIBRARY, FASTVIT)),
                    f"{o.ratio(LIBRARY):.2f}x", NOTHING if bound is None else f"{bound:.2f}x",
                ]
            )  # fmt: skip
        heads = ["what", "dtype", "batch", "library ms", "fastvit ms", "speed-up", "at most"]
        parts.append(f"{source.head(_DTYPES, base)}\n\n{_table(heads, rows, left=2)}")
    return "\n\n".join(parts)


def _epoch(root: Path, base: Path) -> str:
    source = results(root, _EPOCH)[0]
    table = epoch_table(load.results(source.data), markdown=True)
    head = source.head(f"{source.data['dtype']}, synthetic images", base)
    return f"{head}\n\n{table}"


def _milliseconds(o: Outcome, contender: str) -> str:
    best = o.best(contender)
    return NOTHING if best is None else f"{best * 1e3:,.2f}"


def _range(o: Outcome, contender: str) -> str:
    samples = o.seconds[contender]
    return f"{min(samples) * 1e3:.2f}–{max(samples) * 1e3:.2f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    marks = [":---"] * left + ["---:"] * (len(heads) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, marks, *rows))


def figure(root: Path, name: str) -> str:
    """A single figure, for a sentence.

    Args:
        name: ``KIND/FOLDER/CONTEST/DTYPE/BATCH`` of ``modules.json``, kinds "speed-up", "at most",
            "memory", "convit over deit", "library ms", "fastvit ms"; or
            ``epoch speed-up/FOLDER/ROWS``. FOLDER "first" is that of the first processor. With
            wildcards, or several patterns between commas, the least and the most.

    Raises:
        KeyError: nothing is called so.
    """
    kind, folder, *rest = name.split("/")
    values = _epoch_values(root, folder, *rest) if kind == "epoch speed-up" else []
    if kind in _KINDS:
        values = [
            value
            for o in load.outcomes(_of(root, folder, _MODULES).data)
            if _fits(o, *rest) and (value := _KINDS[kind][0](o)) is not None
        ]
    if not values:
        raise KeyError(f"no figure is called {name!r}")
    form = _KINDS[kind][1] if kind in _KINDS else "{:.2f}x"
    shown = list(dict.fromkeys(form.format(value) for value in (min(values), max(values))))
    return " to ".join(shown)


def _memory(o: Outcome) -> float | None:
    return o.peaks[FASTVIT] / o.peaks[LIBRARY] if o.peaks else None


def _in_milliseconds(contender: str) -> Callable[[Outcome], float | None]:
    return lambda o: None if (best := o.best(contender)) is None else best * 1e3


#: What makes each kind of figure, and how it is written.
_KINDS: dict[str, tuple[Callable[[Outcome], float | None], str]] = {
    "speed-up": (lambda o: o.ratio(LIBRARY), "{:.2f}x"),
    "at most": (lambda o: o.ratio(LIBRARY, "products"), "{:.2f}x"),
    "memory": (_memory, "{:.2f}"),
    "convit over deit": (lambda o: o.ratio(DEIT), "{:.2f}"),
    "library ms": (_in_milliseconds(LIBRARY), "{:,.2f}"),
    "fastvit ms": (_in_milliseconds(FASTVIT), "{:,.2f}"),
}


def _fits(o: Outcome, contest: str, dtype: str, batch: str) -> bool:
    named = any(fnmatchcase(o.entry.name, pattern) for pattern in contest.split(","))
    return named and fnmatchcase(o.entry.dtype_name, dtype) and str(o.entry.batch) == batch


def _of(root: Path, folder: str, file: str) -> Source:
    for source in results(root, file):
        if folder in ("first", source.folder):
            return source
    raise KeyError(f"{folder} has no {file}")


def _epoch_values(root: Path, folder: str, rows: str) -> list[float]:
    found = load.results(_of(root, folder, _EPOCH).data)
    return [
        result.speedup
        for result in found
        if result.speedup is not None
        and any(fnmatchcase(result.row.name, pattern) for pattern in rows.split(","))
    ]

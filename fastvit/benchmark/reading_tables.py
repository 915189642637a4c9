# SPDX-License-Identifier: Apache-2.0
"""Tables in which nothing was timed: what compilers say of kernels, and what a call counts to."""

from __future__ import annotations

from typing import Any

from fastvit.benchmark.figures import Figure, Key, Results

#: What names a row of a table of resources, and what is no figure of it.
_NAMES = ("arch", "kernel", "direction", "case")
_IGNORED = ("hash", "remarks", "file")
_MORE = ("blocks_per_sm", "blocks", "least_blocks")
_NEITHER = ("warps", "threads", "barriers", "most_registers")


def is_table(content: dict[str, Any]) -> bool:
    """Whether this is a table of ``bench/resources.py`` or ``bench/cuda_resources.py``."""
    return "rows" in content and ("triton" in content or "nvcc" in content)


def read_table(content: dict[str, Any], results: Results) -> None:
    """Add registers, shared memory, predicted times and all else that a row has."""
    compiler = "triton" if "triton" in content else "nvcc"
    version = content[compiler]
    source = f"{compiler} {version}" if results.folder else compiler
    results.makers[source] = version
    for row in content["rows"]:
        direction, case = row.get("direction", ""), row.get("case", "")
        key = Key(source, row["kernel"], shape=row["arch"], dtype=case, mode=direction)
        for name, value in row.items():
            if name in (*_NAMES, *_IGNORED):
                continue
            better = "more" if name in _MORE else "less"
            if name in _NEITHER or isinstance(value, str):
                better = ""
            results.add(Figure(key._replace(quantity=name), ours=True, value=value, better=better))


def is_counts(content: dict[str, Any]) -> bool:
    """Whether this is what ``bench/counts.py`` wrote."""
    return "composed" in content and "launches" in content


def read_counts(content: dict[str, Any], results: Results) -> None:
    """Add operators and bytes of a call on the composed path, launches and bytes on the kernels."""
    results.makers["counted with torch"] = ", ".join(content["composed"])
    for version, rows in content["composed"].items():
        for row in rows:
            key = Key(f"torch {version}", row["case"], mode=row["direction"])
            _counts(key, row, ("operators", "views", "allocated", "written"), results)
            for name, (calls, written) in row["by_operator"].items():
                named = key._replace(contender=name)
                results.add(Figure(named._replace(quantity="calls"), True, value=calls))
                results.add(Figure(named._replace(quantity="bytes written"), True, value=written))
    for row in content["launches"]:
        key = Key("launches", row["case"], shape=row["arch"], mode=row["direction"])
        _counts(key, row, ("launches", "bytes"), results)


def _counts(key: Key, row: dict[str, Any], names: tuple[str, ...], results: Results) -> None:
    for name in names:
        results.add(Figure(key._replace(quantity=name), True, value=row[name]))

# SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA kernels for every default architecture of CMakeLists.txt and keeps what they
take of it in ``bench/results/resources``, one table for each minor version of nvcc. Neither a GPU
nor torch is needed.

    python bench/cuda_resources.py --write   compile everything, write this nvcc's table
    python bench/cuda_resources.py --check   compile one architecture, exit 1 on a difference

With the nvcc that wrote the table, ``--check`` expects the sources to be those of the table, and
one architecture, picked by their hash, to come out the same. Other versions give other numbers;
with them only the rules are checked. These hold always: nothing spills, the compiler has no
remarks, the patch embedding has at most 24 instantiations on an architecture, and its products and
copies are the instructions that they are written for.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

import cuda_resource_report as report
from cuda_resource_build import (
    FLAGS,
    ROOT,
    Compiler,
    Sources,
    compile_all,
    find_compiler,
    read_sources,
)
from cuda_resource_report import Row

TABLES = ROOT / "bench" / "results" / "resources"

MOST_INSTANTIATIONS = 24


def is_main(row: Row) -> bool:
    """Of the patch embedding or the gradient of its weight, not of the passes before and after."""
    named = re.match(r"(patch_embed|weight_gradient)(?!_sum)", row["kernel"])
    return named is not None and row["instructions"] != report.EMPTY


def faults(rows: list[Row], text: str) -> list[str]:
    """Which rules the rows break, in words. ``text``: the sources."""
    found = []
    for row in rows:
        name = f"{row['arch']} | {row['kernel']}"
        if report.spilled(row):
            found.append(
                f"{name}: spills, {row['registers']} registers, {row['stack']} bytes of stack, "
                f"{row['spill_stores']} stored, {row['spill_loads']} loaded; choose a smaller tile "
                "or fewer blocks in its launch bounds"
            )
        found += [f"{name}: {remark}" for remark in row["remarks"]]
        # The path for every architecture, except without tensor cores.
        if re.match(r"(patch_embed_kernel|weight_gradient_kernel)<(?!ieee)", row["kernel"]):
            missing = {"mma.sync", "cp.async"} - set(row["instructions"].split(" + "))
            found += [f"{name}: expected {x}, got {row['instructions']}" for x in sorted(missing)]
    for arch, count in Counter(row["arch"] for row in rows if is_main(row)).items():
        if count > MOST_INSTANTIATIONS:
            found.append(f"{arch}: {count} instantiations, expected at most {MOST_INSTANTIATIONS}")
    hopper = [row["instructions"].split(" + ") for row in rows if row["arch"] == "sm_90a"]
    if hopper and "wgmma.mma_async" in text:
        missing = {"wgmma", "TMA"} - {name for names in hopper for name in names}
        found += [f"sm_90a: no kernel has {name}" for name in sorted(missing)]
    return found


def read(path: Path) -> tuple[str, list[Row]]:
    """The version of nvcc and the rows of a table."""
    table = json.loads(path.read_text("utf-8"))
    return table["nvcc"], table["rows"]


def write(
    compiler: Compiler, sources: Sources, archs: list[str], folder: Path, jobs: int
) -> list[str]:
    """Compiles and writes ``archs``; the others stay as the table has them. Returns the faults."""
    path = folder / compiler.table
    rows = compile_all(compiler, sources, archs, jobs)
    new = {f"sm_{arch}" for arch in archs}
    version, old = read(path) if path.exists() else ("none", [])
    if version == compiler.version:
        rows += [row for row in old if row["arch"] not in new]
    order = [f"sm_{arch}" for arch in sources.archs]
    rows = sorted((r for r in rows if r["arch"] in order), key=lambda r: order.index(r["arch"]))
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    text = f'{{\n "nvcc": "{compiler.version}",\n "flags": "{" ".join(FLAGS)}",\n "rows": [\n'
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}{lines}\n ]\n}}\n", "utf-8")
    tables = dict(read(p) for p in sorted(folder.glob("nvcc-*.json")))
    (folder / "cuda.md").write_text(report.markdown(tables), "utf-8")
    return faults(rows, sources.text)


def differences(stored: list[Row], made: list[Row]) -> list[str]:
    """How rows differ from those of the table for the same architectures, in words."""
    expected, came = (
        {f"{row['arch']} | {row['kernel']}": row for row in rows} for rows in (stored, made)
    )
    found = [f"{name}: not in the table" for name in came.keys() - expected.keys()]
    found += [f"{name}: in the table only" for name in expected.keys() - came.keys()]
    for name in expected.keys() & came.keys():
        old, new = expected[name], came[name]
        for column in new:
            if old.get(column) != new[column]:
                found.append(f"{name}: expected {column} {old.get(column)}, got {new[column]}")
    return sorted(found)


def stale(stored: list[Row], sources: Sources, known: list[str]) -> list[str]:
    """Why a table is not of these sources, in words."""
    expected, got = {f"sm_{arch}" for arch in known}, {row["arch"] for row in stored}
    if expected != got:
        return [f"the table has {', '.join(sorted(got))}, expected {', '.join(sorted(expected))}"]
    hashes = {row["hash"] for row in stored} - {sources.hash}
    return [f"the table is of sources {x}, these are {sources.hash}" for x in sorted(hashes)]


def check(
    compiler: Compiler,
    sources: Sources,
    known: list[str],
    archs: list[str],
    folder: Path,
    jobs: int,
) -> list[str]:
    """What is wrong, in words."""
    path = folder / compiler.table
    version, stored = read(path) if path.exists() else ("none", [])
    same = version == compiler.version
    if not same:
        print(f"no table is of nvcc {compiler.version}: only the rules are checked")
    elif problems := stale(stored, sources, known):
        return [f"{words}; {_cure(compiler)}" for words in problems]
    made = compile_all(compiler, sources, archs, jobs)
    problems = faults(made, sources.text)
    if same:
        of_these = [row for row in stored if row["arch"] in {f"sm_{arch}" for arch in archs}]
        problems += [f"{words}; {_cure(compiler)}" for words in differences(of_these, made)]
        problems += [words for words in faults(stored, sources.text) if words not in problems]
    return problems


def _cure(compiler: Compiler) -> str:
    return (
        "if that is meant, run `python bench/cuda_resources.py --write` with nvcc "
        f"{compiler.version} or another, and commit {compiler.table} and cuda.md"
    )


def main() -> int:
    """Exit status: 0 if all is as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="compile and write the table")
    what.add_argument("--check", action="store_true", help="compare with the table")
    sources = read_sources()
    parser.add_argument("--arch", action="append", choices=sources.archs, help="only this")
    parser.add_argument("--optional", action="store_true", help="without an nvcc, do nothing")
    parser.add_argument("--jobs", type=int, default=2, help="files at once, of up to 2 GB each")
    parser.add_argument("--table", type=Path, default=TABLES, help="folder of the tables")
    options = parser.parse_args()
    compiler = find_compiler()
    if compiler is None:
        print("no nvcc: the CUDA kernels are not compiled", file=sys.stderr)
        return 0 if options.optional else 1
    # Older versions do not know all, and the build then leaves these out.
    known = [arch for arch in sources.archs if arch.rstrip("af") in compiler.archs]
    sample = sources.sample if sources.sample in known else known[-1]
    if options.write:
        archs = options.arch or known
        problems = write(compiler, sources, archs, options.table, options.jobs)
    else:
        archs = options.arch or [sample]
        problems = check(compiler, sources, known, archs, options.table, options.jobs)
    for words in problems:
        print(words, file=sys.stderr)
    state = f"{len(problems)} problems" if problems else "no spills, the instructions as meant"
    print(f"nvcc {compiler.version}, sources {sources.hash}: {' '.join(archs)}, {state}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels ahead of time for every architecture that has launch configurations,
and keeps what they take of it in ``bench/results/resources``, one table for each minor version of
Triton. Neither a GPU nor torch is needed: ``pip install triton`` is all.

    python bench/resources.py --write   compile everything, write this Triton's table
    python bench/resources.py --check   compare with the table, exit 1 on a difference

What is compiled is what is launched: the arguments come from the functions that launch the kernels
(``kernels/ahead``; cases in ``resource_cases.py``, ``resource_stem.py`` and
``resource_stem_gradient.py``), and their signature from Triton's own binder. ``--check`` compiles
every pair whose sources or arguments changed since the table was written, by their hash, and about
one in ten of the others. No pair may spill registers or take more shared memory than a block can
have.

``kernels/tuned.json``, which ``fastvit tune`` measured, is compiled with it, all that is for this
version of Triton.

Times in the tables are predicted, not measured (``kernels/ahead/model.py``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

# Triton reads these when it is imported, here or in a worker: kernels are to be compiled, not
# interpreted, and not taken from what was compiled before.
os.environ.pop("TRITON_INTERPRET", None)
if multiprocessing.parent_process() is None:
    _cache = tempfile.TemporaryDirectory(prefix="fastvit-resources-")
    os.environ["TRITON_CACHE_DIR"] = _cache.name

# The kernels of this clone, whatever else is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import resource_cases
import resource_stem
import resource_stem_gradient
import triton

from kernels import tuned
from kernels.ahead import model
from kernels.ahead.compiler import KERNELS, Case, Pair, Row, attempt, bind, launches
from kernels.ahead.posed import case_of
from kernels.configs import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "bench" / "results" / "resources"
TUNED = ROOT / "kernels" / "tuned.json"
VERSION = ".".join(triton.__version__.split(".")[:2])

CASES: tuple[Case, ...] = (
    *resource_cases.CASES,
    *resource_stem.CASES,
    *resource_stem_gradient.CASES,
)

#: Read from what was compiled; the other columns follow from these and the launch.
COMPILED = ("registers", "stack", "spills", "shared", "tensor_columns", "instruction")

#: One in how many pairs with an unchanged hash is compiled again.
SAMPLE = 10

Rows = dict[str, Row]


def all_pairs(archs: list[str], kernels: list[str]) -> list[Pair]:
    """In the order of architectures, cases and kernels."""
    return [
        Pair(arch, case, kernel)
        for arch in archs
        for case in CASES
        for kernel in case.kernels
        if kernel in kernels and kernel in launches(arch, case)
    ]


@cache
def _source(name: str) -> str:
    """A file of ``kernels`` and those that it imports from there."""
    texts: dict[str, str] = {}
    queue = [name]
    while queue:
        name = queue.pop()
        if name not in texts:
            texts[name] = (ROOT / "kernels" / f"{name}.py").read_text("utf-8")
            queue += re.findall(r"^from \.(\w+) import", texts[name], re.MULTILINE)
    return "".join(texts[name] for name in sorted(texts))


def hash_of(pair: Pair) -> str:
    """Of everything that decides what the compiler makes of the pair, but the compiler."""
    bound = bind(pair)
    given = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
    options = {name: bound.options[name] for name in given}
    constants = sorted((path, repr(value)) for path, value in bound.constants.items())
    # Triton's versions differ in whether they list arguments without attributes.
    attributes = sorted((path, repr(x)) for path, x in bound.attributes.items() if x)
    decides = (pair.arch, options, bound.signature, constants, attributes)
    text = _source(KERNELS[pair.kernel]) + repr(decides)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def row_of(pair: Pair, taken: Row, digest: str) -> Row:
    """The row of the table for what the compiler made of a pair with this hash."""
    launch, done = pair.launch, model.work(pair.kernel, pair.launch.arguments)
    arguments, config = launch.arguments, launch.config
    warps = arguments["num_warps"]
    blocks = model.blocks_per_multiprocessor(
        pair.arch, taken["registers"], taken["shared"], warps, taken["tensor_columns"]
    )
    arithmetic, instruction = pair.case.arithmetic, taken["instruction"]
    return {
        "arch": pair.arch,
        "kernel": pair.kernel,
        "direction": pair.case.direction,
        "case": pair.case.name,
        "config": _config_text(config),
        **{name: taken[name] for name in COMPILED},
        "warps": warps,
        "blocks_per_sm": blocks,
        "hash": digest,
        "predicted_us": _rounded(model.predict(pair.arch, arithmetic, instruction, blocks, done)),
        "predicted_floor_us": _rounded(model.floor(pair.arch, done)),
        "bytes": done.bytes,
        "flops": done.flops,
        "exponentials": done.exponentials,
    }


def _rounded(number: float) -> float:
    return float(f"{number:.3g}")


def _config_text(config: Any) -> str:
    """Tiles, stages and what else is not at its default: "64 x 128+64+16, d 32+16, s2 resident"."""

    def text(sizes: Any) -> str:
        return "+".join(map(str, sizes)) if isinstance(sizes, tuple) else str(sizes)

    parts = []
    if config.rows:
        parts.append(f"{config.rows} x {text(config.keys)}")
    if config.channels:
        parts.append(f"d {text(config.channels)}")
    if config.groups:
        parts.append(f"{config.groups} groups")
    stages = f"s{config.stages}" + (" resident" if config.resident else "")
    return ", ".join([*parts, stages])


def faults(row: Row) -> list[str]:
    """Why a row may not be, in words."""
    name = f"{row['arch']} | {row['kernel']} | {row['direction']} {row['case']}"
    found = []
    if row["stack"] or row["spills"]:
        found.append(
            f"{name}: spills, {row['registers']} registers, {row['stack']} bytes of stack, "
            f"{row['spills']} instructions ({row['config']}, {row['warps']} warps); choose a "
            f"smaller tile or more warps in kernels/{_configs(row)}"
        )
    limit = model.LIMITS[row["arch"]].shared_block * 1024
    if row["shared"] > limit:
        found.append(
            f"{name}: {row['shared']} bytes of shared memory, a block may have {limit}; choose a "
            f"smaller tile or fewer stages in kernels/{_configs(row)}"
        )
    return found


def _configs(row: Row) -> str:
    return "stem_configs.py" if row["kernel"].startswith("stem_") else "configs.py"


def read(path: Path) -> Rows:
    """The rows of a table by the name of their pair."""
    rows = json.loads(path.read_text("utf-8"))["rows"]
    return {f"{r['arch']} | {r['kernel']} | {r['direction']} {r['case']}": r for r in rows}


def run(pairs: list[Pair], jobs: int) -> dict[Pair, Row | str]:
    """Compiles; a line for each pair to stderr."""
    results: dict[Pair, Row | str] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        # Few are done sooner than processes start.
        made = map(attempt, pairs) if jobs == 1 or len(pairs) < 4 else pool.map(attempt, pairs)
        for pair, taken in made:
            results[pair] = taken
            words = taken if isinstance(taken, str) else ", ".join(map(_told, taken.items()))
            print(f"{len(results)}/{len(pairs)} {pair.name}: {words}", file=sys.stderr, flush=True)
    return results


def _told(item: tuple[str, Any]) -> str:
    return f"{item[0]} {item[1]}"


def write(pairs: list[Pair], everything: list[Pair], folder: Path, jobs: int) -> list[str]:
    """Compiles ``pairs`` and writes them; the rest of ``everything`` stays as the table has it."""
    path = folder / f"triton-{VERSION}.json"
    old = read(path) if path.exists() else {}
    problems, rows = [], []
    # Now, of the sources that are compiled; they may be edited meanwhile.
    hashes = {pair: hash_of(pair) for pair in pairs}
    results = run(pairs, jobs)
    for pair in everything:
        taken = results.get(pair)
        if isinstance(taken, str):
            problems.append(f"{pair.name}: does not compile with Triton {VERSION}: {taken}")
        elif taken is not None:
            rows.append(row_of(pair, taken, hashes[pair]))
        elif pair.name in old:
            # What does not come from the compiler may be another all the same.
            rows.append(row_of(pair, old[pair.name], old[pair.name]["hash"]))
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    text = f'{{\n "triton": "{VERSION}",\n "times": "predicted, not measured",\n "rows": [\n'
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}{lines}\n ]\n}}\n", "utf-8")
    from resource_report import markdown

    tables = {p.stem.removeprefix("triton-"): read(p) for p in folder.glob("triton-*.json")}
    (folder / "README.md").write_text(markdown(tables), "utf-8")
    return problems + [words for row in rows for words in faults(row)]


def check(pairs: list[Pair], everything: list[Pair], folder: Path, jobs: int) -> list[str]:
    """What differs from the table, in words."""
    path = folder / f"triton-{VERSION}.json"
    if not path.exists():
        return [f"there is no table for Triton {VERSION} in {folder}; {_cure()}"]
    table = read(path)
    problems = [f"{pair.name}: not in the table; {_cure()}" for pair in pairs
                if pair.name not in table]  # fmt: skip
    if len(pairs) == len(everything):
        surplus = table.keys() - {pair.name for pair in everything}
        problems += [f"{name}: in the table, but not chosen; {_cure()}" for name in sorted(surplus)]
    pairs = [pair for pair in pairs if pair.name in table]
    hashes = {pair: hash_of(pair) for pair in pairs}
    stale = {pair for pair in pairs if table[pair.name]["hash"] != hashes[pair]}
    results = run([pair for pair in pairs if pair in stale or _sampled(pair)], jobs)
    for pair in pairs:
        stored, taken = table[pair.name], results.get(pair)
        if isinstance(taken, str):
            problems.append(f"{pair.name}: does not compile with Triton {VERSION}: {taken}")
            continue
        made = row_of(pair, stored if taken is None else taken, hashes[pair])
        # A stale hash alone is no fault: the compiler made the same of other sources.
        different = [name for name in made if made[name] != stored.get(name) and name != "hash"]
        if different:
            expected = ", ".join(f"{name} {stored.get(name)}" for name in different)
            came = ", ".join(f"{name} {made[name]}" for name in different)
            problems.append(f"{pair.name}: expected {expected}, but came {came}; {_cure()}")
        problems += faults(made)
    if stale and not problems:
        print(f"{len(stale)} pairs have new sources and take the same; {_cure()}", file=sys.stderr)
    return problems


def check_tuned(file: Path, archs: list[str], kernels: list[str], jobs: int) -> list[str]:
    """What is wrong with the configurations of a table of tuned ones, in words."""
    pairs = []
    for arch in archs:
        for problem, chosen in tuned.read(file, arch, VERSION).entries:
            fitted = problem.fitted(arch, chosen) if chosen else ()
            if fitted is None:
                return [f"{file}: {problem.name}: {arch} cannot do it with {dict(chosen)}"]
            case = case_of(problem, fitted)
            pairs += [Pair(arch, case, name) for name, _ in fitted if name in kernels]
    problems = []
    for pair, taken in run(pairs, jobs).items():
        if isinstance(taken, str):
            problems.append(f"{pair.name}: does not compile with Triton {VERSION}: {taken}")
        else:
            problems += faults(row_of(pair, taken, ""))
    return [f"{file}: {words}" for words in problems]


def _sampled(pair: Pair) -> bool:
    return int(hashlib.sha256(pair.name.encode()).hexdigest(), 16) % SAMPLE == 0


def _cure() -> str:
    return (
        "if that is meant, update the table by `python bench/resources.py --write` with Triton "
        f"{VERSION}, or all tables by `make resources`"
    )


def main() -> int:
    """Exit status: 0 if all is as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="compile and write the table")
    what.add_argument("--check", action="store_true", help="compare with the table")
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="only this")
    parser.add_argument("--kernel", action="append", choices=list(KERNELS), help="only this")
    parser.add_argument(
        "--changed", action="store_true", help="with --write, only pairs whose hash is another"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--table", type=Path, default=TABLES, help="folder of the tables")
    parser.add_argument("--tuned", type=Path, default=TUNED, help="table of `fastvit tune`")
    options = parser.parse_args()
    everything = all_pairs(list(ARCHITECTURES), list(KERNELS))
    pairs = all_pairs(options.arch or list(ARCHITECTURES), options.kernel or list(KERNELS))
    pairs.sort(key=everything.index)
    path = options.table / f"triton-{VERSION}.json"
    if options.changed and path.exists():
        hashes = {name: row["hash"] for name, row in read(path).items()}
        pairs = [pair for pair in pairs if hashes.get(pair.name) != hash_of(pair)]
    action = write if options.write else check
    problems = action(pairs, everything, options.table, options.jobs)
    if options.check:
        archs, kernels = options.arch or list(ARCHITECTURES), options.kernel or list(KERNELS)
        problems += check_tuned(options.tuned, archs, kernels, options.jobs)
    for words in problems:
        print(words, file=sys.stderr)
    count = len({(pair.kernel, pair.case) for pair in pairs})
    state = f"{len(problems)} problems" if problems else "no spills, all within shared memory"
    print(f"Triton {VERSION}: {count} pairs of kernel and case, {len(pairs)} rows, {state}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

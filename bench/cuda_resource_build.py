# SPDX-License-Identifier: Apache-2.0
"""The CUDA sources and their compilation for ``bench/cuda_resources.py``."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cuda_resource_report as report
from cuda_resource_report import Row

ROOT = Path(__file__).resolve().parents[1]

#: Those of CMake's release build. Debug information and visibility change no machine code.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG")


class Sources(NamedTuple):
    """What decides what the compiler makes, but the compiler."""

    files: tuple[str, ...]
    archs: tuple[str, ...]
    #: All sources and headers, without comments on lines of their own.
    text: str

    @property
    def hash(self) -> str:
        decides = repr((self.files, self.archs, FLAGS)) + self.text
        return hashlib.sha256(decides.encode()).hexdigest()[:12]

    @property
    def sample(self) -> str:
        """The architecture that a check compiles."""
        return self.archs[int(self.hash, 16) % len(self.archs)]


def read_sources(root: Path = ROOT) -> Sources:
    """Every ``csrc/*.cu`` with the headers that it includes, and CMake's architectures."""
    files = sorted(path.name for path in (root / "csrc").glob("*.cu"))
    texts: dict[str, str] = {}
    queue = list(files)
    while queue:
        name = queue.pop()
        # What is not there belongs to the tests' emulator, or to CUDA.
        if name not in texts and (root / "csrc" / name).exists():
            texts[name] = (root / "csrc" / name).read_text("utf-8")
            queue += re.findall(r'^\s*#include "([^"]+)"', texts[name], re.MULTILINE)
    text = "".join(f"{name}\n{texts[name]}\n" for name in sorted(texts))
    lines = [line for line in text.splitlines() if not re.match(r"\s*(//|$)", line)]
    cmake = (root / "CMakeLists.txt").read_text("utf-8")
    archs = re.search(r"set\(default_cuda_archs ([^)]+)\)", cmake)
    if archs is None:
        raise SystemExit("expected set(default_cuda_archs ...) in CMakeLists.txt")
    return Sources(tuple(files), tuple(archs[1].split()), "\n".join(lines))


class Compiler(NamedTuple):
    path: str
    #: Such as 13.0.88.
    version: str
    #: Compute capabilities, without letters.
    archs: frozenset[str]

    @property
    def table(self) -> str:
        return f"nvcc-{'.'.join(self.version.split('.')[:2])}.json"


def find_compiler() -> Compiler | None:
    """The nvcc that setup.py would build with."""
    if chosen := os.environ.get("CUDACXX"):
        path = shutil.which(chosen)
    elif home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        path = shutil.which("nvcc", path=os.path.join(home, "bin"))
    else:
        path = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if path is None:
        return None
    version, known = (
        subprocess.run([path, option], capture_output=True, text=True, check=True).stdout
        for option in ("--version", "--list-gpu-code")
    )
    found = re.search(r"\bV(\d+\.\d+\.\d+)", version)
    if found is None:
        raise SystemExit(f"{path} --version names no version: {version}")
    return Compiler(path, found[1], frozenset(re.findall(r"\d+", known)))


def demangle(names: list[str]) -> list[str]:
    # Binutils are there wherever a host compiler for nvcc is.
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def compiled(compiler: Compiler, sources: Sources, file: str, arch: str) -> list[Row]:
    """A row for each kernel of a file, by name."""
    with tempfile.TemporaryDirectory(prefix="fastvit-resources-") as folder:
        # The PTX is kept, so that it need not be made once more.
        command = [compiler.path, *FLAGS, f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v", "--keep",
                   f"--keep-dir={folder}", f"-o={folder}/kernels.cubin"]  # fmt: skip
        done = subprocess.run(
            [*command, str(ROOT / "csrc" / file)], capture_output=True, text=True, cwd=folder
        )
        if done.returncode:
            raise SystemExit(f"{file} for sm_{arch} does not compile:\n{done.stderr}")
        ptx = Path(folder, file).with_suffix(".ptx").read_text("utf-8")
    return rows_of(done.stderr, ptx, file, arch, sources)


def rows_of(log: str, ptx: str, file: str, arch: str, sources: Sources) -> list[Row]:
    """A row for each kernel, by name, from what the compiler wrote."""
    taken, launched = report.parse_log(log), report.parse_ptx(ptx)
    if taken.keys() != launched.keys():
        raise SystemExit(f"{file}: ptxas and PTX have other kernels: {taken.keys() ^ launched}")
    mangled = list(taken)
    enums = report.enumerators(sources.text)
    long = dict(zip(mangled, demangle(mangled) if mangled else [], strict=True))
    short = {name: report.short_name(long[name], enums) for name in mangled}
    uses = Counter(short.values())
    remarks = report.parse_remarks(log)
    rows = []
    for name in mangled:
        kernel = short[name] if uses[short[name]] == 1 else long[name]
        row = {"arch": f"sm_{arch}", "kernel": kernel, "file": file}
        row |= launched[name] | taken[name]
        row |= report.occupancy(arch, row)
        # One that names no kernel may be about any of them.
        row["remarks"] = [x for x in remarks if name in x or not any(n in x for n in mangled)]
        row["hash"] = sources.hash
        rows.append(row)
    return sorted(rows, key=lambda row: row["kernel"])


def compile_all(compiler: Compiler, sources: Sources, archs: list[str], jobs: int) -> list[Row]:
    """The rows of all files; a line for each file and architecture to stderr."""
    pairs = [(file, arch) for arch in archs for file in sources.files]

    def one(pair: tuple[str, str]) -> list[Row]:
        rows = compiled(compiler, sources, *pair)
        print(f"sm_{pair[1]} {pair[0]}: {len(rows)} kernels", file=sys.stderr, flush=True)
        return rows

    with ThreadPoolExecutor(jobs) as pool:
        made = [row for rows in pool.map(one, pairs) for row in rows]
    if read_sources().hash != sources.hash:
        raise SystemExit("csrc/ changed during the compilation; run it again")
    return made

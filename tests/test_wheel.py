# SPDX-License-Identifier: Apache-2.0
"""What the installed module asks of the system: little enough that one wheel serves many."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest

from fastvit import _native

pytestmark = pytest.mark.skipif(
    shutil.which("readelf") is None, reason="readelf (of binutils) is not on PATH"
)

# The newest symbols that manylinux_2_28 allows (PEP 600, auditwheel's policy).
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


def readelf(*options: str) -> str:
    command = ["readelf", "--wide", *options, _native.load().__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_no_library_of_torch_cuda_or_openmp_is_needed():
    """Another torch, another CUDA or none at all: the module loads. A second OpenMP beside
    torch's would double its threads.
    """
    needed = re.findall(r"\(NEEDED\).*\[([^\]]+)\]", readelf("--dynamic"))
    assert any(name.startswith("libc.so") for name in needed)
    foreign = re.compile(r"lib(torch|c10|cuda|cudart|nv|cublas|[gi]?omp|python)")
    assert [name for name in needed if foreign.match(name)] == []


def test_no_symbol_is_newer_than_the_wheels_tag_promises():
    """Strict where the module can be that old: a newer machine's compiler asks for its own C++
    library, and the C library gives old functions new versions.
    """
    libraries = readelf("--version-info").partition("Version needs section")[2]
    found = re.findall(r"Name: (GLIBCXX|CXXABI|GLIBC|GCC)_([\d.]+)", libraries)
    assert found
    # No other library with versions, such as one of a compiler's runtime.
    assert len(found) == len(re.findall(r"Name: ", libraries))
    name, version = platform.libc_ver()
    if name == "glibc" and numbers(version) > NEWEST["GLIBC"]:
        found = [(kind, v) for kind, v in found if kind == "GCC"]
    newer = [f"{kind}_{v}" for kind, v in found if numbers(v) > NEWEST[kind]]
    assert newer == []

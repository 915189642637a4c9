# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels for the emulator with the C++ compiler, and imports the module they make."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType

EMULATOR = Path(__file__).resolve().parent
CSRC = EMULATOR.parents[1] / "csrc"

HOST_SOURCES = ("normalization", "patch_embed", "patch_view", "tensor_view", "uint8_fold")
FLAGS = (
    *("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-DFASTVIT_EMULATED"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
)


def build(folder: Path) -> ModuleType:
    """The kernels of csrc/ as the module ``fastvit_emulated``, built in ``folder``."""
    sources = [CSRC / f"{name}.cpp" for name in HOST_SOURCES]
    sources += [*sorted(CSRC.glob("*.cu")), EMULATOR / "bindings.cpp"]
    return build_module("fastvit_emulated", sources, folder)


def build_broken(folder: Path) -> ModuleType:
    """The wrong kernels of ``broken_kernels.cu`` as the module ``broken_kernels``."""
    sources = [EMULATOR / "broken_kernels.cu", EMULATOR / "broken_bindings.cpp"]
    return build_module("broken_kernels", sources, folder)


def build_module(name: str, sources: Sequence[Path], folder: Path) -> ModuleType:
    compiler = _compiler()
    # Two at a time: a file that includes pybind11 takes some 400 MB.
    with ThreadPoolExecutor(2) as pool:
        compile_one = partial(_compile, compiler, folder)
        objects = list(pool.map(compile_one, [*sources, EMULATOR / "emulator.cpp"]))
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run([*compiler, "-shared", *objects, "-o", target])
    spec = importlib.util.spec_from_file_location(name, target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compiler() -> list[str]:
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++"):
        if shutil.which(name):
            return [name]
    raise RuntimeError("no C++ compiler was found; set CXX")


def _compile(compiler: Sequence[str], folder: Path, source: Path) -> Path:
    import pybind11

    includes = [CSRC, EMULATOR, pybind11.get_include(), sysconfig.get_path("include")]
    language = ["-x", "c++", "-include", EMULATOR / "emulated_cuda.h"]
    target = folder / f"{source.name}.o"
    _run(
        [
            *(*compiler, *FLAGS, *(f"-I{path}" for path in includes)),
            *(language if source.suffix == ".cu" else []),
            *("-c", source, "-o", target),
        ]
    )
    return target


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(map(str, command))}\n{done.stdout}")

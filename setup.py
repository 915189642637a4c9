# SPDX-License-Identifier: Apache-2.0
"""Builds ``fastvit._C`` with CMake. The metadata of the package stands in pyproject.toml.

Options are environment variables, which every front end passes on:

FASTVIT_CUDA        ``auto`` (default): CUDA code if an nvcc is found; ``0``: none; ``1``: required.
FASTVIT_CUDA_ARCHS  compute capabilities to compile for, such as ``80;90a`` (default: see
                    CMakeLists.txt); the oldest and newest without a letter are added as PTX.
CUDACXX, CUDA_HOME  which nvcc; otherwise the one on PATH, then /usr/local/cuda.
MAX_JOBS            parallel compilations (default: one a core, and 2 GB of free memory for each).
CMAKE_ARGS          further arguments for CMake, such as ``-DCMAKE_BUILD_TYPE=Debug``.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def fail(message: str):
    # SystemExit, because its text is then the last line that pip shows, without a traceback.
    raise SystemExit(f"fastvit: {message}")


def find_nvcc() -> tuple[str | None, str]:
    """The path of nvcc or None, and in words where it was looked for."""
    if chosen := os.environ.get("CUDACXX"):
        return shutil.which(chosen), f"CUDACXX={chosen} is no program"
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            nvcc = shutil.which("nvcc", path=os.path.join(home, "bin"))
            return nvcc, f"{variable}={home} holds no bin/nvcc"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return nvcc, "there is none on PATH and none in /usr/local/cuda/bin"


def cuda_arguments() -> list[str]:
    """What FASTVIT_CUDA and the machine decide about CUDA, as arguments for CMake."""
    choice = (os.environ.get("FASTVIT_CUDA") or "auto").strip().lower()
    if choice not in ("auto", "0", "1"):
        fail(f"FASTVIT_CUDA: expected auto, 0 or 1, got {choice!r}")
    if choice == "0":
        print("fastvit: CPU code only (FASTVIT_CUDA=0)")
        return ["-DFASTVIT_CUDA=OFF"]
    nvcc, absence = find_nvcc()
    if nvcc is None and choice == "1":
        fail(
            f"FASTVIT_CUDA=1 needs the CUDA compiler nvcc, but {absence}. Install the CUDA "
            "toolkit, or set CUDA_HOME to where it is, or set FASTVIT_CUDA=0 to build without "
            "CUDA code."
        )
    if nvcc is None:
        print(f"fastvit: CPU code only, since no nvcc was found: {absence}")
        return ["-DFASTVIT_CUDA=OFF"]
    archs = ";".join(os.environ.get("FASTVIT_CUDA_ARCHS", "").replace(";", " ").split())
    print(f"fastvit: CPU and CUDA code, with {nvcc}")
    return [
        "-DFASTVIT_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DFASTVIT_CUDA_ARCHS={archs}",
    ]


def parallel_jobs() -> int:
    """As many as there are cores, unless memory is short: a CUDA file can take 2 GB to compile."""
    if jobs := os.environ.get("MAX_JOBS"):
        if not jobs.isdigit() or int(jobs) < 1:
            fail(f"MAX_JOBS: expected a positive integer, got {jobs!r}")
        return int(jobs)
    if not sys.platform.startswith("linux"):
        return os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0))
    memory = re.search(r"^MemAvailable: *(\d+) kB$", Path("/proc/meminfo").read_text(), re.M)
    return max(1, min(cores, int(memory[1]) // (2 * 1024**2))) if memory else cores


def git_commit() -> str:
    """The commit of the sources, with ``-dirty`` if they were changed; empty outside a clone."""
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        # No git, no commit yet, or a clone of another user that git refuses to read.
        return ""
    return done.stdout.strip()


def tool(name: str) -> str:
    """The CMake or ninja that the build requirements installed, otherwise the system's."""
    path = shutil.which(name)
    if path is None:
        fail(
            f"{name} is not on PATH. `pip install .` fetches it by itself; with "
            f"--no-build-isolation, `pip install {name}` first."
        )
    return path


class CMakeBuild(build_ext):
    """Configures, builds and installs the CMake project into the place of the extension."""

    def build_extension(self, ext: Extension) -> None:
        if not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))):
            fail(
                "a C++17 compiler is needed and neither c++, g++ nor clang++ is on PATH. "
                "Install one (Debian, Ubuntu: apt install g++) or set CXX."
            )
        cuda = cuda_arguments()
        jobs = str(parallel_jobs())
        cmake = tool("cmake")
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp, ext.name).resolve()
        configure = [
            cmake,
            # A cache of an earlier build names programs in an isolated environment that is gone.
            "--fresh",
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTVIT_VERSION={self.distribution.get_version()}",
            f"-DFASTVIT_COMMIT={git_commit()}",
            *cuda,
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        self._run(configure)
        self._run([cmake, "--build", str(build), "--parallel", jobs])
        self._run([cmake, "--install", str(build), "--prefix", str(target.parent)])
        if not target.exists():
            fail(f"CMake finished without writing {target}")

    @staticmethod
    def _run(command: list[str]) -> None:
        print(shlex.join(command), flush=True)
        status = subprocess.run(command, check=False).returncode
        if status:
            fail(
                f"`{shlex.join(command[:2])} ...` ended with status {status}; its messages are "
                "above. Where the CUDA compiler is the cause, FASTVIT_CUDA=0 builds without it."
            )


setup(
    packages=[
        *find_packages(include=["fastvit", "fastvit.*"]),
        "fastvit.kernels",
        "fastvit.kernels.ahead",
    ],
    package_dir={"fastvit.kernels": "kernels"},
    ext_modules=[Extension("fastvit._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)

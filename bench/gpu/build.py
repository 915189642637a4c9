# SPDX-License-Identifier: Apache-2.0
"""Stage: build and install the package with its extension into a folder of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

from gpu.device import Device
from gpu.package import Package
from gpu.record import Record

_SHOWN = 4000
_CMAKE = (3, 28)


def run(device: Device, record: Record) -> None:
    """Later stages take what this leaves; without it, the sources without the extension."""
    # cmake and ninja that came as Python packages stand beside the Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    lacking = _lacking(path)
    if lacking and device.note:
        # A dry run has nothing to compile for; the other stages do without the extension.
        record.miss(f"install, without {', '.join(lacking)}")
        return
    package = Package(Path(os.environ["FASTVIT_GPU_FOLDER"]))
    # In a second folder until it is known to import: the first sight of `built` counts.
    target = package.built.with_suffix(".new")
    command = [
        sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index",
        "--disable-pip-version-check", "--no-warn-script-location",
        "--target", str(target), str(package.source),
    ]  # fmt: skip
    environment = {**os.environ, **device.build_environment, "PATH": path}
    seconds, output, status = _timed(command, environment, record.left() + 20)
    record.add(
        name="install",
        seconds=seconds,
        status=status,
        settings=device.build_environment,
        output=output,
    )
    if status:
        print(output)
        # An old setuptools does not read pyproject.toml; CMake alone does not need it.
        seconds, output, status = _cmake(device, package, target, environment, record.left() + 20)
        record.add(name="cmake", seconds=seconds, status=status, output=output)
    if status:
        print(output)
        why = f", for want of {', '.join(lacking)}" if lacking else ""
        record.fail(f"nothing built it{why}; the sources serve, without the extension")
        return
    environment["PYTHONPATH"] = str(target)
    asked = "import fastvit; print(fastvit.info()); assert not fastvit._native.reason()"
    seconds, output, status = _timed([sys.executable, "-c", asked], environment, 60)
    record.add(name="import", seconds=seconds, status=status, info=output)
    if status:
        record.fail("what was built does not load; the sources serve, without the extension")
        shutil.rmtree(target)
        return
    os.replace(target, package.built)


def _cmake(
    device: Device, package: Package, target: Path, env: dict[str, str], limit: float
) -> tuple[float, str, int]:
    """What setup.py has CMake do, into a copy of the package."""
    if importlib.util.find_spec("pybind11") is None:
        return 0.0, "pybind11 is not installed\n", 1
    import pybind11

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(package.plain, target)
    build = package.built.with_suffix(".cmake")
    version = runpy.run_path(str(package.plain / "fastvit" / "_version.py"))["__version__"]
    configure = [
        "cmake", "-S", str(package.source), "-B", str(build), "-G", "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DFASTVIT_VERSION={version}", *device.cmake_options,
    ]  # fmt: skip
    install = ["cmake", "--install", str(build), "--prefix", str(target / "fastvit")]
    start, outputs, status = time.perf_counter(), [], 0
    for command in (configure, ["cmake", "--build", str(build)], install):
        left = limit - (time.perf_counter() - start)
        try:
            _, output, status = _timed(command, env, max(left, 1.0))
        # Without a CMake there is nothing to record but that.
        except OSError as error:
            output, status = f"{error}\n", 1
        outputs.append(output)
        if status:
            break
    return time.perf_counter() - start, "".join(outputs)[-_SHOWN:], status


def _lacking(path: str) -> list[str]:
    """What pyproject.toml's build asks for, of which nothing is fetched, and is not here."""
    found = []
    cmake = shutil.which("cmake", path=path)
    version = _timed([cmake, "--version"], {**os.environ, "PATH": path}, 20)[1] if cmake else ""
    numbers = re.search(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < _CMAKE:
        found.append(f"CMake {'.'.join(map(str, _CMAKE))} or later")
    if shutil.which("ninja", path=path) is None:
        found.append("Ninja")
    if importlib.util.find_spec("pybind11") is None:
        found.append("pybind11")
    return found


def _timed(command: list[str], env: dict[str, str], limit: float) -> tuple[float, str, int]:
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=limit, check=False
        )
        output, status = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired:
        output, status = f"took more than {limit:.0f} s", -1
    return time.perf_counter() - start, output[-_SHOWN:], status

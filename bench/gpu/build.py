# SPDX-License-Identifier: Apache-2.0
"""Stage: build and install the package with its extension into a folder of its own."""

from __future__ import annotations

import os
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


def run(device: Device, record: Record) -> None:
    """Later stages take what this leaves; without it, the sources without the extension."""
    package = Package(Path(os.environ["FASTVIT_GPU_FOLDER"]))
    # In a second folder until it is known to import: the first sight of `built` counts.
    target = package.built.with_suffix(".new")
    command = [
        sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index",
        "--disable-pip-version-check", "--no-warn-script-location",
        "--target", str(target), str(package.source),
    ]  # fmt: skip
    # cmake and ninja that came as Python packages stand beside the Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
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
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(package.plain, target)
        commands = _cmake(device, package, target)
        seconds, output, status = _all_timed(commands, environment, record.left() + 20)
        record.add(name="cmake", seconds=seconds, status=status, output=output)
    if status:
        print(output)
        record.fail("neither pip nor CMake built it; the sources serve, without the extension")
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


def _cmake(device: Device, package: Package, target: Path) -> list[list[str]]:
    """What setup.py has CMake do, into a copy of the package."""
    import pybind11

    build = package.built.with_suffix(".cmake")
    version = runpy.run_path(str(package.plain / "fastvit" / "_version.py"))["__version__"]
    configure = [
        "cmake", "-S", str(package.source), "-B", str(build), "-G", "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DFASTVIT_VERSION={version}", *device.cmake_options,
    ]  # fmt: skip
    install = ["cmake", "--install", str(build), "--prefix", str(target / "fastvit")]
    return [configure, ["cmake", "--build", str(build)], install]


def _all_timed(
    commands: list[list[str]], env: dict[str, str], limit: float
) -> tuple[float, str, int]:
    """One after the other, up to the first that fails."""
    start, outputs, status = time.perf_counter(), [], 0
    for command in commands:
        left = limit - (time.perf_counter() - start)
        _, output, status = _timed(command, env, max(left, 1.0))
        outputs.append(output)
        if status:
            break
    return time.perf_counter() - start, "".join(outputs)[-_SHOWN:], status


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

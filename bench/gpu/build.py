# SPDX-License-Identifier: Apache-2.0
"""Stage: build and install the package with its extension into a folder of its own."""

from __future__ import annotations

import os
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
        record.fail("pip did not build it; the sources serve, without the extension")
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

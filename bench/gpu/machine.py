# SPDX-License-Identifier: Apache-2.0
"""What was measured on, in every file; as a stage, all that can be asked of the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

import torch

from gpu.device import Device
from gpu.record import Record


def describe(device: Device) -> dict[str, Any]:
    """Machine, versions and commit; the commit is that of the checkout when the run began."""
    from fastvit.benchmark.machine import this_machine

    found = this_machine(device.device)
    commit, _, changes = os.environ.get("FASTVIT_GPU_COMMIT", "").partition("+")
    return {
        **found.to_dict(),
        "versions": found.versions,
        "commit": commit or None,
        "dirty": bool(changes),
    }


def run(device: Device, record: Record) -> None:
    import fastvit

    record.add(name="python", value=sys.version)
    record.add(name="torch", value=torch.__config__.show())
    record.add(name="fastvit", value=str(fastvit.info()))
    record.add(name="properties", value=repr(getattr(device, "properties", "none")))
    record.add(name="state", value=device.state())
    query = (
        "name,driver_version,vbios_version,pstate,persistence_mode,compute_mode,mig.mode.current"
    )
    for name, command in {
        "nvidia-smi": ["nvidia-smi", "--format=csv", f"--query-gpu={query}"],
        "nvidia-smi -q": ["nvidia-smi", "-q", "-d", "CLOCK,POWER,TEMPERATURE,PERFORMANCE,MEMORY"],
        "nvcc": [shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", "--version"],
        "processor": ["lscpu"],
    }.items():
        record.add(name=name, value=_output(command))


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout + done.stderr).strip()

# SPDX-License-Identifier: Apache-2.0
"""What the figures were measured on, for the line above every table."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from fastvit._version import __version__

_PACKAGES = ("timm", "torchvision", "triton")


@dataclass(frozen=True)
class Machine:
    """A machine, the software on it, and the commit that was measured."""

    device: str
    cpu: str
    threads: int
    gpu: str | None
    cuda: str | None
    tf32: str | None
    python: str
    platform: str
    versions: dict[str, str]
    commit: str | None
    #: A hash of the sources behind each op; None where there is no checkout.
    fingerprint: dict[str, str] | None = None

    def line(self, dtype: str) -> str:
        """One line: processor, versions, dtype, commit."""
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        processor = self.gpu or f"{self.cpu}, {threads}"
        versions = [f"{name} {version}" for name, version in self.versions.items()]
        if self.cuda and self.gpu:
            versions.append(f"CUDA {self.cuda}")
        numbers = f"{dtype} ({self.tf32})" if self.tf32 else dtype
        commit = f"commit {self.commit}" if self.commit else "no commit"
        return " | ".join([processor, ", ".join(versions), numbers, commit])

    def to_dict(self) -> dict[str, object]:
        """Everything but what has a place of its own in a report."""
        whole = dataclasses.asdict(self)
        return {k: v for k, v in whole.items() if k not in ("versions", "commit", "fingerprint")}

    def origin(self) -> dict[str, object]:
        """What was measured, for a report beside :meth:`to_dict`."""
        known = {"fingerprint": self.fingerprint} if self.fingerprint else {}
        return {"versions": self.versions, "commit": self.commit, **known}


def this_machine(device: torch.device, *, checkout: Path | None = None) -> Machine:
    """Describe this machine.

    Args:
        device: what the models run on.
        checkout: a folder whose git commit is what is measured; None or a folder outside git:
            no commit.
    """
    cuda = device.type == "cuda"
    return Machine(
        device=device.type,
        cpu=_cpu_model(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name(device) if cuda else None,
        cuda=torch.version.cuda if cuda else None,
        tf32=_tf32() if cuda else None,
        python=platform.python_version(),
        platform=" ".join((platform.system(), platform.machine(), *platform.libc_ver())).strip(),
        versions=_versions(),
        commit=_commit(checkout) if checkout else None,
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _versions() -> dict[str, str]:
    # The module knows which CUDA it was built for, the metadata does not.
    found = {"fastvit": __version__, "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _tf32() -> str:
    uses = {
        "matmul": torch.backends.cuda.matmul.allow_tf32,
        "convolution": torch.backends.cudnn.allow_tf32,
    }
    return "tf32 in " + (" and ".join(name for name, on in uses.items() if on) or "nothing")


def _commit(folder: Path) -> str | None:
    """Short hash of the checkout around ``folder``, with "+changes" if files differ from it."""
    hashed = _git(folder, "rev-parse", "--short=12", "HEAD")
    if not hashed:
        return None
    return hashed + ("+changes" if _git(folder, "status", "--porcelain") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

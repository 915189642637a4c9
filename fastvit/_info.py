# SPDX-License-Identifier: Apache-2.0
"""What is installed, what was built, and what runs on this machine: the text of a bug report.

The underscore is there because a submodule ``info`` would, once imported, stand in the place of
the public function ``fastvit.info``.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastvit import _native
from fastvit._version import __version__
from fastvit.ops import trust
from fastvit.ops.backend import availability


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend runs an op on this machine.

    Attributes:
        op: "gpsa", "mhsa", "conv_stem" or "patch_embed".
        backend: its name.
        available: whether it runs the op, called plainly in float32, on this machine.
        reason: why it does not, in words; empty if it does.
        checks: one line a compared tensor after ``info(check=True)``; None if it was not checked.
        agrees: whether every check agreed; None if nothing was checked.
    """

    op: str
    backend: str
    available: bool
    reason: str
    checks: tuple[str, ...] | None = None
    agrees: bool | None = None


@dataclass(frozen=True)
class Info:
    """The findings of :func:`info`. ``str()`` gives the text, :meth:`to_dict` plain data.

    Attributes:
        versions: of fastvit, Python, torch, the CUDA and cuDNN of torch, and Triton; None if
            absent.
        machine: operating system, processor, cores, threads of torch, and the folder of the
            package.
        gpus: that torch sees: name, capability, memory in bytes.
        build: record of the compiled module; None if there is none that loads.
        cuda: whether the compiled CUDA code can run here; None without a compiled module.
        native_problem: why there is no compiled module; None if there is one.
        backends: a row for each op and backend.
        verdicts: what is known of kernels, by specialisation: empty if it agreed with PyTorch
            here or was verified before it was shipped, else what differed; then it is not used.
        tuned: the tables of measured launch configurations ("files"), and which of them the calls
            of this process took ("choices"); None where the kernels are not installed.
    """

    versions: dict[str, str | None]
    machine: dict[str, str | int]
    gpus: tuple[dict[str, Any], ...]
    build: dict[str, Any] | None
    cuda: dict[str, Any] | None
    native_problem: str | None
    backends: tuple[BackendStatus, ...]
    verdicts: dict[str, str]
    tuned: dict[str, Any] | None

    @property
    def ok(self) -> bool:
        """False if a check was made and disagreed."""
        return all(status.agrees is not False for status in self.backends)

    def to_dict(self) -> dict[str, Any]:
        """The findings as dicts, lists, strings and numbers, ready for JSON."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        tables = [*self._backend_table(), *self._verdict_lines(), *self._tuned_lines()]
        tables += self._check_lines()
        return "\n".join([*self._head(), "", *tables])

    def _head(self) -> list[str]:
        v, m = self.versions, self.machine
        rows = [
            ("fastvit", f"{v['fastvit']} in {m['package']}"),
            ("python", f"{v['python']} on {m['os']}"),
            ("torch", f"{v['torch']}, CUDA {v['cuda'] or 'none'}, cuDNN {v['cudnn'] or 'none'}"),
            ("triton", v["triton"] or "not installed"),
            ("cpu", f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['isa']}"),
        ]
        for index, gpu in enumerate(self.gpus):
            memory = f"{gpu['memory'] / 2**30:.0f} GiB"
            rows.append((f"gpu {index}", f"{gpu['name']}, {gpu['capability']}, {memory}"))
        if not self.gpus:
            rows.append(("gpu", "none that torch can use"))
        rows += self._build_rows()
        return [f"{label:<13}{text}" for label, text in rows]

    def _build_rows(self) -> list[tuple[str, str]]:
        if self.build is None or self.cuda is None:
            return [("native", self.native_problem or "")]
        b, c = self.build, self.cuda
        rows = [
            (
                "native",
                f"{b['build_type']} build of {b['version']}, commit {b['commit'] or 'unknown'}, "
                f"{b['compiler']}, cmake {b['cmake']}, pybind11 {b['pybind11']}",
            )
        ]
        if not c["compiled"]:
            return [*rows, ("native cuda", str(c["error"]))]
        code = f"sm {' '.join(b['cuda_archs'])}, PTX {' '.join(b['cuda_ptx']) or 'none'}"
        rows.append(("native cuda", f"{code}, nvcc {b['nvcc']}"))
        if c["error"]:
            rows.append(("", f"cannot run here: {c['error']}"))
        for index, device in enumerate(c["devices"]):
            state = "has code for it" if device["has_kernels"] else f"no: {device['error']}"
            rows.append(("", f"gpu {index} ({device['name']}, {device['capability']}): {state}"))
        return rows

    def _backend_table(self) -> list[str]:
        names = list(dict.fromkeys(status.backend for status in self.backends))
        cells = {(s.op, s.backend): "yes" if s.available else "no" for s in self.backends}
        lines = [f"{'backends':<13}" + "".join(f"{name:<11}" for name in names).rstrip()]
        for op in dict.fromkeys(status.op for status in self.backends):
            row = "".join(f"{cells[op, name]:<11}" for name in names)
            lines.append(f"{op:<13}{row}".rstrip())
        missing = [s for s in self.backends if not s.available]
        if missing:
            lines += ["", "why not"]
        return lines + [f"  {s.op}, {s.backend}: {s.reason}" for s in missing]

    def _verdict_lines(self) -> list[str]:
        if not self.verdicts:
            return []
        failed = {key: verdict for key, verdict in self.verdicts.items() if verdict}
        agreed = len(self.verdicts) - len(failed)
        lines = ["", f"kernels: {agreed} specialisations agree with PyTorch"]
        return lines + [
            f"  {key} failed its check on this machine and is not used: {verdict}"
            for key, verdict in failed.items()
        ]

    def _tuned_lines(self) -> list[str]:
        if self.tuned is None:
            return []
        from fastvit.ops import tuned

        return ["", "launch configurations", *tuned.lines(self.tuned)]

    def _check_lines(self) -> list[str]:
        lines = []
        for s in self.backends:
            for line in s.checks or ():
                lines.append(f"  {s.op}, {s.backend}: {line}")
        return ["", "checks", *lines] if lines else []


def info(check: bool = False) -> Info:
    """Find out what is installed, what was built, and what runs here.

    Args:
        check: also run every backend of every op on small inputs on this machine's best device,
            forward and backward, and compare with the reference by the numbers rule. Takes a few
            seconds, more where kernels must be compiled first.

    Returns:
        The findings; ``print(fastvit.info())`` is what a bug report needs.
    """
    problem = _native.reason()
    native = None if problem else _native.load()
    backends = tuple(
        BackendStatus(row.op, row.backend, row.ok, row.reason) for row in availability()
    )
    if check:
        from fastvit import selfcheck

        backends = tuple(selfcheck.checked(status) for status in backends)
    return Info(
        versions=_versions(),
        machine=_machine(),
        gpus=_gpus(),
        build=native.build_info() if native else None,
        cuda=native.cuda_status() if native else None,
        native_problem=problem,
        backends=backends,
        verdicts=trust.verdicts(),
        tuned=_tuned(),
    )


def _versions() -> dict[str, str | None]:
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "fastvit": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
        "triton": _installed_version("triton"),
    }


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, str | int]:
    return {
        "package": str(Path(__file__).resolve().parent),
        "os": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _tuned() -> dict[str, Any] | None:
    """For the architectures of the GPUs here; without one Hopper's, as the interpreter."""
    try:
        # A clone as current folder has its kernels elsewhere.
        from fastvit.kernels.configs import architecture
    except ModuleNotFoundError:
        return None
    from fastvit.ops import tuned

    capabilities = [torch.cuda.get_device_capability(i) for i in range(len(_gpus()))]
    archs = dict.fromkeys(map(architecture, capabilities or [(9, 0)]))
    return tuned.report([arch for arch in archs if arch is not None])


def _gpus() -> tuple[dict[str, Any], ...]:
    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found.append(
            {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory": p.total_memory}
        )
    return tuple(found)

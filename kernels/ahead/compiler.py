# SPDX-License-Identifier: Apache-2.0
"""What Triton's compiler makes of a kernel's launch, for a device that need not be there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from . import attention, stem, stem_gradient
from .launch import Launch, kernel_object

Case = attention.Case | stem.Case

#: Where every kernel lies in ``kernels``.
KERNELS = attention.KERNELS | stem.KERNELS | stem_gradient.KERNELS

Row = dict[str, Any]


class Pair(NamedTuple):
    """A kernel, a case and an architecture whose choices for the case have the kernel."""

    arch: str
    case: Case
    kernel: str
    #: Of the device, as 103 for 10.3, where it is not the architecture's first.
    capability: int = 0

    @property
    def name(self) -> str:
        return f"{self.arch} | {self.kernel} | {self.case.direction} {self.case.name}"

    @property
    def launch(self) -> Launch:
        return launches(self.arch, self.case)[self.kernel]


class Bound(NamedTuple):
    """A launch as Triton's compiler takes it."""

    target: Any
    options: dict[str, Any]
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]


def launches(arch: str, case: Case) -> dict[str, Launch]:
    """The launches of a case on an architecture, by kernel, in their order."""
    if isinstance(case, stem_gradient.Case):
        return stem_gradient.launches(arch, case)
    if isinstance(case, stem.Case):
        return stem.launches(arch, case)
    return attention.launches(arch, case)


def bind(pair: Pair) -> Bound:
    """What ``JITFunction.run`` does up to the compiler, for a device that need not be there."""
    kernel = kernel_object(pair.kernel, KERNELS[pair.kernel])
    target = GPUTarget("cuda", pair.capability or int(pair.arch.removeprefix("sm_")), 32)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments = pair.launch.arguments
    bound, specialization, options = binder(**arguments)
    options, signature, constants, attributes = kernel._pack_args(
        backend, dict(arguments), bound, specialization, options
    )
    return Bound(target, options.__dict__, signature, constants, attributes)


def compiled(pair: Pair) -> Row:
    """Registers of a thread, stack bytes, spill instructions, shared memory bytes, columns of
    tensor memory and the matrix instruction.
    """
    kernel, bound = kernel_object(pair.kernel, KERNELS[pair.kernel]), bind(pair)
    source = ASTSource(kernel, bound.signature, bound.constants, bound.attributes)
    made = triton.compile(source, target=bound.target, options=bound.options)
    # The tools that Triton brings along.
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(made.asm["cubin"])
        usage, listing = (
            subprocess.run([*command, cubin], capture_output=True, text=True, check=True).stdout
            for command in (
                [tools / "cuobjdump", "--dump-resource-usage"],
                [tools / "nvdisasm", "-c"],
            )
        )
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    found = {
        "wgmma": "wgmma.mma_async" in made.asm["ptx"],
        "tcgen05.mma": "tcgen05.mma" in made.asm["ptx"],
        "mma.sync": re.search(r"(?<!\w)mma\.sync", made.asm["ptx"]) is not None,
    }
    return {
        "registers": used["REG"],
        "stack": used["STACK"],
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", listing)),
        "shared": made.metadata.shared,
        "tensor_columns": getattr(made.metadata, "tmem_size", 0) or 0,
        "instruction": " + ".join(name for name, there in found.items() if there) or "none",
    }


def attempt(pair: Pair) -> tuple[Pair, Row | str]:
    """:func:`compiled`, or the error in words: one broken pair must not hide the others."""
    try:
        return pair, compiled(pair)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return pair, f"{type(cause).__name__}: {cause}".strip().splitlines()[-1]

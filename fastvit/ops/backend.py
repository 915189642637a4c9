# SPDX-License-Identifier: Apache-2.0
"""Which backend runs an op, and in words why another does not."""

from __future__ import annotations

import difflib
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from fastvit import _native

AUTO = "auto"
BACKENDS = ("reference", "torch", "triton", "native")
OPS = ("gpsa", "mhsa", "conv_stem", "patch_embed")

#: What ``auto`` tries, the fastest first.
PREFERENCE = ("native", "triton", "torch", "reference")


#: What the kernels take.
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TRITON_SIDE = 64


class Call(NamedTuple):
    """What the choice of a backend may depend on."""

    op: str
    device: torch.device
    dtype: torch.dtype
    dropout_p: float = 0.0
    #: Channels of a head, and the sides of the grid; None in a question about any call.
    channels: int | None = None
    grid_size: tuple[int, int] | None = None


def nearest(name: str, names: Iterator[str] | tuple[str, ...] | list[str]) -> str:
    """The end of an error message about an unknown name: the nearest names, else all of them."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"


def checked(name: str, what: str = "backend") -> str:
    """``name`` if it is a backend or ``auto``; ``what`` is where it came from.

    Raises:
        ValueError: it is neither; the message has the nearest names.
    """
    if name != AUTO and name not in BACKENDS:
        hint = nearest(str(name), (AUTO, *BACKENDS))
        raise ValueError(f"{what}: unknown name {name!r}; {hint}")
    return name


class _ThreadOverride(threading.local):
    """What :func:`backend` asks for in the thread that entered it."""

    def __init__(self) -> None:
        # In every thread, not in the class: torch.compile guards on what the object itself has.
        self.name: str | None = None


_override = _ThreadOverride()

# Shells spell "unset" as the empty string, too.
_default = checked(os.environ.get("FASTVIT_BACKEND") or AUTO, "FASTVIT_BACKEND")


def set_backend(name: str) -> None:
    """Set the backend of every call of this process that does not name one.

    Inside a ``with fastvit.backend(...)`` block, of the calls of this thread until its end.

    Args:
        name: "auto", "reference", "torch", "triton" or "native". At start it is the environment
            variable ``FASTVIT_BACKEND``, else "auto": the fastest that supports the call.

    Raises:
        ValueError: ``name`` is unknown.
    """
    global _default
    if _override.name is None:
        _default = checked(name)
    else:
        _override.name = checked(name)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend for the duration of a ``with`` block, in this thread.

    A backward pass keeps the backend of its forward.

    Raises:
        ValueError: ``name`` is unknown.
    """
    previous = _override.name
    _override.name = checked(name)
    try:
        yield
    finally:
        _override.name = previous


def requested(name: str | None) -> str:
    """The backend that a call asks for: its argument, else that of the enclosing ``with``, else
    the default of the process.
    """
    if name is not None:
        return checked(name)
    return _default if _override.name is None else _override.name


def refusal(call: Call, name: str) -> str | None:
    """Why backend ``name`` does not run ``call``, or None if it does."""
    if name == "triton":
        return _triton_refusal(call)
    if name == "native":
        return _native_refusal(call)
    if name == "torch" and call.op == "gpsa" and call.dropout_p > 0.0:
        return _dropout_refusal(call)
    return None


def refusal_of_asked(call: Call, name: str | None) -> str | None:
    """:func:`refusal` of the backend that a call asks for, see :func:`requested`; ``auto`` finds
    one.
    """
    asked = requested(name)
    return None if asked == AUTO else refusal(call, asked)


def _dropout_refusal(call: Call) -> str:
    return (
        f"attention dropout ({call.dropout_p}) acts on the mixed map, which the reference backend "
        "forms and the Triton kernels drop weights of while they pass over it"
    )


def _dtype_refusal(call: Call, kernels: str, tensors: str) -> str | None:
    if call.dtype in _KERNEL_DTYPES:
        return None
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _KERNEL_DTYPES)
    got = str(call.dtype).removeprefix("torch.")
    return f"the {kernels} take {names}, and the {tensors} {got}"


def _triton_refusal(call: Call) -> str | None:
    if call.op not in ("gpsa", "mhsa", "conv_stem"):
        return f"this version of fastvit has no Triton kernel for {call.op}"
    if call.op == "mhsa" and call.dropout_p > 0.0:
        return f"dropout ({call.dropout_p}) of plain attention is left to PyTorch's own kernels"
    tensors = "weight is" if call.op == "conv_stem" else "tokens are"
    reason = _dtype_refusal(call, "Triton kernels", tensors)
    if reason is not None:
        return reason
    # Not as membership of a range, which a trace with symbolic sizes cannot ask.
    if call.channels is not None and not (16 <= call.channels <= 128 and call.channels % 8 == 0):
        return (
            "the Triton kernels take heads of 16 to 128 channels in steps of 8, "
            f"and these have {call.channels}"
        )
    if call.grid_size is not None and max(call.grid_size) > _TRITON_SIDE:
        rows, columns = call.grid_size
        return f"the Triton kernels take grids up to 64 x 64, and this one is {rows} x {columns}"
    return _triton_absence(call.device.type, call.device.index)


def _triton_absence(device_type: str, index: int | None) -> str | None:
    """Why this machine runs no Triton kernel on a device."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with PyTorch's builds for NVIDIA GPUs"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cpu" and interpreted:
        return None
    if device_type != "cuda" or torch.version.hip is not None:
        return f"Triton kernels run on NVIDIA GPUs, and the tensors are on {device_type}"
    if interpreted:
        return "TRITON_INTERPRET=1 puts Triton's kernels on the processor"
    if not torch.cuda.is_available():
        return "CUDA is not available in this process"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"the Triton kernels need compute capability 8.0 or later, got {major}.{minor}"
    return None


def _native_refusal(call: Call) -> str | None:
    if call.op != "patch_embed":
        return f"this version of fastvit has no native kernel for {call.op}"
    if call.device.type not in ("cpu", "cuda"):
        return f"the native kernels run on cpu and cuda, and the tensors are on {call.device.type}"
    reason = _dtype_refusal(call, "native kernels", "weight is")
    return _native_absence(call.device.type, call.device.index) if reason is None else reason


def _native_absence(device_type: str, index: int | None) -> str | None:
    """Why the compiled module does not run on a device."""
    if _native.reason() is not None or device_type == "cpu":
        return _native.reason()
    if _native.load().build_info()["nvcc"] is None:
        return (
            "fastvit._C was built without CUDA code: install fastvit again with FASTVIT_CUDA=1 "
            "where there is an nvcc"
        )
    if not torch.cuda.is_available():
        return "CUDA is not available in this process"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"the native kernels need compute capability 8.0 or later, got {major}.{minor}"
    return None


# A trace takes the answer as it is: nothing in it depends on traced tensors. This is what
# torch.compiler.assume_constant_result does, after a second of importing the compiler.
_triton_absence._dynamo_marked_constant = True  # type: ignore[attr-defined]
_native_absence._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(call: Call, name: str) -> str:
    """The backend that runs ``call`` when ``name`` is asked for.

    Raises:
        RuntimeError: ``name`` was asked for and does not run it; the message has the reason.
    """
    if name == AUTO:
        return next(b for b in PREFERENCE if refusal(call, b) is None and not _is_slow(call, b))
    reason = refusal(call, name)
    if reason is not None:
        raise RuntimeError(
            f"backend: {name!r} was asked for, but {reason}; backend='auto' takes one that can"
        )
    return name


#: Answers of :func:`choose_once`.
_chosen: dict[tuple[str, torch.device, torch.dtype, str], str] = {}


def choose_once(op: str, device: torch.device, dtype: torch.dtype, name: str) -> str:
    """:func:`choose` for an op whose backend depends on nothing but device and dtype. What is built
    and which GPUs there are does not change while a process runs, and asking takes microseconds.

    Raises:
        RuntimeError: as there, at every call.
    """
    if torch.compiler.is_compiling():
        return choose(Call(op, device, dtype), name)
    key = (op, device, dtype, name)
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = choose(Call(op, device, dtype), name)
    return found


def _is_slow(call: Call, name: str) -> bool:
    """Whether ``auto`` passes over a backend that could: the interpreter is for tests."""
    return name == "triton" and call.device.type != "cuda"


class Availability(NamedTuple):
    """Whether a backend runs an op on this machine, and if not, why."""

    op: str
    backend: str
    ok: bool
    reason: str


def availability() -> list[Availability]:
    """One row per op and backend, for a plain float32 call on this machine's best device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for op in OPS:
        for name in BACKENDS:
            reason = refusal(Call(op, device, torch.float32), name)
            rows.append(Availability(op, name, reason is None, reason or ""))
    return rows

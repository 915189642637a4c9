# SPDX-License-Identifier: Apache-2.0
"""Lazy access to the compiled module ``fastvit._C``, and in words why it is not there.

Nothing is loaded until somebody asks, so a missing or broken build never stops
``import fastvit``. A missing build, a broken one and one of another version are told apart,
since each has another cure.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from fastvit._version import __version__

_PACKAGE = Path(__file__).resolve().parent


class _Attempt(NamedTuple):
    module: ModuleType | None
    reason: str | None


def load() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it is missing, broken or of another version; the message has the reason
            and the cure.
    """
    attempt = _attempt()
    if attempt.module is None:
        raise RuntimeError(attempt.reason)
    return attempt.module


def reason() -> str | None:
    """Why :func:`load` fails, in one sentence, or None if it does not."""
    return _attempt().reason


@cache
def _attempt() -> _Attempt:
    if not _compiled_here(_PACKAGE):
        return _Attempt(None, _why_missing())
    try:
        module = importlib.import_module("fastvit._C")
    except ImportError as error:
        return _Attempt(
            None,
            f"fastvit._C is built but cannot be loaded ({error}): install fastvit again "
            "on this machine, from its sources if need be",
        )
    built = module.build_info()["version"]
    if built != __version__:
        return _Attempt(
            None,
            f"fastvit._C was built for fastvit {built} but the Python files are those of "
            f"{__version__}: install fastvit again, after an editable install too",
        )
    return _Attempt(module, None)


def _compiled_here(package: Path) -> bool:
    """Whether a folder holds a ``_C`` that this Python could load."""
    return any((package / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES)


def _why_missing() -> str:
    installed = _shadowed_install()
    if installed is not None:
        return (
            f"fastvit was imported from the checkout {_PACKAGE.parent}, which holds no compiled "
            f"fastvit._C and hides the one installed in {installed}: use the `fastvit` command or "
            "another current folder, or build in the checkout with `pip install -e .`"
        )
    others = sorted(path.name for path in _PACKAGE.glob("_C.*.so"))
    if others:
        tag = sys.implementation.cache_tag
        return (
            f"fastvit._C is built for another Python ({', '.join(others)}) than this {tag}: "
            "install fastvit again with this one"
        )
    return (
        f"fastvit._C is not built in {_PACKAGE}: run `pip install .` in the folder of the "
        "sources (`pip install -e .` to work on them); it needs a C++17 compiler"
    )


def _shadowed_install() -> Path | None:
    """The site folder with another, compiled fastvit that this package hides, if there is one."""
    for entry in sys.path:
        package = Path(entry or ".").resolve() / "fastvit"
        if package != _PACKAGE and _compiled_here(package):
            return package.parent
    return None

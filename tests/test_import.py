# SPDX-License-Identifier: Apache-2.0
"""Importing the package is silent and cheap, and every public name is there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fastvit

Run = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a line of Python in an empty folder: the checkout would hide the installed package."""

    def run(code: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    return run


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import fastvit", {"torch", "triton", "timm", "torchvision", "fastvit._C"}),
        (
            "import fastvit; fastvit.GPSA; fastvit.create_model",
            {"timm", "torchvision", "transformers", "matplotlib", "triton", "fastvit._C"},
        ),
    ],
    ids=["package", "layers_and_models"],
)
def test_import_is_silent_and_loads_little(run: Run, statement: str, absent: set[str]) -> None:
    result = run(f"{statement}; import sys; print(*sorted({absent!r} & set(sys.modules)))")
    assert result.returncode == 0, result.stderr
    assert (result.stdout.strip(), result.stderr) == ("", "")


def test_every_public_name_resolves() -> None:
    for name in fastvit.__all__:
        assert getattr(fastvit, name) is not None
    assert set(fastvit.__all__) <= set(dir(fastvit))


def test_importing_a_module_does_not_hide_a_function_of_the_same_name(run: Run) -> None:
    """`fastvit.info` is a function, whatever was imported before."""
    result = run("import fastvit.__main__, fastvit; print(callable(fastvit.info))")
    assert result.stdout.strip() == "True", result.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'gpsa'"):
        _ = fastvit.gpsa

# SPDX-License-Identifier: Apache-2.0
"""The stage of ``make gpu`` that builds the extension, without a compiler."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """The stage, its record, and the commands that it gives; pip ends with the status 1."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("FASTVIT_GPU_FOLDER", str(tmp_path / "run"))
    build, package, record = (importlib.import_module(f"gpu.{n}") for n in _MODULES)
    package.Package(tmp_path / "run").prepare()
    given: list[list[str]] = []
    failing = {"pip"}

    def timed(command, env, limit):
        given.append(command)
        failed = any(name in command for name in failing)
        return 0.5, f"{command[0]}\n", int(failed)

    monkeypatch.setattr(build, "_timed", timed)
    monkeypatch.setattr(build, "_lacking", lambda path: [])
    return build, record.Record(tmp_path, "build", 60.0), given, failing


_MODULES = ("build", "package", "record")


def _processor():
    return importlib.import_module("gpu.processor").Processor()


def test_cmake_serves_where_pip_fails(stage, tmp_path):
    """As under a setuptools that is too old for pyproject.toml."""
    build, record, given, _ = stage
    build.run(_processor(), record)
    assert record.close(), record.data["problems"]
    pip, configure, compiled, installed, imported = given
    assert "pip" in pip
    assert configure[0] == compiled[0] == installed[0] == "cmake"
    version = importlib.import_module("fastvit").__version__
    assert f"-DFASTVIT_VERSION={version}" in configure
    assert installed[-1] == str(tmp_path / "run" / "built.new" / "fastvit")
    assert imported[1] == "-c"
    # What stages import from now on: the sources, beside what CMake installed.
    assert (tmp_path / "run" / "built" / "fastvit" / "kernels" / "configs.py").is_file()


def test_a_build_that_fails_leaves_the_sources(stage, tmp_path):
    build, record, given, failing = stage
    failing.add("--build")
    build.run(_processor(), record)
    assert not record.close()
    assert record.data["problems"] == ["nothing built it; the sources serve, without the extension"]
    # Nothing is installed after a compilation that failed.
    assert [command[1] for command in given] == ["-m", "-S", "--build"]
    assert not (tmp_path / "run" / "built").exists()

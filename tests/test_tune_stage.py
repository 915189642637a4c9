# SPDX-License-Identifier: Apache-2.0
"""The stage of ``make gpu`` that searches launch configurations, without a GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import tuned as tables

from fastvit.ops.tuned import triton_version

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"

pytestmark = pytest.mark.skipif(
    not (BENCH / "gpu" / "tune.py").exists(), reason="bench/ is not beside tests/"
)

MEASURED = {"gpu": "a GPU", "date": "2026-01-02", "fastvit": "0.1.0"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``gpu(name)``: a module of the run."""
    monkeypatch.syspath_prepend(str(BENCH))

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"gpu.{name}")

    return load


def test_a_dry_run_searches_and_writes_a_table(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(BENCH / "gpu"), "--dry", "--out", str(out), "--stage", "tune"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    stage = json.loads((out / "tuned_search.json").read_text("utf-8"))["tune"]
    assert stage["status"] == "ok"
    assert stage["missed"] == []
    assert [case["problem"].split()[0] for case in stage["cases"]] == ["gpsa", "stem_first"]
    for case in stage["cases"]:
        assert case["built_in"]["q20"] <= case["built_in"]["median"] <= case["built_in"]["q80"]
        # A candidate was compiled in another process, agreed and was timed, or was discarded.
        assert case["counts"]["measured"] + case["counts"]["spilled"] >= 2
        assert case["refused"] == []
    found = tables.read(out / "tuned.json", "sm_90", triton_version())
    assert len(found.entries) == 2
    assert found.measured["gpu"] == "none"


def test_a_run_on_a_gpu_searches_only_if_asked(gpu: Any, tmp_path: Path) -> None:
    driver = gpu("driver")

    def stages(names: list[str] | None, *, dry: bool) -> list[str]:
        return [s.name for s in driver.Run(tmp_path, names, dry=dry, budget=1.0).stages]

    assert "tune" not in stages(None, dry=False)
    assert stages(None, dry=True)[-1] == "tune"
    assert stages(["tune"], dry=False) == ["tune"]


def test_tables_of_several_cards_are_merged(gpu: Any, tmp_path: Path) -> None:
    runs = [("sm_90", "3.9", 1), ("sm_80", "3.9", 2), ("sm_90", "3.6", 3), ("sm_90", "3.9", 4)]
    folders = []
    for arch, version, images in runs:
        problem = tables.Attention("mhsa", "forward", "half", images, 1, 17, 16, None)
        entry = tables.plain(problem, (), {})
        folders.append(tmp_path / str(images))
        tables.write(
            folders[-1] / "tuned.json", tables.merged({}, arch, version, MEASURED, [entry])
        )
    found = gpu("tune").merged(folders)
    numbers = {
        (arch, version): [entry["images"] for entry in part["entries"]]
        for arch, versions in found.items()
        for version, part in versions.items()
    }
    assert numbers == {("sm_90", "3.9"): [4], ("sm_80", "3.9"): [2], ("sm_90", "3.6"): [3]}


def test_a_spilling_entry_of_the_package_fails_the_check(tmp_path: Path) -> None:
    """``bench/resources.py --check`` compiles what the shipped table has."""
    problem = tables.Attention("mhsa", "forward", "half", 256, 9, 197, 48, None)
    config = tables.Config(rows=128, keys=(256,), channels=(64,), warps=1)
    entry = tables.plain(problem, (("forward_tile", config),), {})
    table = tables.merged({}, "sm_90", triton_version(), MEASURED, [entry])
    tables.write(tmp_path / "tuned.json", table)
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCH / "resources.py"), "--check", "--arch=sm_90"]
    done = subprocess.run(
        [*command, "--kernel=forward_tile", f"--tuned={tmp_path / 'tuned.json'}"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    if "there is no table for Triton" in done.stderr:
        pytest.skip("no table of resources for this Triton")
    assert done.returncode == 1
    assert "tuned.json: sm_90 | forward_tile | forward bfloat16 B256 H9 N197 d48: spills" in (
        done.stderr
    )

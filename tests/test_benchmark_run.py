# SPDX-License-Identifier: Apache-2.0
"""``pytest bench/`` as a user runs it, on three rows of tiny models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastvit.benchmark.result import minutes_per_epoch

TESTS = Path(__file__).parent
BENCH = TESTS.parent / "bench"
SLEEP = 0.1  # of the plugin's fault "slow"


def run(
    cwd: Path, *arguments: str, suite: str = "test_epoch.py"
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    # -P and another folder: a checkout as current folder would shadow an installed package.
    command = [sys.executable, "-P", "-m", "pytest", "-p", "benchmark_tiny_rows"]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", str(BENCH / suite), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def table_line(output: str, name: str) -> list[str] | None:
    """Cells of the row in the first table printed, or None."""
    table = output.partition("minutes per ImageNet epoch")[2]
    found = re.search(rf"^{re.escape(name)} .*$", table, re.MULTILINE)
    return re.split(r" {2,}", found.group()) if found else None


def report(folder: Path) -> dict:
    return json.loads((folder / "epoch.json").read_text("utf-8"))


def test_a_removed_row_and_a_slowed_row_show(tmp_path):
    plain = run(tmp_path, "--benchmark", "--report", "plain", "--benchmark-json", "raw.json")
    changed = run(
        tmp_path, "--benchmark", "--report", "changed", "--fault", "remove", "--fault", "slow"
    )
    assert (plain.returncode, changed.returncode) == (0, 0), plain.stdout + changed.stdout

    before = report(tmp_path / "plain")["rows"]
    after = report(tmp_path / "changed")["rows"]
    assert [row["name"] for row in before] == ["ConViT-S", "ViT_P-1GF", "ResNet-50"]
    assert [row["name"] for row in after] == ["ConViT-S", "ResNet-50"]
    assert table_line(plain.stdout, "ViT_P-1GF") is not None
    assert table_line(changed.stdout, "ViT_P-1GF") is None

    slowed = after[0]
    floor = minutes_per_epoch(SLEEP, 0.0, batch=slowed["batch"], batch_per_gpu=128)
    assert slowed["minutes_fastvit"] >= floor
    assert slowed["speedup"] < 0.5 * before[0]["speedup"]
    assert slowed["inference_speedup"] < 0.5 * before[0]["inference_speedup"]
    assert table_line(changed.stdout, "ConViT-S")[-2] == f"{slowed['speedup']:.2f}x"

    # A convolutional network has no fastvit model to compare.
    network = before[2]
    assert network["minutes_reference"] > 0
    assert network["minutes_fastvit"] is network["speedup"] is network["max_error"] is None
    assert table_line(plain.stdout, "ResNet-50")[-3:] == ["–", "–", str(network["steps"])]

    # Progress, and nothing lost on the way into pytest-benchmark's own file.
    assert re.search(r"\[ 1/3\] ConViT-S … .* min, \d+\.\d\dx \(\d+ s\)", plain.stdout)
    raw = json.loads((tmp_path / "raw.json").read_text("utf-8"))["benchmarks"]
    assert [entry["extra_info"] for entry in raw] == before
    assert [entry["stats"]["rounds"] for entry in raw] == [row["steps"] for row in before]


def test_rows_that_disagree_or_raise_fail_the_run_and_are_not_timed(tmp_path):
    faults = ["--fault", "disagree", "--fault", "raise"]
    done = run(tmp_path, "--benchmark", "--report", "out", *faults)
    assert done.returncode == 1
    failed, broken, passed = report(tmp_path / "out")["rows"]
    statuses = [row["status"] for row in (failed, broken, passed)]
    assert statuses == ["failed", "error", "ok"]
    for row in (failed, broken):
        assert row["samples_reference"] == row["samples_fastvit"] == []
        assert row["minutes_fastvit"] is row["speedup"] is None
    assert failed["max_error"] == pytest.approx(1e-3, rel=0.1)
    assert table_line(done.stdout, "ConViT-S")[-4:] == ["–", "failed", "–", "–"]
    why = r"- ConViT-S: failed: output in eval\(\) DISAGREES: error \d\.\d+e-\d+, limit \d"
    assert re.search(why, done.stdout)
    assert broken["reason"] == "RuntimeError: no such luck"
    assert "Traceback" in done.stdout


def test_an_interrupt_keeps_what_was_measured(tmp_path):
    done = run(tmp_path, "--benchmark", "--report", "out", "--fault", "interrupt")
    assert done.returncode == pytest.ExitCode.INTERRUPTED
    content = report(tmp_path / "out")
    assert [row["name"] for row in content["rows"]] == ["ConViT-S"]
    assert content["interrupted"] is True
    assert table_line(done.stdout, "ConViT-S")[-2].endswith("x")
    assert "The run was interrupted" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "epoch.json",
        "epoch.md",
        "epoch.svg",
        "epoch-dark.svg",
    }


def test_options_narrow_and_deepen(tmp_path):
    arguments = ["--rows", "vit_p*", "--batch", "3", "--steps", "5", "--dtype", "bfloat16"]
    done = run(tmp_path, "--benchmark", "--full", "--report", "out", *arguments)
    assert done.returncode == 0, done.stdout
    (row,) = report(tmp_path / "out")["rows"]
    assert (row["name"], row["batch"], row["dtype"]) == ("ViT_P-1GF", 3, "bfloat16")
    assert row["steps"] == len(row["samples_fastvit"]) == len(row["inference_fastvit"]) == 5
    assert "err IN-21k" in done.stdout


def test_without_benchmark_rows_run_once_and_nothing_is_reported(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "Smoke test: 3 of 3 rows ran once." in done.stdout
    assert "agrees, largest error" in done.stdout
    assert "library min" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "ConVit-Q"], "no row is called 'ConVit-Q'; the nearest names are ConViT-S"),
        (["--steps", "0"], "expected a positive whole number, got '0'"),
        (["--report", "out"], "--report needs --benchmark"),
    ],
    ids=["unknown-row", "no-steps", "report-of-smoke-test"],
)
def test_bad_options_are_refused(tmp_path, arguments, message):
    done = run(tmp_path, *arguments)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in done.stderr


def test_contests_of_layers(tmp_path):
    names = "patch embedding 768 float32,patch embedding 768 uint8 float32"
    chosen = ("--modules", names, "--batch", "1")
    done = run(tmp_path, "--benchmark", *chosen, "--report", "out", suite="test_modules.py")
    assert done.returncode == 0, done.stdout
    progress = r"\[ 2/2\] patch embedding 768 uint8 float32 batch 1 … \d+\.\d\dx"
    assert re.search(progress, done.stdout)
    assert "layers and models against their peers" in done.stdout
    content = json.loads((tmp_path / "out" / "modules.json").read_text("utf-8"))
    contests = content["contests"]
    # Results of other sources can then be told.
    assert content["fingerprint"].keys() == {"gpsa", "conv_stem", "patch_embed"}
    assert [c["agrees"] for c in contests] == [True, True]
    assert {len(s) for c in contests for s in c["seconds"].values()} == {12}
    table = (tmp_path / "out" / "modules.md").read_text("utf-8")
    assert "| patch embedding 768 uint8 | float32 | 1 |" in table


def test_an_unknown_contest_is_named(tmp_path):
    done = run(tmp_path, "--modules", "GPSA S backwards", suite="test_modules.py")
    assert "--modules: no contest matches 'GPSA S backwards'" in done.stderr


def test_rows_alone_leave_the_contests_out(tmp_path):
    done = run(tmp_path, "--rows", "ConViT-S", suite="test_modules.py")
    assert "1 skipped" in done.stdout

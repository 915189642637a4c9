# SPDX-License-Identifier: Apache-2.0
"""``fastvit bench`` as a user types it, on tiny models and small layers."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys

import benchmark_tiny_rows as tiny
import pytest

from fastvit import __main__, _native
from fastvit.benchmark import contests, modules, rows, weights


@pytest.fixture
def tiny_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuple(tiny._shrunk(name) for name in ("ConViT-S", "ResNet-50"))
    monkeypatch.setattr(rows, "load_rows", lambda: found)
    monkeypatch.setattr(weights, "build_library", tiny._library)
    monkeypatch.setattr(weights, "build_fastvit", lambda row: tiny._fastvit(row, []))


@pytest.fixture
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "_ROUNDS", 3)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["bench", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_rows_are_measured_printed_and_written(tiny_rows, tmp_path, capsys):
    out = tmp_path / "out"
    status = __main__.main(["bench", "--rows", "*", "--steps", "3", "--report", str(out)])
    told = capsys.readouterr()
    assert status == 0, told.err
    assert "fastvit: minutes per ImageNet epoch" in told.out
    assert re.search(r"^ConViT-S .*x +3$", told.out, re.MULTILINE)
    assert re.search(r"\[ 1/2\] ConViT-S … .* min, \d+\.\d\dx \(\d+ s\)", told.err)
    assert "layers and models" not in told.out
    content = json.loads((out / "epoch.json").read_text("utf-8"))
    assert [row["status"] for row in content["rows"]] == ["ok", "ok"]
    # The commit is that of the package, not of the folder that one happens to stand in.
    assert content["commit"] == (_native.load().build_info()["commit"] or None)
    written = {path.name for path in out.iterdir()}
    assert written == {"epoch.json", "epoch.md", "epoch.svg", "epoch-dark.svg"}
    # What was written is what --compare reads; with itself it is refused.
    assert "one is a copy of the other" in refused(capsys, "--compare", str(out), str(out))


def test_contests_are_measured_printed_and_written(few_rounds, tmp_path, capsys):
    """--modules alone leaves the rows out."""
    out = tmp_path / "out"
    chosen = ["--modules", "patch embedding 768 float32", "--batch", "1"]
    assert __main__.main(["bench", *chosen, "--report", str(out)]) == 0
    told = capsys.readouterr()
    assert "fastvit: layers and models against their peers" in told.out
    assert f"written to {out}: modules.json, .md" in told.out
    assert re.search(r"\[ 1/1\] patch embedding 768 float32 batch 1 … \d+\.\d\dx", told.err)
    assert {path.name for path in out.iterdir()} == {"modules.json", "modules.md"}


def test_a_contest_that_cannot_run_costs_no_other(few_rounds, monkeypatch, capsys):
    broken = contests.select(contests.entries(batch=1), ["patch embedding 768 float32"])[0]
    whole = contests.select(contests.entries(batch=1), ["patch embedding 768 uint8 float32"])[0]

    def build(dtype, batch):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(
        contests,
        "entries",
        lambda batch=8: [contests.Entry(broken.name, broken.dtype, 1, build), whole],
    )
    assert __main__.main(["bench", "--modules", "patch*"]) == 1
    told = capsys.readouterr()
    assert "RuntimeError: no compiler" in told.err
    assert "patch embedding 768 uint8" in told.out


def test_an_interrupt_keeps_what_was_measured(tiny_rows, tmp_path, monkeypatch, capsys):
    def build(row):
        if row.name == "ResNet-50":
            raise KeyboardInterrupt
        return tiny._library(row)

    monkeypatch.setattr(weights, "build_library", build)
    arguments = ["--rows", "*", "--steps", "1", "--report", str(tmp_path)]
    assert __main__.main(["bench", *arguments]) == 130
    content = json.loads((tmp_path / "epoch.json").read_text("utf-8"))
    assert content["interrupted"] is True
    assert [row["name"] for row in content["rows"]] == ["ConViT-S"]
    assert "The run was interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows", "ConVit-Q"], "--rows: no row is called 'ConVit-Q'; the nearest names are Con"),
        (
            ["--modules", "GPSA S backwards"],
            "--modules: no contest matches 'GPSA S backwards'; the nearest names are 'GPSA S forw",
        ),
        (["--steps", "0"], "expected a positive whole number, got '0'"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
        (["--compare", "x"], "expected 2 arguments"),
    ],
)
def test_wrong_arguments_are_said(capsys, arguments, words):
    assert words in refused(capsys, *arguments)


@pytest.mark.parametrize("missing", ["timm", "torchvision", "matplotlib"])
def test_missing_extras_are_said_with_the_cure(monkeypatch, capsys, tmp_path, missing):
    find = importlib.util.find_spec

    def without(name, *args):
        return None if name == missing else find(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    said = refused(capsys, "--rows", "ConViT-S", "--report", str(tmp_path))
    assert missing in said
    assert "pip install 'fastvit[bench]'" in said


def test_help_has_examples_and_needs_no_torch():
    code = (
        "import sys\nfrom fastvit.__main__ import main\n"
        "try:\n    main(['bench', '--help'])\nfinally:\n"
        "    print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr.strip().endswith("False")
    assert "fastvit bench --compare before after" in done.stdout
    for flag in ("--rows", "--modules", "--batch", "--dtype", "--steps", "--report", "--force"):
        assert flag in done.stdout


def test_an_unknown_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["bnech"])
    assert "did you mean bench?" in capsys.readouterr().err

# SPDX-License-Identifier: Apache-2.0
"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import subprocess

import documents
import pytest

import fastvit

README = documents.ROOT / "README.md"


def test_python_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    with fastvit.backend("auto"):
        namespace = documents.run(README)
    difference = float(re.findall(r"tensor\(([-+\d.e]+)\)", capsys.readouterr().out)[0])
    assert difference < 1e-5
    assert namespace["report"].max_error < 1e-5
    assert not namespace["report"].skipped


def test_there_are_examples() -> None:
    assert len(documents.examples(README)) == 2


def test_commands_are_verbs_of_the_makefile() -> None:
    commands = re.findall(r"^make (\w+)", documents.text_of(README), flags=re.MULTILINE)
    assert {"bench", "test"} <= set(commands)
    for verb in commands:
        subprocess.run(["make", "-n", verb], cwd=documents.ROOT, check=True, capture_output=True)

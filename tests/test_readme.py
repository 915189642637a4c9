# SPDX-License-Identifier: Apache-2.0
"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_python_examples_run(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {})
    difference = float(re.findall(r"tensor\(([-+\d.e]+)\)", capsys.readouterr().out)[0])
    assert difference < 1e-5


def test_there_is_an_example() -> None:
    assert EXAMPLES


def test_commands_are_verbs_of_the_makefile() -> None:
    commands = re.findall(r"^make (\w+)", README, flags=re.MULTILINE)
    assert {"bench", "test"} <= set(commands)
    for verb in commands:
        subprocess.run(["make", "-n", verb], cwd=ROOT, check=True, capture_output=True)

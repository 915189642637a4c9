# SPDX-License-Identifier: Apache-2.0
"""``bench/counts.py``: operators, launches and bytes of a call, against the table and by hand."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvit

BENCH = Path(__file__).resolve().parents[1] / "bench"
TABLE = BENCH / "results" / "counts.json"
VERSION = ".".join(torch.__version__.split(".")[:2])

pytestmark = pytest.mark.skipif(
    not (BENCH / "counts.py").exists(), reason="bench/ is not beside tests/"
)


def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCH / "counts.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCH)
    import count_operators

    return count_operators


def test_what_is_counted_here_is_the_table():
    """On any processor, with any number of threads."""
    done = tool("--check")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    newest = max(map(number, json.loads(TABLE.read_text("utf-8"))["composed"]))
    told = "are not judged" if number(VERSION) > newest else "as in the table"
    assert told in done.stdout


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_a_difference_is_named(tmp_path):
    """A byte count, a call of an operator and a launch that are other than the table has them."""
    table = json.loads(TABLE.read_text("utf-8"))
    for rows in table["composed"].values():
        row = next(r for r in rows if r["case"].startswith("patch_embed uint8"))
        row["written"] -= 4
        row["operators"] += 1
        row["by_operator"]["aten.bmm.default"] = [9, 1]
    # So that this version is judged whatever it is.
    table["composed"]["99.0"] = table["composed"][max(table["composed"], key=number)]
    launched = table["launches"][0]
    launched["launches"] -= 1
    launched["by_kernel"].popitem()
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(table), "utf-8")
    done = tool("--check", f"--table={path}")
    assert done.returncode == 1
    name = f"{row['case']} {row['direction']}"
    written, count = row["written"], row["operators"]
    assert f"{name}: written grew from {written:,} to {written + 4:,}" in done.stderr
    assert f"{name}: operators shrank from {count} to {count - 1}" in done.stderr
    assert f"{name}: aten.bmm.default: expected [9, 1], but came " in done.stderr
    if importlib.util.find_spec("triton") is not None:
        name = f"{launched['arch']} {launched['case']} {launched['direction']}"
        count = launched["launches"]
        assert f"{name}: launches grew from {count} to {count + 1}" in done.stderr
    assert "python bench/counts.py --write" in done.stderr


def test_a_newer_pytorch_is_told_and_not_judged(tmp_path):
    table = json.loads(TABLE.read_text("utf-8"))
    rows = table["composed"][max(table["composed"], key=number)]
    rows[0]["written"] -= 4
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({**table, "composed": {"2.0": rows}}), "utf-8")
    done = tool("--check", f"--table={path}")
    assert done.returncode == 0
    assert "1 differences from 2.0 are not judged" in done.stdout
    assert "written grew" in done.stderr


def test_the_oldest_and_the_newest_pytorch_count_the_same():
    """Else a version between them could not be held against the last before it."""
    parts = json.loads(TABLE.read_text("utf-8"))["composed"]
    assert {"2.11", "2.15"} <= parts.keys()
    assert all(rows == parts["2.11"] for rows in parts.values())


def test_every_op_is_counted_in_both_directions():
    rows = json.loads(TABLE.read_text("utf-8"))["composed"]["2.15"]
    counted = {(row["case"].split()[0], row["direction"]) for row in rows}
    ops = ("gpsa", "mhsa", "conv_stem", "patch_embed")
    assert counted == {(op, d) for op in ops for d in ("forward", "forward+backward")}
    names = " ".join(row["case"] for row in rows)
    for word in ("eval", "training", "uint8", "float32", "bfloat16"):
        assert word in names


def test_counts_by_hand(operators):
    """A product, a view of it, an addition in place, and one whose result is given."""
    a, b = torch.ones(4, 8), torch.ones(8, 2)
    out = torch.empty(2, 4)
    with operators.Counter() as counter:
        c = a @ b
        c.add_(1.0)
        torch.add(c.t(), 1.0, out=out)
    assert (counter.operators, counter.views) == (4, 1)
    # The product is new; it is written twice, and out once.
    assert counter.allocated == 4 * 4 * 2
    assert counter.written == 3 * 4 * 4 * 2
    assert counter.by_operator == {
        "aten.mm.default": [1, 32],
        "aten.add_.Tensor": [1, 32],
        "aten.add.out": [1, 32],
    }


def test_ops_of_the_package_are_opened(operators):
    """One that is opaque to the dispatcher counts as what it consists of."""
    qkv = [torch.zeros(1, 2, 16, 8).bfloat16() for _ in range(3)]
    found = operators.counted(lambda *x: fastvit.functional.attention(*x, backend="torch"), qkv, ())
    assert set(found) == {"forward"}
    assert found["forward"].by_operator["aten.baddbmm.out"][0] == 2
    assert not any(name.startswith("fastvit") for name in found["forward"].by_operator)


def test_a_copy_more_is_counted(operators, monkeypatch):
    """Of our own code: a clone of every result of the op."""
    from fastvit.ops import mhsa_torch

    qkv = [torch.zeros(1, 2, 16, 8).bfloat16() for _ in range(3)]

    def written() -> int:
        call = lambda *x: fastvit.functional.attention(*x, backend="torch")  # noqa: E731
        return operators.counted(call, qkv, ())["forward"].written

    honest = written()
    forward = mhsa_torch.forward
    monkeypatch.setattr(mhsa_torch, "forward", lambda *args: forward(*args).clone())
    assert written() == honest + 2 * 2 * 16 * 8


def test_what_is_pinned_is_given_back(operators, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    onednn = torch._C._get_mkldnn_enabled()
    with operators.pinned():
        assert torch.get_num_threads() == operators.THREADS
        assert not torch._C._get_mkldnn_enabled()
    assert torch.get_num_threads() == 7
    assert torch._C._get_mkldnn_enabled() == onednn

# SPDX-License-Identifier: Apache-2.0
"""``make gpu`` where there is no GPU: the same code on tiny shapes, and the floors by hand."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
DRY = "dry run on a processor: not a measurement"


def dry(out: Path, *stages: str, **environment: str) -> subprocess.CompletedProcess[str]:
    chosen = [argument for stage in stages for argument in ("--stage", stage)]
    return subprocess.run(
        [sys.executable, str(BENCH / "gpu"), "--dry", "--out", str(out), *chosen],
        cwd=out.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def results(out: Path) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for file in out.glob("*.json"):
        found.update(json.loads(file.read_text("utf-8")))
    return found


def test_a_dry_run_leaves_files_and_tables(tmp_path):
    out = tmp_path / "out"
    done = dry(out, "machine", "agreement", "ceilings", "kernels")
    assert done.returncode == 0, done.stdout + done.stderr
    files = {file.name for file in out.iterdir() if file.suffix != ".svg"}
    assert {"machine.json", "checks.json", "kernels.json", "verified.json", "summary.md"} <= files
    assert len(files) <= 8
    assert all(file.is_file() for file in out.iterdir())
    found = results(out)
    for stage in ("machine", "agreement", "ceilings", "kernels"):
        assert found[stage]["status"] == "ok"
        assert found[stage]["cases"]
        assert {"commit", "dirty", "versions"} <= found[stage]["machine"].keys()
    core = next(case for case in found["kernels"]["cases"] if case["what"] == "core")
    ours = core["contenders"]["fastvit"]
    assert ours["q20"] <= ours["median"] <= ours["q80"]
    assert 0 < ours["share"] <= 1
    summary = (out / "summary.md").read_text("utf-8")
    titles = [part for part in summary.split("\n## ")[1:] if "\n|" in part]
    assert len(titles) == 4, summary
    assert all(DRY in part for part in titles)


def test_patches_are_compared_and_timed(tmp_path):
    out = tmp_path / "out"
    done = dry(out, "ceilings", "patch_embed")
    assert done.returncode == 0, done.stdout + done.stderr
    stage = results(out)["patch_embed"]
    assert stage["status"] == "ok"
    compared = [case for case in stage["cases"] if case["what"] == "agreement"]
    assert {case["layout"] for case in compared} == {"planar", "cropped"}
    tensors = {tensor["name"] for case in compared for tensor in case["tensors"]}
    assert tensors == {"output", "images", "weight", "bias", "pos_embed", "cls_token"}
    assert all(case["ok"] for case in compared)
    timed = {
        (case["what"], case["pixels"], case["mode"]): case["contenders"]
        for case in stage["cases"]
        if case["what"] != "agreement"
    }
    assert len(timed) == 8
    assert all("median" in times for found in timed.values() for times in found.values())
    assert 0 < timed["eager", "uint8", "forward"]["fastvit"]["share"] <= 1
    assert {"timm", "linear", "conv alone"} < timed["eager", "float", "forward+backward"].keys()
    assert {"linear compiled", "timm compiled"} < timed["compiled", "uint8", "forward"].keys()
    summary = (out / "summary.md").read_text("utf-8")
    assert "\n## Patch embedding with class token and positions\n" in summary


def test_stems_are_compared_and_timed(tmp_path):
    out = tmp_path / "out"
    done = dry(out, "ceilings", "stem")
    assert done.returncode == 0, done.stdout + done.stderr
    stage = results(out)["stem"]
    assert stage["status"] == "ok"
    compared = [case for case in stage["cases"] if case["what"] == "agreement"]
    assert all(case["ok"] for case in compared)
    tensors = {tensor["name"] for case in compared for tensor in case["tensors"]}
    assert {"output", "images", "0.conv.weight", "1.bn.running_var", "2.conv.bias"} <= tensors
    timed = {
        (case["what"], case["mode"]): case["contenders"]
        for case in stage["cases"]
        if case["what"] != "agreement"
    }
    assert {what for what, _ in timed} == {"eager", "compiled", "max-autotune-no-cudagraphs"}
    assert all("median" in times for found in timed.values() for times in found.values())
    assert 0 < timed["eager", "forward"]["fastvit"]["share"] <= 1
    assert "\n## Convolutional stem\n" in (out / "summary.md").read_text("utf-8")


def test_choices_are_timed_and_make_a_table(tmp_path, monkeypatch):
    """A table that the package reads, of the keys that it asks for."""
    out = tmp_path / "out"
    done = dry(out, "stem_choices")
    assert done.returncode == 0, done.stdout + done.stderr
    stage = results(out)["stem_choices"]
    calls = {case["call"]: case["contenders"] for case in stage["cases"]}
    assert len(calls) == 9
    layer = "train 8-16 s2 2^3"
    assert calls["half train 3-8-16-16 s2-2 2^7"].keys() == {"kernels", "torch", f"half {layer}"}
    assert all("median" in times for found in calls.values() for times in found.values())

    pytest.importorskip("triton", reason="Triton is not installed")
    from fastvit.ops import stem_choices

    monkeypatch.setattr(stem_choices, "_FILE", out / "stem_choices.json")
    arch = stage["cases"][0]["arch"]
    stem_choices.choices(arch)
    monkeypatch.syspath_prepend(str(BENCH))
    choices = importlib.import_module("gpu.stem_choices")
    slow, fast = {"q20": 2.0, "q80": 3.0}, {"q20": 1.0, "q80": 1.5}
    case = {"arch": arch, "call": "ieee train 3-8-16-16 s2-2 2^7"}
    case["contenders"] = {"kernels": slow, "torch": slow, f"ieee {layer}": fast}
    other = {**case, "contenders": {"kernels": slow, "torch": fast}}
    entry = choices.table({**stage, "cases": [case]})[arch]
    assert (entry["cudnn"], entry["torch"]) == ([f"ieee {layer}"], [])
    both = choices.table({**stage, "cases": [other, case]})[arch]
    assert (both["cudnn"], both["torch"]) == ([f"ieee {layer}"], [])
    assert choices.merged([out]).keys() == {arch}


def test_a_stage_that_dies_costs_no_other(tmp_path):
    out = tmp_path / "out"
    done = dry(out, "machine", "ceilings", FASTVIT_GPU_FAIL="machine")
    assert done.returncode == 1, done.stdout + done.stderr
    found = results(out)
    assert found["machine"]["status"] == "died"
    assert found["machine"]["problems"] == ["died with status 7: told to die"]
    assert found["ceilings"]["status"] == "ok"
    lines = (out / "summary.md").read_text("utf-8").splitlines()
    assert any(line.startswith("| machine | died |") for line in lines)
    assert any(line.startswith("| ceilings | ok |") for line in lines)


@pytest.fixture
def floors(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu.floors")


class TestFloors:
    def test_core(self, floors):
        """ConViT-S, 256 images, bfloat16: 4 tensors of 256 x 196 x 432 elements."""
        assert floors.core(256, 196, 9, 48, 2, backward=False) == (173_408_256, 16_994_009_088)
        assert floors.core(256, 196, 9, 48, 2, backward=True) == (476_872_704, 59_479_031_808)

    def test_module(self, floors):
        """One token, one channel: 4 products of 2 FLOPs, and one attention."""
        assert floors.module(1, 1, 1, 1, 4, backward=False) == (4 * (2 + 4), 8 + 4)
        assert floors.module(1, 1, 1, 1, 4, backward=True) == (4 * (4 + 12), 24 + 14)

    def test_patch_embed(self, floors):
        """Two images of three patches of four bytes, to five channels of two bytes."""
        bare = 2 * 3 * 4 + 2 * (2 * 3 * 5 + 5 * 4 + 5)
        # A class token for each image; four positions and the class token itself.
        whole = bare + 2 * (2 * 5 + 4 * 5 + 5)
        flops = 2 * 2 * 3 * 4 * 5
        arguments = (2, 3, 4, 5, 2, 1)
        assert floors.patch_embed(*arguments, backward=False, assembled=False) == (bare, flops)
        assert floors.patch_embed(*arguments, backward=False) == (whole, flops)
        assert floors.patch_embed(*arguments, backward=True) == (2 * whole, 2 * flops)

    def test_patch_embed_of_a_vit(self, floors):
        """ViT-B, 256 images, bfloat16: 256 x 196 x 768 pixels and 256 x 197 x 768 channels."""
        moved = 2 * (38_535_168 + 38_731_776 + 589_824 + 768 + 151_296 + 768)
        work = floors.patch_embed(256, 196, 768, 768, 2, 2, backward=False)
        assert work == (moved, 59_190_018_048)

    def test_stem(self, floors):
        """Two images of 4 x 4 pixels in bytes, through 2 x 2 of 5 channels, to tokens of 7."""
        shapes = importlib.import_module("gpu.shapes")
        problem = shapes.Stem("", 2, (4, 4), (5,), (2,), 7)
        weights, pixels, tokens = 9 * 3 * 5 + 5 * 7, 2 * 3 * 4 * 4, 2 * 2 * 2 * 7
        first, last = 2 * 2 * 4 * 27 * 5, 2 * 2 * 4 * 5 * 7
        forward = (pixels + tokens + weights, first + last)
        assert floors.stem(problem, 1, backward=False) == forward
        both = (2 * (pixels + tokens) + 3 * weights, 2 * first + 3 * last)
        assert floors.stem(problem, 1, backward=True) == both

    def test_the_larger_term_counts(self, floors):
        ceilings = {"bandwidth": 10.0, "rates": {"bfloat16": 100.0}}
        assert floors.seconds(floors.Work(20.0, 100.0), ceilings, "bfloat16") == 2.0
        assert floors.seconds(floors.Work(20.0, 500.0), ceilings, "bfloat16") == 5.0

    def test_more_than_all_of_it_is_a_fault(self, floors):
        assert floors.share(1.0, 2.0) == (0.5, None)
        reached, problem = floors.share(1.0, 0.8)
        assert reached == 1.25
        assert problem == "125 % of its floor: a fault of the measurement"

    def test_and_fails_its_stage(self, floors, tmp_path):
        contests = importlib.import_module("gpu.contests")
        shapes = importlib.import_module("gpu.shapes")
        records = importlib.import_module("gpu.record")
        record = records.Record(tmp_path, "kernels", 1.0)
        ceilings = {"bandwidth": 1e12, "rates": {"bfloat16": 1e15}}
        found = {"fastvit": {"median": 1e-9}}
        shape = shapes.FULL.shapes[0]
        contests.judge(record, ceilings, shape, "core", "forward", found)
        assert not record.close()
        assert "S N=196 B=256 core forward, fastvit" in record.data["problems"][0]

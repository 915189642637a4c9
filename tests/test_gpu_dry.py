# SPDX-License-Identifier: Apache-2.0
"""``make gpu`` where there is no GPU: all stages once, in tiny sizes, through the same code."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from gpu_dry import dry, gpu, results

pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("triton", reason="Triton is not installed")

DRY = "dry run on a processor: not a measurement"
MODES = ("forward", "forward+backward")


class Walked(NamedTuple):
    out: Path
    status: int
    printed: str
    stages: dict[str, dict[str, Any]]
    summary: str


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Walked:
    """The only whole run; the tests below read what it left."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    done = dry(out)
    summary = (out / "summary.md").read_text("utf-8")
    return Walked(out, done.returncode, done.stdout + done.stderr, results(out), summary)


def contests(walked: Walked, stage: str) -> list[dict[str, Any]]:
    return [case for case in walked.stages[stage]["cases"] if "contenders" in case]


def timed(case: dict[str, Any]) -> set[str]:
    return {name for name, times in case["contenders"].items() if "median" in times}


def test_every_stage_is_walked_to_its_end(walked):
    names = [stage.name for stage in gpu("stages").STAGES]
    assert walked.stages.keys() == set(names)
    statuses = {name: walked.stages[name]["status"] for name in names}
    assert set(statuses.values()) == {"ok"}, walked.printed
    assert walked.status == 0, walked.printed
    # A build needs tools that a dry run may lack; nothing else may be left out.
    missed = {name: walked.stages[name]["missed"] for name in names}
    assert all(m.startswith("install, without") for m in missed.pop("build"))
    assert not any(missed.values()), missed


def test_files_are_those_that_are_listed(walked):
    files = {file.name for file in walked.out.iterdir()}
    assert files <= set(gpu("stages").FILES)
    assert {"machine.json", "kernels.json", "peers.json", "verified.json", "summary.md"} <= files


def test_every_stage_says_where_it_comes_from(walked):
    for name, record in walked.stages.items():
        assert {"commit", "dirty", "versions"} <= record["machine"].keys(), name
        assert record["fingerprint"].keys() == {"gpsa", "conv_stem", "patch_embed"}, name
        assert "without" not in record, name
    origins = {str(record["fingerprint"]) for record in walked.stages.values()}
    assert len(origins) == 1


def test_tables_say_that_they_measure_nothing(walked):
    titles = [part for part in walked.summary.split("\n## ")[1:] if "\n|" in part]
    assert len(titles) >= 12, walked.summary
    assert all(DRY in part for part in titles)


def test_ceilings_come_before_all_that_is_timed(walked):
    names = [stage.name for stage in gpu("stages").STAGES]
    assert names.index("ceilings") == names.index("machine") + 1
    cases = walked.stages["ceilings"]["cases"]
    assert all(case["value"] > 0 for case in cases)
    rates = walked.stages["ceilings"]["ceilings"]["rates"]
    assert rates.keys() == {"bfloat16", "float16", "tf32", "float32"}
    launches = {case["name"] for case in cases if case["name"].startswith("launch")}
    assert {"launch as a node of a graph", "launch in a stream", "launch, host"} <= launches


CONTESTS = [
    *(("kernels", "core"), ("kernels", "module"), ("peers", "core"), ("peers", "module")),
    *(
        ("patch_embed", "eager"),
        ("patch_embed", "compiled"),
        ("stem", "eager"),
        ("stem", "compiled"),
    ),
]


@pytest.mark.parametrize(("stage", "what"), CONTESTS)
def test_a_contest_is_whole(walked, stage, what):
    """Ours with its spread, its share of the floor, its warm times, and all samples."""
    cases = [case for case in contests(walked, stage) if case["what"] == what]
    assert {case["mode"] for case in cases} == set(MODES)
    for case in cases:
        ours = case["contenders"]["fastvit"]
        assert ours["q20"] <= ours["median"] <= ours["q80"]
        assert len(ours["samples"]) == 2
        assert 0 < ours["share"] <= 1
        assert ours["sets"] == 2
        if (stage, what) == ("stem", "compiled"):
            continue
        warm = ours["warm"]
        assert warm["q20"] <= warm["median"] <= warm["q80"]
        # What the cache serves has no floor of the memory.
        assert "share" not in warm
        assert "floor" not in warm


def test_cores_meet_plain_attention(walked):
    cases = [case for case in contests(walked, "kernels") if case["what"] == "core"]
    assert {case["dtype"] for case in cases} == {"bfloat16", "tf32"}
    for case in cases:
        assert {"fastvit", "math", "flash"} <= timed(case)
        assert case["fastest"] in timed(case)
        assert case["checks"]["fastvit"]["ok"]
        assert case["host"] > 0
    compiled = [case for case in contests(walked, "peers") if case["what"] == "core"]
    assert {"flex", "flex + position"} <= timed(compiled[0])
    # The fastest of the stage before, in the same run.
    assert len(timed(compiled[0]) & {"flash", "efficient", "cudnn", "math"}) == 1


def test_layers_meet_timm(walked):
    cases = [case for case in contests(walked, "kernels") if case["what"] == "module"]
    assert all(timed(case) == {"fastvit", "timm eager"} for case in cases)
    assert any(case["what"] == "memory" for case in walked.stages["kernels"]["cases"])
    compiled = [case for case in contests(walked, "peers") if case["what"] == "module"]
    names = [timed(case) for case in compiled]
    assert names.count({"fastvit", "fastvit compiled", "timm eager", "timm compiled"}) == 2
    assert names.count({"fastvit", "timm eager", "timm max-autotune"}) == 2


def test_patches_are_compared_and_timed(walked):
    stage = walked.stages["patch_embed"]
    compared = [case for case in stage["cases"] if case["what"] == "agreement"]
    assert {case["layout"] for case in compared} == {"planar", "cropped"}
    tensors = {tensor["name"] for case in compared for tensor in case["tensors"]}
    assert tensors == {"output", "images", "weight", "bias", "pos_embed", "cls_token"}
    assert all(case["ok"] for case in compared)
    found = {(c["what"], c["pixels"], c["mode"]): c for c in contests(walked, "patch_embed")}
    assert len(found) == 8
    assert all("median" in t for case in found.values() for t in case["contenders"].values())
    assert {"timm", "linear", "conv alone"} < timed(found["eager", "float", "forward+backward"])
    chains = {f"{name} compiled" for name in ("linear", "timm", "timm channels_last")}
    assert chains < timed(found["compiled", "uint8", "forward"])
    assert "memory" in found["eager", "float", "forward+backward"]
    assert "\n## Patch embedding with class token and positions\n" in walked.summary


def test_stems_are_compared_and_timed(walked):
    stage = walked.stages["stem"]
    compared = [case for case in stage["cases"] if case["what"] == "agreement"]
    assert all(case["ok"] for case in compared)
    tensors = {tensor["name"] for case in compared for tensor in case["tensors"]}
    assert {"output", "images", "0.conv.weight", "1.bn.running_var", "2.conv.bias"} <= tensors
    found = {(c["what"], c["dtype"], c["mode"]): c for c in contests(walked, "stem")}
    assert {what for what, _, _ in found} == {"eager", "compiled", "max-autotune-no-cudagraphs"}
    assert all("median" in t for case in found.values() for t in case["contenders"].values())
    eager = {"fastvit", "eager", "eager channels_last"}
    assert timed(found["eager", "bfloat16", "forward"]) == {*eager, "cuDNN conv-bias-relu"}
    assert timed(found["eager", "tf32", "forward+backward"]) == eager
    assert "\n## Convolutional stem\n" in walked.summary


def test_choices_are_timed_and_make_a_table(walked, monkeypatch):
    """A table that the package reads, of the keys that it asks for."""
    stage = walked.stages["stem_choices"]
    calls = {case["call"]: case["contenders"] for case in stage["cases"]}
    assert len(calls) == 9
    layer = "train 8-16 s2 2^3"
    assert calls["half train 3-8-16-16 s2-2 2^7"].keys() == {"kernels", "torch", f"half {layer}"}
    assert all("median" in times for found in calls.values() for times in found.values())

    from fastvit.ops import stem_choices

    monkeypatch.setattr(stem_choices, "_FILE", walked.out / "stem_choices.json")
    arch = stage["cases"][0]["arch"]
    stem_choices.choices(arch)
    choices = gpu("stem_choices")
    slow, fast = {"q20": 2.0, "q80": 3.0}, {"q20": 1.0, "q80": 1.5}
    case = {"arch": arch, "call": "ieee train 3-8-16-16 s2-2 2^7"}
    case["contenders"] = {"kernels": slow, "torch": slow, f"ieee {layer}": fast}
    other = {**case, "contenders": {"kernels": slow, "torch": fast}}
    entry = choices.table({**stage, "cases": [case]})[arch]
    assert (entry["cudnn"], entry["torch"]) == ([f"ieee {layer}"], [])
    both = choices.table({**stage, "cases": [other, case]})[arch]
    assert (both["cudnn"], both["torch"]) == ([f"ieee {layer}"], [])
    assert choices.merged([walked.out]).keys() == {arch}


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

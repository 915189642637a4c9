# SPDX-License-Identifier: Apache-2.0
"""False figures are caught: a slow kernel, a wrong model, a stale file, a missing result."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_dry import gpu

pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[1]
#: Longer than any contender takes at these sizes, on a busy machine too.
SLEEP = 0.4
PEERS = ("flash", "math")


@pytest.fixture
def problem():
    """Sizes at which an interpreted kernel takes a fraction of the sleep."""
    shape = gpu("shapes").Shape("S", 1, 1, 16, 4, (2, 2))
    return gpu("attention").Problem(gpu("device").open_device(dry=True), shape, "bfloat16")


@pytest.fixture
def record(tmp_path):
    found = gpu("record").Record(tmp_path, "kernels", 100.0)
    found.data |= {"dry": True, "fingerprint": {"gpsa": "1"}, "machine": machine()}
    return found


def machine(**changes: Any) -> dict[str, Any]:
    found = {"commit": "c", "dirty": False, "gpu": None, "cpu": "p", "versions": {"torch": "2"}}
    return {**found, **changes}


def core(problem, record, rates=None, contenders=None):
    """One contest forward, as the stage kernels has it."""
    if contenders is None:
        contenders = {"fastvit": problem.ours(), **{n: problem.sdpa(n) for n in PEERS}}
    contest = gpu("attention_contests").contest
    contest(problem.device, record, rates, problem, "core", "forward", contenders)
    return record.data["cases"][-1]


class TestSleep:
    """In our op, as a user calls it."""

    @pytest.fixture
    def slow(self, monkeypatch):
        attention = gpu("attention")
        op = attention.gpsa_attention

        def sleepy(*args: Any, **kwargs: Any) -> torch.Tensor:
            time.sleep(SLEEP)
            return op(*args, **kwargs)

        monkeypatch.setattr(attention, "gpsa_attention", sleepy)

    def test_shows_in_ours_alone(self, problem, record, slow):
        case = core(problem, record)
        ours = case["contenders"]["fastvit"]
        assert ours["q20"] >= SLEEP
        assert ours["warm"]["median"] >= SLEEP
        assert min(ours["samples"]) >= SLEEP
        assert case["host"] >= SLEEP
        for name in PEERS:
            assert min(case["contenders"][name]["samples"]) < SLEEP / 2
        # What a comparison of two runs judges by.
        written = json.loads((record.folder / "kernels.json").read_text("utf-8"))
        (found,) = written["kernels"]["cases"]
        assert found["contenders"]["fastvit"]["samples"] == ours["samples"]
        assert {"shape", "dtype", "what", "mode"} <= found.keys()

    def test_is_not_there_without_it(self, problem, record):
        assert core(problem, record)["contenders"]["fastvit"]["median"] < SLEEP


class TestFloor:
    """Rates are chosen so that the fastest contender comes to a hundredth of its floor's speed."""

    @pytest.fixture
    def rates(self, problem, record):
        case = core(problem, record)
        fastest = min(min(times["samples"]) for times in case["contenders"].values())
        moved = gpu("floors").core(*problem.shape.problem, 2, backward=False).bytes
        return {"bandwidth": 100 * moved / fastest, "rates": {"bfloat16": 1e30}}

    def test_holds_with_the_right_bytes(self, problem, record, rates):
        core(problem, record, rates)
        assert record.close()

    def test_fails_the_stage_with_too_many(self, problem, record, rates, monkeypatch):
        right = gpu("floors").core

        def wrong(*args: Any, **kwargs: Any) -> Any:
            work = right(*args, **kwargs)
            # Ten thousand for certainty: this machine's times vary.
            return work._replace(bytes=10_000 * work.bytes)

        monkeypatch.setattr(gpu("floors"), "core", wrong)
        core(problem, record, rates)
        assert not record.close()
        problems = record.data["problems"]
        assert any("% of its floor: a fault of the measurement" in each for each in problems)
        assert record.data["status"] == "failed"


class TestMissingResults:
    """Contenders that are fast because they do nothing."""

    @pytest.mark.parametrize(
        ("made", "said"),
        [
            (lambda q: torch.zeros_like(q), "DISAGREES: error 1.00e+00"),
            (lambda q: torch.empty_like(q), "DISAGREES: error nan"),
            (lambda q: q, "DISAGREES"),
        ],
    )
    def test_are_not_timed(self, problem, record, made, said):
        attention = gpu("attention")
        idle = attention.Contender(lambda q, k, v: made(q))
        case = core(problem, record, contenders={"idle": idle, "math": problem.sdpa("math")})
        assert said in case["contenders"]["idle"]["error"]
        assert "median" not in case["contenders"]["idle"]
        assert not case["checks"]["idle"]["ok"]
        assert "median" in case["contenders"]["math"]

    def test_of_ours_fail_the_stage(self, problem, record):
        idle = gpu("attention").Contender(lambda q, k, v: torch.zeros_like(q), ours=True)
        core(problem, record, contenders={"fastvit": idle})
        assert "fastvit: RuntimeError: not timed" in record.data["problems"][0]

    @pytest.mark.parametrize(
        ("result", "said"),
        [
            (torch.zeros(2, 2), "result 0 is nothing but zeros"),
            ((torch.ones(2), [torch.ones(2, 2), torch.zeros(2, 2)]), "result 2 is nothing but"),
            (torch.tensor([1.0, float("nan")]), "result 0 is not finite everywhere"),
        ],
    )
    def test_of_any_contest_are_not_timed(self, problem, result, said):
        makers = {"idle": lambda: [lambda: result], "busy": lambda: [lambda: torch.ones(2, 2)]}
        found = gpu("timing").compete(problem.device, makers)
        assert said in found["idle"]["error"]
        assert "median" in found["busy"]


class TestStaleResults:
    def other(self, record, name: str = "ceilings", **changes: Any) -> None:
        """An earlier stage's results in the same folder."""
        found = {"status": "ok", "dry": True, "fingerprint": {"gpsa": "1"}, "machine": machine()}
        rates = dict.fromkeys(("bfloat16", "float16", "tf32", "float32"), 1.0)
        found |= {"ceilings": {"bandwidth": 1.0, "rates": rates}, "cases": [], **changes}
        gpu("record").update(record.folder, name, found)

    def test_of_the_same_run_are_used(self, record):
        self.other(record)
        assert gpu("ceilings").read(record)["bandwidth"] == 1.0
        assert "without" not in record.data

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"fingerprint": {"gpsa": "2"}}, "of another version of the sources: "),
            ({"machine": machine(commit="other")}, "of another commit: other, here c"),
            ({"machine": machine(gpu="H100")}, "of another machine: H100, here p"),
            ({"machine": machine(versions={"torch": "3"})}, "of another set of versions: "),
            ({"dry": False}, "of another kind of run: measured, here dry"),
            ({"status": "died"}, "there are none"),
        ],
    )
    def test_of_another_are_not(self, record, change, said):
        self.other(record, **change)
        assert gpu("ceilings").read(record) is None
        assert record.data["without"]["ceilings"].startswith(said)

    def test_name_no_fastest_peer(self, record):
        shape = gpu("full_plan").FULL.shapes[0]
        case = {"shape": shape._asdict(), "dtype": "bfloat16", "what": "core", "mode": "forward"}
        case |= {"fastest": "cudnn", "contenders": {"fastvit": {"error": "E"}, "cudnn": {}}}
        known = gpu("peers")._known
        self.other(record, "kernels", cases=[case])
        found = known(record)[shape.name, "core", "forward"]
        assert found == {"fastest": "cudnn", "failed": ["fastvit"]}
        self.other(record, "kernels", cases=[case], fingerprint={"gpsa": "2"})
        assert known(record) == {}

    def test_stand_in_the_summary(self, record):
        self.other(record, dry=False)
        gpu("ceilings").read(record)
        record.close()
        records = gpu("record").read_all(record.folder)
        for each in records.values():
            each.setdefault("date", "today")
        gpu("summary").write(record.folder, records, "", dry=True)
        text = (record.folder / "summary.md").read_text("utf-8")
        assert (
            "## Results that were not used\n\n- kernels did without the results of ceilings: of"
            in text
        )


class TestFingerprint:
    @pytest.fixture
    def root(self, tmp_path):
        for folder in ("kernels", "csrc", "fastvit"):
            if not (ROOT / folder).is_dir():
                pytest.skip("the sources are not beside tests/")
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
        for file in ("CMakeLists.txt", "setup.py"):
            shutil.copy(ROOT / file, tmp_path)
        return tmp_path

    def test_of_a_copy_is_that_of_the_checkout(self, root):
        found = gpu("fingerprint").fingerprint(root)
        assert found == gpu("fingerprint").fingerprint(ROOT)
        assert found.keys() == {"gpsa", "conv_stem", "patch_embed"}
        assert len(set(found.values())) == 3
        assert all(len(digits) == 16 for digits in found.values())

    @pytest.mark.parametrize(
        ("file", "changed"),
        [
            ("kernels/forward_tile.py", {"gpsa"}),
            ("kernels/stem_conv.py", {"conv_stem"}),
            ("fastvit/stem_choices.json", {"conv_stem"}),
            ("csrc/wgmma.cuh", {"patch_embed"}),
            ("CMakeLists.txt", {"patch_embed"}),
            ("kernels/blocks.py", {"gpsa", "conv_stem", "patch_embed"}),
            ("kernels/a_new_file.py", {"gpsa", "conv_stem", "patch_embed"}),
            ("fastvit/ops/backend.py", {"gpsa", "conv_stem", "patch_embed"}),
            ("fastvit/functional.py", {"gpsa", "conv_stem", "patch_embed"}),
            ("fastvit/verified.json", set()),
            ("fastvit/benchmark/models.json", set()),
            ("kernels/.hidden.py", set()),
        ],
    )
    def test_changes_with_the_sources_of_an_op(self, root, file, changed):
        before = gpu("fingerprint").fingerprint(root)
        with open(root / file, "a", encoding="utf-8") as changing:
            changing.write("\n")
        after = gpu("fingerprint").fingerprint(root)
        assert {op for op in before if before[op] != after[op]} == changed

    def test_is_that_of_what_the_run_copied(self, root, monkeypatch, tmp_path_factory):
        folder = tmp_path_factory.mktemp("run")
        os.rename(root, folder / "source")
        (folder / "source" / "kernels" / "forward_tile.py").write_text("other", "utf-8")
        monkeypatch.setenv("FASTVIT_GPU_FOLDER", str(folder))
        here = gpu("fingerprint").fingerprint(ROOT)
        assert gpu("origin").sources()["gpsa"] != here["gpsa"]
        assert gpu("origin").sources()["conv_stem"] == here["conv_stem"]

# SPDX-License-Identifier: Apache-2.0
"""Whole models in ``make gpu``: the dry run, the floors by hand, and the answers to the targets."""

from __future__ import annotations

import json

import pytest
import torch
from gpu_dry import dry, gpu, results

from fastvit.benchmark import weights
from fastvit.benchmark.counter import count
from fastvit.benchmark.figures import Results
from fastvit.benchmark.library import build_fastvit
from fastvit.benchmark.reading_gpu import read_gpu
from fastvit.benchmark.rows import load_rows, select_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "out"
    done = dry(out, "ceilings", "models", "epoch")
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class TestDryRun:
    def test_every_contest_is_held(self, folder):
        stage = results(folder)["models"]
        assert (stage["status"], stage["missed"]) == ("ok", [])
        plan = gpu("model_plan").DRY
        assert [case["way"] for case in stage["cases"]] == [contest.way for contest in plan]
        for case, contest in zip(stage["cases"], plan, strict=True):
            assert contest._asdict().items() <= case.items()

    def test_contenders_of_inference(self, folder):
        cases = results(folder)["models"]["cases"]
        for case, (first, second) in zip(cases, gpu("model_plan").PAIRS.values(), strict=False):
            found = case["contenders"]
            names = {f"{library} {f}" for library in ("timm", "fastvit") for f in (first, second)}
            names |= {f"fastvit {family} accelerated" for family in (first, second)}
            backends = ("flash", "cudnn", "efficient")
            names |= {f"timm {second} {backend}" for backend in backends}
            if first == "vit_c":
                names |= {f"fastvit {first} {backend}" for backend in backends}
            assert found.keys() == names | {f"{name} graph" for name in names}
            # PyTorch has one of these for processors.
            untimed = {name for name, times in found.items() if "error" in times}
            assert {name.split()[2] for name in untimed} == {"cudnn", "efficient"}
            for name in found.keys() - untimed:
                times = found[name]
                assert times["q20"] <= times["median"] <= times["q80"]
                assert times["images_per_s"] == pytest.approx(2 / times["median"])
                assert 0 < times["share"] <= 1
            checked = {check["name"] for check in case["checks"]}
            assert checked == found.keys() - untimed

    def test_contenders_of_training_and_compilation(self, folder):
        cases = results(folder)["models"]["cases"]
        training = [c for c in cases if (c["mode"], c["way"]) == ("training", "eager")]
        for case in training:
            assert "gradient of the images" in {check["name"] for check in case["checks"]}
            assert not any(name.endswith("graph") for name in case["contenders"])
            assert len(case["memory"]) == 4
        compiled = [c for c in cases if c["way"] == "compiled"]
        assert {c["mode"] for c in compiled} == {"inference", "training"}
        assert all("median" in t for c in compiled for t in c["contenders"].values())

    def test_epochs(self, folder):
        stage = results(folder)["epoch"]
        (case,) = stage["cases"]
        assert (stage["status"], case["status"]) == ("ok", "ok")
        assert case["name"] == "ConViT-S, dry run"
        assert case["paper"]["images_per_s"] == 305
        assert case["speedup"] > 0
        whole = json.loads((folder / "epoch.json").read_text("utf-8"))
        assert whole["rows"] == [case]
        assert whole["dtype"] == "bfloat16"

    def test_summary(self, folder):
        text = (folder / "summary.md").read_text("utf-8")
        before, *parts = text.split("\n## ")
        assert "**Targets: 0 of 12 met, 0 missed, 12 not measured.**" in before
        tables = {part.splitlines()[0]: part for part in parts}
        assert "Targets" not in tables
        for title in ("Models", "Minutes per ImageNet epoch, bfloat16"):
            assert gpu("summary").DRY in tables[title]
        assert tables["Models"].count("\n| ConViT ÷ DeiT | dry ") == 4
        assert "| 305 images/s |" in tables["Minutes per ImageNet epoch, bfloat16"]


@pytest.fixture
def held(tmp_path, monkeypatch):
    """Holds one contest on the processor and returns the stage's results."""
    models, plan = gpu("models"), gpu("model_plan")
    device = gpu("device").Processor()

    def hold(rates=None, seconds=1000.0, **changes):
        contest = plan.Contest(plan.VIT_C, "dry", batch=2, image_size=32)._replace(**changes)
        monkeypatch.setattr(models, "contests", lambda *, dry: (contest,))
        monkeypatch.setattr(gpu("ceilings"), "read", lambda record: rates)
        record = gpu("record").Record(tmp_path, "models", seconds)
        models.run(device, record)
        record.close()
        return record.data

    return hold


@pytest.fixture
def ours(monkeypatch):
    """Puts a hook behind the forward of fastvit's models of a family."""
    module = gpu("model_contenders")
    build = module.fastvit_model

    def put(family, hook):
        def built(row, library):
            model = build(row, library)
            if row.family == family:
                model.register_forward_hook(hook)
            return model

        monkeypatch.setattr(module, "fastvit_model", built)

    return put


def raises(error):
    def hook(*_):
        raise error

    return hook


class TestContests:
    def test_a_model_that_disagrees_fails_and_is_not_timed(self, held, ours):
        ours("ViT_C", lambda _module, _args, out: out * 1.2)
        found = held()
        assert found["status"] == "failed"
        (case,) = found["cases"]
        for name in ("fastvit vit_c", "fastvit vit_c graph", "fastvit vit_c flash"):
            assert case["contenders"][name]["error"].startswith("Disagreement: fastvit vit_c")
            assert "median" not in case["contenders"][name]
        assert "median" in case["contenders"]["timm vit_c"]
        assert all("not timed: Disagreement" in problem for problem in found["problems"])

    def test_in_training_neither(self, held, ours):
        ours("ViT_C", lambda _module, _args, out: out * float("nan"))
        found = held(mode="training")
        assert (found["status"], found["cases"]) == ("failed", [])
        assert "not timed: output in eval() DISAGREES" in found["problems"][0]

    def test_an_exception_costs_no_other(self, held, ours):
        ours("ViT_P", raises(RuntimeError("no such kernel")))
        found = held()
        (case,) = found["cases"]
        assert case["contenders"]["fastvit vit_p"] == {"error": "RuntimeError: no such kernel"}
        assert "median" in case["contenders"]["fastvit vit_c"]
        assert found["status"] == "failed"
        assert all("no such kernel" in problem for problem in found["problems"])

    def test_convolutions_are_the_fastest_of_cudnn(self, held, ours):
        seen = set()
        ours("ViT_C", lambda *_: seen.add(torch.backends.cudnn.benchmark))
        held()
        assert True in seen
        assert torch.backends.cudnn.benchmark is False

    def test_too_little_memory_is_no_fault(self, held, ours):
        ours("ViT_P", raises(torch.OutOfMemoryError("too large")))
        found = held()
        assert found["status"] == "ok"
        assert "too large" in found["cases"][0]["contenders"]["fastvit vit_p"]["error"]

    def test_faster_than_the_floor_is_a_fault(self, held):
        found = held(rates={"bandwidth": 1.0, "rates": {"bfloat16": 1.0}})
        assert found["status"] == "failed"
        assert "of its floor: a fault of the measurement" in found["problems"][0]

    def test_what_the_time_does_not_reach_is_missed(self, held):
        found = held(seconds=60.0, way="compiled")
        assert (found["status"], found["cases"]) == ("ok", [])
        assert found["missed"] == ["ViT_C ÷ ViT_P dry inference B=2 bfloat16 32x32 compiled"]


class TestPlan:
    def test_a_comparison_of_two_runs_tells_all_contests_apart(self):
        plan = gpu("model_plan").FULL
        times = {"median": 1.0, "q20": 1.0, "q80": 1.0, "samples": [1.0]}
        cases = [{**c._asdict(), "contenders": {"fastvit": dict(times)}} for c in plan]
        found = Results("run")
        read_gpu({"models": {"status": "ok", "cases": cases}}, found)
        assert len(found.figures) == len(plan)

    def test_the_targets_come_first(self):
        plan = gpu("model_plan")
        asked = {plan.Contest(plan.CONVIT, size) for size in plan.CONVITS}
        asked |= {plan.Contest(plan.VIT_C, size) for size in plan.STEMS}
        asked.add(plan.Contest(plan.CONVIT, "small", batch=1))
        assert set(plan.FULL[: len(asked)]) == asked

    def test_everything_is_asked_of_the_main_models(self):
        plan = gpu("model_plan")
        assert len(set(plan.FULL)) == len(plan.FULL)
        for pair, size in ((plan.CONVIT, "small"), (plan.VIT_C, "4GF")):
            mine = [c for c in plan.FULL if (c.pair, c.size) == (pair, size)]
            assert {c.batch for c in mine} >= {1, 8, 64, 256}
            assert {c.dtype for c in mine} == {"bfloat16", "float16", "float32", "tf32"}
            assert {c.image_size for c in mine} == {224, 384, 512}
            assert {c.mode for c in mine if c.way == plan.COMPILED} == {"inference", "training"}

    def test_every_model_can_be_built(self):
        """timm's and fastvit's have the same number of parameters."""
        plan, contenders = gpu("model_plan"), gpu("model_contenders")
        asked = {c._replace(mode="", batch=0, dtype="", way="") for c in plan.FULL}
        for contest in asked:
            # The other sizes are larger at 384 x 384 in the same way.
            if contest.image_size > 224 and contest.size not in ("small", "4GF"):
                continue
            for row in gpu("model_rows").rows(contest):
                with torch.device("meta"):
                    ours = build_fastvit(row)
                models = contenders.laid_out(row), ours
                sizes = {sum(p.numel() for p in model.parameters()) for model in models}
                assert len(sizes) == 1, (contest, row.family)

    def test_pairs_are_of_one_shape(self):
        plan, rows = gpu("model_plan"), gpu("model_rows").rows
        for contest in plan.FULL:
            first, second = rows(contest)
            shapes = [(r.embed_dim, r.heads, r.image_size) for r in (first, second)]
            assert shapes[0] == shapes[1]
            assert second.depth - first.depth == (contest.pair == plan.VIT_C)
        assert rows(plan.Contest(plan.CONVIT, "small"))[1].embed_dim == 432

    def test_epochs_go_by_value(self):
        rows = gpu("epoch").ordered(load_rows())
        assert len(rows) == 31
        assert [row.name for row in rows[:2]] == ["ConViT-S", "ViT_C-4GF"]
        assert all(row.fastvit is None for row in rows[16:])


@pytest.fixture
def epoch(tmp_path, monkeypatch):
    module = gpu("epoch")

    def run(seconds=1000.0):
        record = gpu("record").Record(tmp_path, "epoch", seconds)
        module.run(gpu("device").Processor(), record)
        record.close()
        return record.data

    return run


class TestEpochs:
    def test_a_library_that_is_missing_is_said(self, epoch, monkeypatch):
        def lacks(row):
            raise ModuleNotFoundError("No module named 'torchvision'")

        monkeypatch.setattr(weights, "build_library", lacks)
        found = epoch()
        assert (found["status"], found["cases"]) == ("ok", [])
        assert found["missed"] == [
            "ConViT-S, dry run (ModuleNotFoundError: No module named 'torchvision')"
        ]

    def test_any_other_failure_fails(self, epoch, monkeypatch):
        monkeypatch.setattr(weights, "build_fastvit", raises(RuntimeError("no luck")))
        found = epoch()
        assert found["problems"] == ["ConViT-S, dry run: RuntimeError: no luck"]

    def test_what_the_time_does_not_reach_is_missed(self, epoch):
        assert epoch(seconds=-1.0)["missed"] == ["ConViT-S, dry run"]


class TestFloors:
    def test_by_hand(self):
        """One block of width 32 over 4 patches of an image of 32 x 32; the classifier asks for one
        of its 5 tokens.
        """
        row = gpu("model_rows").dry_row("DeiT-S")
        patches = 4 * 768 * 32
        first = 4 * 5 * 32**2 + 2 * 5 * 5 * 32 + 2 * 2 * 5 * 32**2
        last = 2 * 5 * 32**2 + 2 * 1 * 5 * 32 + (2 + 4) * 32**2
        products = patches + first + last + 32 * 1000
        work = gpu("model_floors").work
        moved = 2 * (7_000 + 3 * 3 * 32 * 32 + 3 * 1000)
        assert work(row, 7_000, 3, 2, training=False) == (moved, 2 * 3 * products)
        moved = 4 * (6 * 7_000 + 3 * 3 * 32 * 32)
        flops = 2 * 3 * (3 * products - patches)
        assert work(row, 7_000, 3, 4, training=True) == (moved, flops)

    def test_of_a_stem(self):
        """Convolutions of 3 x 3 to 8, 8, 16 and 16 channels, each halving, and one of 1 x 1."""
        row = gpu("model_rows").dry_row("ViT_C-4GF")
        found = list(gpu("model_floors")._embedding(row))
        assert found == [
            16**2 * 9 * 3 * 8, 8**2 * 9 * 8 * 8, 4**2 * 9 * 8 * 16, 2**2 * 9 * 16 * 16,
            2**2 * 16 * 32,
        ]  # fmt: skip

    @pytest.mark.parametrize("name", ["ConViT-S", "DeiT-B", "ViT_P-4GF", "ViT_C-18GF"])
    def test_against_the_counter(self, name):
        """The counter has besides: biases, GPSA's position scores, and the last block's tokens."""
        (row,) = select_rows([name])
        model = gpu("model_contenders").laid_out(row)
        counted = count(model, 224)
        assert counted.params == row.verified.params
        rest, C, N = 0, row.embed_dim, 196
        if row.family == "ConViT":
            rest += 10 * N**2 * row.heads * (3 + 1)
        rest += N * C  # the embedding's bias
        for index in range(row.depth):
            tokens = N if row.family == "ConViT" and index < 10 else N + 1
            biased = C + row.mlp_ratio * C + C + (3 * C if row.qkv_bias else 0)
            rest += tokens * biased
        unasked = N * (2 + 2 * row.mlp_ratio) * C**2 + 2 * N * (N + 1) * C
        rest += 1000 + unasked
        work = gpu("model_floors").work(row, counted.params, 1, 2, training=False)
        assert work.flops == 2 * (counted.flops - rest)


def timed(**medians):
    """Contenders of a contest by their medians in milliseconds."""
    return {
        name.replace("_over_", " "): {
            "median": 1e-3 * ms, "q20": 0.99e-3 * ms, "q80": 1.01e-3 * ms,
        }
        for name, ms in medians.items()
    }  # fmt: skip


def contest_of(pair, size, contenders, **changes):
    case = {
        "pair": pair, "size": size, "mode": "inference", "batch": 256, "dtype": "bfloat16",
        "image_size": 224, "way": "eager", "contenders": contenders, "checks": [],
    }  # fmt: skip
    return {**case, **changes}


def stage(*cases, commit="abc", **more):
    machine = {"commit": commit, "dirty": False, "gpu": "H"}
    return {
        "status": "ok", "cases": list(cases), "machine": machine, "date": "2026-01-02T03", **more,
    }  # fmt: skip


def core(label, N, B, contenders, **changes):
    shape = {"label": label, "N": N, "B": B, "H": 9, "d": 48, "grid": [14, 14]}
    case = {"what": "core", "mode": "forward", "shape": shape, "contenders": contenders}
    return {**case, **changes}


@pytest.fixture
def answers():
    """Cells of the table by target."""
    moonshots = gpu("moonshots")

    def read(records):
        lines = moonshots.table(records).splitlines()[2:]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return {row[0]: row[1:] for row in rows}

    return read


SMALL = "ConViT ÷ DeiT, small"


class TestTargets:
    def test_met_missed_and_not_measured(self, answers):
        deit = {"timm deit": 10.0, "timm deit flash": 9.9, "fastvit deit": 12.0}
        records = {
            "models": stage(
                contest_of("ConViT ÷ DeiT", "small", timed(**deit, **{"fastvit convit": 10.0})),
                contest_of("ConViT ÷ DeiT", "base", timed(**deit, **{"fastvit convit": 11.0})),
                contest_of(
                    "ConViT ÷ DeiT", "small", timed(**{"fastvit convit graph": 0.2}), batch=1
                ),
                contest_of("ViT_C ÷ ViT_P", "4GF", {
                    **timed(**{"timm vit_p": 1.0}),
                    "fastvit vit_c": {"error": "OutOfMemoryError: too large"},
                }),
            ),
            "kernels": stage(
                core("S", 196, 256, timed(fastvit=1.0, flash=1.1, cudnn=0.9)),
                core("B", 196, 256, timed(fastvit=1.0, efficient=1.2)),
            ),
        }  # fmt: skip
        found = answers(records)
        assert found[SMALL][:3] == ["≥ 0.98", "0.990", "met"]
        assert found["ConViT ÷ DeiT, base"][1:3] == ["0.900", "missed by 8.16 %"]
        assert found["ConViT ÷ DeiT, tiny"][1:3] == ["–", "not measured"]
        assert found["ViT_C ÷ ViT_P, 4GF"][1:3] == [
            "–", "not measured: fastvit vit_c: OutOfMemoryError: too large",
        ]  # fmt: skip
        assert found["batch-1 ConViT-small, CUDA graph"][:3] == ["≤ 250 µs", "200.0 µs", "met"]
        assert found["GPSA core ÷ fastest plain SDPA, S"][1:3] == ["0.900", "missed by 10.00 %"]
        assert found["GPSA core ÷ fastest plain SDPA, B N=196 B=256"][2] == "met"
        assert found["uint8 → tokens ÷ fastest eager chain"][2] == "not measured"
        said = gpu("moonshots").line(records)
        assert said == "**Targets: 2 of 12 met, 2 missed, 8 not measured.**"

    def test_the_fastest_of_the_second_family_counts(self, answers):
        """Whatever library, backend or graph it is; and not one of another family."""
        contenders = timed(**{
            "fastvit convit": 10.0, "fastvit convit accelerated graph": 9.0, "timm convit": 5.0,
            "timm deit": 9.5, "timm deit cudnn graph": 8.1, "fastvit deit": 20.0,
        })  # fmt: skip
        records = {"models": stage(contest_of("ConViT ÷ DeiT", "small", contenders))}
        _, value, verdict, of, _ = answers(records)[SMALL]
        assert (value, verdict) == ("0.900", "missed by 8.16 %")
        assert of.startswith(
            "fastvit convit accelerated graph 9.00 (8.91–9.09) ms; timm deit cudnn"
        )

    @pytest.mark.parametrize(
        "change",
        [{"batch": 64}, {"dtype": "float16"}, {"mode": "training"}, {"image_size": 384},
         {"way": "compiled"}],
    )  # fmt: skip
    def test_another_contest_answers_nothing(self, answers, change):
        contenders = timed(**{"fastvit convit": 1.0, "timm deit": 1.0})
        records = {
            "models": stage(
                contest_of("ConViT ÷ DeiT", "base", contenders),
                contest_of("ConViT ÷ DeiT", "small", contenders, **change),
            )
        }
        assert answers(records)[SMALL][2] == "not measured"

    def test_tokens_against_the_fastest_chain(self, answers):
        shape = {"B": 256, "D": 768, "patch": 16, "size": [224, 224]}
        case = {
            "what": "eager", "shape": shape, "dtype": "bfloat16", "pixels": "uint8",
            "mode": "forward",
            "contenders": timed(**{"fastvit": 1.0, "timm": 4.0, "linear": 2.9, "conv alone": 0.5}),
        }  # fmt: skip
        others = [
            {**case, "pixels": "float", "contenders": timed(fastvit=1.0, timm=9.0)},
            {**case, "shape": {**shape, "B": 1}, "contenders": timed(fastvit=1.0, timm=9.0)},
        ]
        name = "uint8 → tokens ÷ fastest eager chain"
        found = answers({"patch_embed": stage(case, *others)})[name]
        assert found[:3] == ["≥ 3", "2.900", "missed by 3.33 %"]

    def test_other_shapes_alone_make_no_table(self):
        """Those of a dry run are none that was asked for."""
        records = {"kernels": stage(core("S", 16, 1, timed(fastvit=1.0, flash=1.0)))}
        assert gpu("moonshots").table(records) == ""

    def test_files_of_several_runs_in_one_folder(self, answers, tmp_path):
        """Each answer says which commit it is of, and a stage that failed is named."""
        contenders = timed(**{"fastvit convit": 1.0, "timm deit": 1.0})
        models = stage(contest_of("ConViT ÷ DeiT", "small", contenders), commit="first")
        kernels = stage(
            core("S", 196, 256, timed(fastvit=1.0, flash=1.0)), commit="second", status="failed"
        )
        (tmp_path / "models.json").write_text(json.dumps({"models": models}), "utf-8")
        (tmp_path / "kernels.json").write_text(json.dumps({"kernels": kernels}), "utf-8")
        records = gpu("record").read_all(tmp_path)
        found = answers(records)
        assert found[SMALL][4] == "H, first, 2026-01-02"
        assert (
            found["GPSA core ÷ fastest plain SDPA, S"][4] == "H, second, 2026-01-02, stage failed"
        )

    def test_they_stand_first_in_the_summary(self, tmp_path):
        machine = {
            "commit": "abc", "dirty": False, "versions": {"torch": "2"}, "gpu": "a GPU", "cpu": "",
        }  # fmt: skip
        contenders = timed(**{"fastvit convit": 1.0, "timm deit": 1.0})
        for times in contenders.values():
            times["images_per_s"] = 1.0
        records = {
            "models": {
                **stage(contest_of("ConViT ÷ DeiT", "small", contenders)), "machine": machine,
            }
        }  # fmt: skip
        gpu("summary").write(tmp_path, records, "no picture", dry=False)
        before, first, *_ = (tmp_path / "summary.md").read_text("utf-8").split("\n## ")
        assert before.splitlines()[4] == "**Targets: 1 of 12 met, 0 missed, 11 not measured.**"
        assert first.splitlines()[0] == "Targets"
        assert f"| {SMALL} | ≥ 0.98 | 1.000 | met |" in first

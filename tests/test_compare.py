# SPDX-License-Identifier: Apache-2.0
"""``fastvit bench --compare``: what it finds, what it lets pass, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import made_up_results as made
import pytest
import torch

import fastvit
from fastvit import __main__
from fastvit.benchmark import compare, contests, modules
from fastvit.benchmark.figures import Figure, Key, Results
from fastvit.benchmark.machine import this_machine
from fastvit.benchmark.reading import read

BENCH = Path(__file__).parents[1] / "bench"


class Told(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.out)

    def named(self, verdict: str) -> list[tuple[str, str]]:
        """What and contender of the changes with a verdict."""
        changes = self.data["changes"]
        return [(c["what"], c["contender"]) for c in changes if c["verdict"] == verdict]


@pytest.fixture
def tell(tmp_path, capsys) -> Callable[..., Told]:
    """``tell(a, b, *flags)`` compares two contents or paths by the command."""

    def run(a: Any, b: Any, *flags: str) -> Told:
        paths = [
            x if isinstance(x, Path) else made.write(tmp_path / f"{name}.json", x)
            for name, x in (("a", a), ("b", b))
        ]
        try:
            status = __main__.main(["bench", "--compare", *map(str, paths), *flags])
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        return Told(status, *capsys.readouterr())

    return run


@pytest.fixture
def results_of(tmp_path) -> Callable[[Any], Results]:
    return lambda content: read(made.write(tmp_path / "results.json", content))


def last_line(told: Told) -> str:
    return told.out.strip().splitlines()[-1]


def test_two_runs_of_the_same_code_differ_in_nothing(tell):
    """Whatever the machine did meanwhile to all contenders alike."""
    told = tell(made.contests(2), made.contests(3, drift=1.3))
    assert told.status == 0
    assert last_line(told).startswith("0 slower, 0 faster, 12 within the spread"), told.out
    assert "commit commit2" in told.out
    assert "Some Processor, 2 cores, 2 threads" in told.out


def test_false_alarms_are_rare_and_a_fifth_is_found(results_of):
    """Over many pairs of made-up runs: at most one false alarm in 400 figures, and nine in ten of
    the changes by a fifth that are there.
    """
    honest: Counter[str] = Counter()
    found = 0
    for seed in range(100):
        a = results_of(made.contests(2 * seed))
        honest += compare.compare(a, results_of(made.contests(2 * seed + 1, drift=1.2))).counts()
        slowed = results_of(made.contests(2 * seed + 1, slowed={"layer 3": 1.2}))
        changes = compare.compare(a, slowed).changes
        slower = {c.key.what for c in changes if c.ours and c.verdict == compare.SLOWER}
        found += "layer 3" in slower
    assert honest[compare.SLOWER] + honest[compare.FASTER] <= 3
    assert honest[compare.WITHIN] >= 1197
    assert found >= 90


def test_a_slower_layer_is_found_on_a_faster_machine(tell):
    slowed = made.contests(3, drift=0.7, slowed={"layer 3": 1.5, "layer 5": 0.6})
    told = tell(made.contests(2), slowed, "--json")
    assert told.status == 1
    assert told.named("slower") == [("layer 3", "fastvit")]
    assert told.named("faster") == [("layer 5", "fastvit")]
    assert told.data["drift"]["ratio"] == pytest.approx(0.7, rel=0.05)
    text = tell(made.contests(2), slowed)
    assert last_line(text).startswith("1 slower, 1 faster, 10 within the spread")
    assert re.search(r"Drift: -(29|3[0-2])\.\d % in the medians of 24 contenders", text.out)
    assert "layer 2" not in text.out
    assert "layer 2" in tell(made.contests(2), slowed, "--all").out


def test_a_disturbed_moment_is_no_change(tell):
    """All of one contest took twice as long: its own peers say so."""
    disturbed = made.contests(1)
    for samples in disturbed["contests"][4]["seconds"].values():
        samples[:] = [2 * s for s in samples]
    assert tell(made.contests(0), disturbed).status == 0


def test_a_noisy_machine_hides_small_changes_but_not_large_ones(tell):
    """Contenders of libraries that jump by a third say how little a third of ours means."""
    runs = [made.contests(seed) for seed in (0, 1)]
    factors = itertools.cycle((1.0, 1.35, 1.2, 1.35, 0.8))
    for contest in runs[1]["contests"]:
        for samples in contest["seconds"].values():
            factor = next(factors)
            samples[:] = [factor * s for s in samples]
    assert tell(*runs).status == 0
    ours = runs[1]["contests"][0]["seconds"]["fastvit"]
    ours[:] = [4 * s for s in ours]
    told = tell(*runs, "--json")
    assert told.named("slower") == [("layer 0", "fastvit")]
    assert told.data["drift"]["noise"] > 1.3


def test_rounds_that_overlap_are_no_change(tell):
    """A median that moved within the rounds' own spread."""
    a, b = made.contests(0, noise=0.0), made.contests(1, noise=0.0)
    a["contests"][0]["seconds"]["fastvit"] = [1e-3 * x for x in (1.0, 1.1, 1.2, 1.3, 1.4)]
    b["contests"][0]["seconds"]["fastvit"] = [1e-3 * x for x in (1.1, 1.2, 1.31, 1.41, 1.5)]
    for contest in b["contests"]:
        for samples in contest["seconds"].values():
            # Else they would be the same samples.
            samples[0] *= 1.0001
    assert tell(a, b).status == 0
    b["contests"][0]["seconds"]["fastvit"] = [1e-3 * x for x in (1.45, 1.5, 1.55, 1.6, 1.7)]
    assert tell(a, b).status == 1


def paused(entry: contests.Entry) -> contests.Entry:
    """With a pause in every contender, beside which a busy machine's moments are short."""

    def build(dtype: torch.dtype, batch: int) -> contests.Contest:
        contest = entry.build(dtype, batch)
        runs = {
            name: lambda run=run: (time.sleep(0.02), run()) for name, run in contest.runs.items()
        }
        return contests.Contest(runs, contest.agreement)

    return dataclasses.replace(entry, build=build)


def test_a_sleep_in_our_layer_is_found_and_the_library_is_not_blamed(tell, tmp_path, monkeypatch):
    """Through the harness that measures: build, agreement, rounds, files."""
    patterns = ["patch embedding 768 float32", "patch embedding 768 uint8 float32"]
    chosen = contests.select(contests.entries(batch=1), patterns)
    machine = this_machine(torch.device("cpu"))
    monkeypatch.setattr(modules, "_ROUNDS", 5)

    def run(folder: str) -> Path:
        outcomes = [modules.measure(paused(entry), timed=True) for entry in chosen]
        assert all(outcome.agrees for outcome in outcomes)
        modules.write_report(outcomes, machine, tmp_path / folder)
        return tmp_path / folder

    honest = run("honest")
    forward = fastvit.PatchEmbed.forward

    def slow(self, x):
        time.sleep(0.5)
        return forward(self, x)

    monkeypatch.setattr(fastvit.PatchEmbed, "forward", slow)
    told = tell(honest, run("slowed"), "--json")
    assert told.status == 1
    assert told.named("slower") == [(entry.name, "fastvit") for entry in chosen]
    judged = [c for c in told.data["changes"] if not c["ours"]]
    assert {c["contender"] for c in judged} == {"library", "products"}


def test_peers_are_told_apart_and_never_judged(tell):
    """A library that became slower by itself is shown, and is no regression of ours."""
    changed = made.contests(1, count=40)
    products = changed["contests"][7]["seconds"]["products"]
    products[:] = [3 * s for s in products]
    told = tell(made.contests(0, count=40), changed, "--json")
    assert told.status == 0
    assert ("layer 7", "products") in told.named("slower")
    assert ("layer 7", "fastvit") in told.named("within the spread")


def test_what_fails_is_worse_and_what_is_missing_is_told(tell):
    b = made.contests(1)
    b["contests"][0].update(agrees=False, seconds={}, error=1e-3)
    del b["contests"][1]
    told = tell(made.contests(0), b)
    assert told.status == 1
    assert "layer 0 float32 batch 8, fastvit: disagrees: error 1.0e-03" in told.out
    assert "1 failed" in last_line(told)
    assert "vanished" in last_line(told)
    del b["contests"][0]
    told = tell(made.contests(0), b)
    assert told.status == 0
    assert "vanished" in last_line(told)
    assert "appeared" in last_line(tell(b, made.contests(0)))


def test_memory_that_grew_is_worse(tell):
    b = made.contests(1)
    b["contests"][2]["peak_bytes"]["fastvit"] *= 1.005
    assert tell(made.contests(0), b).status == 0
    b["contests"][2]["peak_bytes"]["fastvit"] *= 1.1
    told = tell(made.contests(0), b)
    assert told.status == 1
    assert "layer 2 float32 batch 8, peak bytes, fastvit" in told.out


# Stages of a run on a GPU.


def test_a_slower_kernel_is_found(tell):
    a, b = {"kernels": made.stage(0)}, {"kernels": made.stage(1, slowed=1.3)}
    told = tell(a, b)
    assert told.status == 1
    assert last_line(told) == "8 slower, 0 faster, 0 within the spread"
    assert "Some GPU | Some Processor, 16 threads" in told.out
    assert "2026-01-01" in told.out
    told = tell(a, {"kernels": made.stage(1)})
    assert last_line(told) == "0 slower, 0 faster, 8 within the spread"


def test_a_stage_that_failed_is_told(tell):
    """Its figures may be those of a fault: more than their floor allows, for one."""
    fault = "S core, fastvit: 130 % of its floor: a fault of the measurement"
    failed = {**made.stage(1), "status": "failed", "problems": [fault]}
    told = tell({"kernels": made.stage(0)}, {"kernels": failed})
    said = " ".join(told.out.split())
    assert f"b.json: stage kernels failed: {fault}" in said
    assert "a.json: stage" not in said


@pytest.mark.parametrize("sample", [0.0, -1e-3, float("nan"), float("inf"), "0.001"])
def test_a_sample_that_is_no_time_is_refused(tell, sample):
    doctored = made.contests(3)
    doctored["contests"][0]["seconds"]["fastvit"][0] = sample
    told = tell(made.contests(2), doctored)
    assert told.status == 2
    assert f"fastvit: expected seconds, got {sample!r}" in told.err


@pytest.mark.parametrize("name", ["median", "q20", "q80", "share"])
def test_a_figure_that_its_samples_do_not_give_is_refused(tell, name):
    honest, doctored = {"kernels": made.stage(0)}, {"kernels": made.stage(1)}
    times = doctored["kernels"]["cases"][0]["contenders"]["fastvit"]
    times[name] *= 0.9
    told = tell(honest, doctored)
    assert told.status == 2
    assert (
        f"kernels S core H=9 d=48 N=196 grid=14x14 batch 256 forward, fastvit: states {name}"
        in (told.err)
    )
    assert "but its samples give" in told.err


def test_stages_of_two_commits_are_refused(tell, tmp_path):
    a, b = tmp_path / "run_a", tmp_path / "run_b"
    for folder, seed in ((a, 0), (b, 2)):
        made.write(folder / "kernels.json", {"kernels": made.stage(seed)})
        made.write(folder / "peers.json", {"peers": made.stage(seed + 1)})
    assert tell(a, b).status == 0
    made.write(b / "peers.json", {"peers": made.stage(3, commit="older")})
    told = tell(a, b)
    assert told.status == 2
    assert "its parts differ in their commit, abc and older" in told.err
    assert "left from an earlier run" in told.err
    assert tell(a, b, "--force").status == 0


def test_a_dry_run_is_refused(tell):
    told = tell({"kernels": made.stage(0)}, {"kernels": made.stage(1, dry=True)})
    assert told.status == 2
    assert "b.json: a dry run, whose times mean nothing" in told.err


def test_the_gpus_harness_writes_what_is_read(tmp_path, monkeypatch):
    """Its own timing and record, with the samples that a processor gives."""
    monkeypatch.syspath_prepend(BENCH)
    from gpu.device import Processor
    from gpu.record import Record
    from gpu.timing import compete

    record = Record(tmp_path, "peers", 60.0)
    makers = {"timm": lambda: [lambda: None], "broken": lambda: 1 / 0}
    found = compete(Processor(), makers)
    record.add(what="core", mode="forward", shape={"label": "S", "B": 2}, contenders=found)
    record.add(what="memory", mode="", memory={"fastvit": {"kept": 5, "peak": 7}})
    record.close()
    figures = read(tmp_path).figures
    times = figures[Key("peers", "peers S core", batch="2", mode="forward", contender="timm")]
    assert list(times.samples) == found["timm"]["samples"]
    broken = figures[Key("peers", "peers S core", batch="2", mode="forward", contender="broken")]
    assert broken.error == "ZeroDivisionError: division by zero"
    peak = Key("peers", "peers memory", contender="fastvit", quantity="peak bytes")
    assert figures[peak].value == 7


# What is not to be compared.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cpu": "Another Processor"}, "cpu Some Processor, 2 cores in A, Another Processor in B"),
        ({"threads": 16}, "threads 2 in A, 16 in B"),
        ({"gpu": "Some GPU"}, "gpu none in A, Some GPU in B"),
    ],
)
def test_another_machine_is_refused(tell, changes, words):
    foreign = made.contests(1, machine={**made.MACHINE, **changes})
    told = tell(made.contests(0), foreign)
    assert told.status == 2
    assert f"different machines: {words}" in told.err
    told = tell(made.contests(0), foreign, "--force")
    assert told.status == 0
    assert "warning: different machines" in told.err


def test_a_copy_of_an_earlier_run_is_refused(tell):
    a = made.contests(0)
    told = tell(a, {**a, "commit": "a newer one"})
    assert told.status == 2
    assert (
        "36 figures have the same samples in A and B, layer 0 float32 batch 8, library" in told.err
    )
    # A single one is enough.
    b = made.contests(1)
    b["contests"][5]["seconds"]["fastvit"] = a["contests"][5]["seconds"]["fastvit"]
    assert "1 figures have the same samples" in tell(a, b).err


def test_nothing_in_common_is_said(tell):
    b = made.contests(1)
    for contest in b["contests"]:
        contest["dtype"] = "bfloat16"
    told = tell(made.contests(0), b)
    assert told.status == 2
    assert "nothing comparable: A has dtype float32, B has bfloat16" in told.err
    told = tell(made.contests(0), made.resources())
    assert "A has source modules, B has triton" in told.err


def test_other_versions_are_told(tell):
    b = made.contests(1, versions={**made.VERSIONS, "torch": "2.16.0"})
    told = tell(made.contests(0), b)
    assert told.status == 0
    assert "torch is 2.15.0 in A and 2.16.0 in B, so its contenders changed, too" in told.out
    told = tell(made.resources(), {**made.resources(), "triton": "3.6"})
    assert told.status == 0
    assert "triton is 3.9 in A and 3.6 in B, so the changes may be its" in told.out


def test_files_of_all_kinds_in_a_folder_are_read(tell, tmp_path):
    """Two tables of one kernel by two compilers among them."""
    for name, seed in (("run_a", 0), ("run_b", 2)):
        made.write(tmp_path / name / "modules.json", made.contests(seed))
        made.write(tmp_path / name / "kernels.json", {"kernels": _timed_here(seed)})
        made.write(tmp_path / name / "triton-3.9.json", made.resources())
        made.write(tmp_path / name / "triton-3.6.json", {**made.resources(), "triton": "3.6"})
        made.write(tmp_path / name / "verified.json", {"entries": []})
    told = tell(tmp_path / "run_a", tmp_path / "run_b", "--json")
    assert told.status == 0, told.err
    sources = {c["source"] for c in told.data["changes"]}
    assert sources == {"modules", "kernels", "triton 3.6", "triton 3.9"}


def _timed_here(seed: int) -> dict[str, Any]:
    """A stage on the machine of the contests, by its commit."""
    stage = made.stage(seed, commit=f"commit{seed}")
    stage["machine"].update(made.MACHINE)
    return stage


def test_what_was_timed_twice_counts_once_by_its_first_samples(results_of):
    """A stage may have a contender in several contests of one shape."""
    stage = made.stage(0)
    first, *_ = cases = stage["cases"]
    again = json.loads(json.dumps(made.stage(5)["cases"][0]))
    cases.append(again)
    figures = results_of({"peers": stage}).figures
    (key,) = (
        k for k in figures if k.batch == "256" and k.mode == "forward" and "fl" in k.contender
    )
    assert list(figures[key].samples) == first["contenders"]["flash"]["samples"]
    # But samples come before an error.
    first["contenders"]["flash"] = {"error": "no memory"}
    figures = results_of({"peers": stage}).figures
    assert list(figures[key].samples) == again["contenders"]["flash"]["samples"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("no JSON", "is no JSON"),
        ("{}", "expected modules.json, epoch.json"),
        ("[1]", "expected modules.json, epoch.json"),
        ('{"contests": 1}', "not as this version writes it"),
        (None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_result_is_said(tell, tmp_path, content, words):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content, "utf-8")
    told = tell(path, made.contests(0))
    assert told.status == 2
    assert "x.json" in told.err
    assert words in told.err


def test_an_empty_folder_is_said(tell, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no results in this folder" in tell(tmp_path / "empty", made.contests(0)).err


def test_measuring_and_comparing_exclude_each_other(tell, capsys):
    told = tell(made.contests(0), made.contests(1), "--rows", "ConViT-S")
    assert told.status == 2
    assert "--rows is for measuring" in told.err
    with pytest.raises(SystemExit):
        __main__.main(["bench", "--force"])
    assert "--force needs --compare A B" in capsys.readouterr().err


# Tables that no clock made.


@pytest.mark.parametrize(
    ("changes", "status", "verdict"),
    [
        ({}, 0, "equal"),
        ({"registers": 136}, 1, "grew"),
        ({"registers": 120}, 0, "shrank"),
        ({"predicted_us": 10.1}, 1, "grew"),
        ({"bytes": 4097}, 1, "grew"),
        # Of blocks that fit, fewer are worse.
        ({"blocks_per_sm": 3}, 1, "grew"),
        ({"warps": 8, "config": "128 x 128"}, 0, "another"),
    ],
)
def test_resources_differ_when_they_differ(tell, changes, status, verdict):
    told = tell(made.resources(), made.resources(**changes), "--json")
    assert told.status == status
    verdicts = {c["quantity"]: c["verdict"] for c in told.data["changes"]}
    expected = dict.fromkeys(verdicts, "equal") | dict.fromkeys(changes, verdict)
    assert verdicts == expected
    assert told.data["drift"] is None


def test_a_count_that_grew_is_named(tell):
    table = json.loads((BENCH / "results" / "counts.json").read_text("utf-8"))
    changed = json.loads(json.dumps(table))
    row = changed["composed"]["2.15"][0]
    row["written"] += 4
    told = tell(table, changed)
    assert told.status == 1
    assert f"{row['case']} {row['direction']}, written" in told.out
    assert last_line(told).startswith("1 grew, 0 shrank,")


def committed() -> list[Path]:
    files = (BENCH / "results").rglob("*.json")
    return sorted(f for f in files if f.name not in ("verified.json", "stem_choices.json"))


@pytest.mark.parametrize("path", committed(), ids=lambda p: str(p.relative_to(BENCH / "results")))
def test_committed_results_follow_from_their_samples(path):
    assert read(path).figures


@pytest.mark.parametrize("name", ["minutes_fastvit", "images_per_s_reference"])
def test_minutes_that_the_samples_do_not_give_are_refused(tell, name):
    path = next(p for p in committed() if p.name == "epoch.json")
    content = json.loads(path.read_text("utf-8"))
    content["rows"][1][name] *= 0.9
    told = tell(path, content)
    assert told.status == 2
    assert "ConViT-S, " in told.err
    assert "but its samples give" in told.err


def test_without_peers_the_noise_is_said_to_be_taken(tell):
    runs = [made.contests(seed, count=1) for seed in (0, 1)]
    for content in runs:
        del content["contests"][0]["seconds"]["products"]
        del content["contests"][0]["seconds"]["library"]
    told = tell(*runs)
    assert "both runs timed no contender of a library; noise is taken as ±5 %" in told.out


def test_an_intervals_edge():
    """By hand: 12 % slower beyond 5 % of noise, rounds that touch, and a repaired contender."""

    def results(*figures: Figure) -> Results:
        found = Results("x")
        for figure in figures:
            found.add(figure)
        return found

    ours = Key("s", "w", contender="fastvit")
    a = results(Figure(ours, True, samples=(1.0, 1.0, 1.0)))
    b = results(Figure(ours, True, samples=(1.12, 1.12, 1.12)))
    (change,) = compare.compare(a, b).changes
    assert change.verdict == compare.SLOWER
    assert change.ratio == pytest.approx(1.12)
    b = results(Figure(ours, True, samples=(1.04, 1.04, 1.04)))
    assert not compare.compare(a, b).worse
    broken = results(Figure(ours, True, error="no memory"))
    (change,) = compare.compare(broken, a).changes
    assert change.verdict == compare.APPEARED
    (change,) = compare.compare(a, broken).changes
    assert (change.verdict, change.reason) == (compare.FAILED, "no memory")
    assert not compare.compare(broken, broken).worse

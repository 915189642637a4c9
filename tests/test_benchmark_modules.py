# SPDX-License-Identifier: Apache-2.0
"""The comparison of layers: what it measures, prints and writes."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

from fastvit.benchmark import contests, modules
from fastvit.benchmark.contests import Contest, Entry
from fastvit.benchmark.machine import this_machine
from fastvit.testing import Agreement

AGREES = Agreement("output", 1e-7, 1e-7, 3e-7)


def sleeping(seconds: float):
    return lambda: time.sleep(seconds)


def entry(**changes) -> Entry:
    contest = Contest(
        {
            contests.LIBRARY: sleeping(0.04),
            contests.FASTVIT: sleeping(0.02),
            contests.PRODUCTS: sleeping(0.01),
        },
        AGREES,
        {contests.LIBRARY: lambda: torch.empty(4096), contests.FASTVIT: lambda: torch.empty(1024)},
    )
    contest = dataclasses.replace(contest, **changes)
    return Entry("some layer", torch.float32, 3, lambda dtype, batch: contest)


def test_ratios_are_of_the_best_rounds() -> None:
    outcome = modules.measure(entry(), timed=True)
    assert {len(s) for s in outcome.seconds.values()} == {12}
    assert outcome.ratio(contests.LIBRARY) == pytest.approx(2.0, rel=0.2)
    assert outcome.ratio(contests.LIBRARY, contests.PRODUCTS) == pytest.approx(4.0, rel=0.2)
    assert outcome.ratio(contests.COMPILED) is None
    assert outcome.peaks == {contests.LIBRARY: 4 * 4096, contests.FASTVIT: 4 * 1024}


def test_the_table_has_the_library_at_its_fastest() -> None:
    runs = {
        contests.LIBRARY: sleeping(0.04),
        contests.FASTVIT: sleeping(0.02),
        contests.COMPILED: sleeping(0.03),
        contests.CHANNELS_LAST: sleeping(0.01),
    }
    outcome = modules.measure(entry(runs=runs, memory={}), timed=True)
    assert outcome.fastest_other() == outcome.ratio(contests.CHANNELS_LAST) < 1.0
    assert f"| {outcome.fastest_other():.2f}x |" in modules.tables([outcome], markdown=True)[0]


def test_contenders_take_turns() -> None:
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in ("library", "fastvit", "x")}
    modules.measure(entry(runs=runs, memory={}), timed=True)
    assert order[6:] == ["library", "x", "fastvit"] * 12


def test_what_disagrees_is_not_timed() -> None:
    wrong = Agreement("output", 1e-3, 1e-7, 3e-7)
    outcome = modules.measure(entry(agreement=wrong), timed=True)
    assert not outcome.agrees
    assert outcome.seconds == {}


def test_peak_counts_what_is_held_at_one_time() -> None:
    def run() -> None:
        a = torch.empty(1000)
        b = torch.empty(500)
        del a, b
        torch.empty(600)

    assert modules.peak_bytes(run) == 4 * 1500


def test_tables_and_files(tmp_path: Path) -> None:
    outcomes = [modules.measure(entry(), timed=True)]
    (table,) = modules.tables(outcomes)
    assert [line.split()[0] for line in table.splitlines()[::2]] == ["what", "some"]
    assert "0.25" in table
    machine = this_machine(torch.device("cpu"))
    assert table in modules.text_report(outcomes, machine)
    modules.write_report(outcomes, machine, tmp_path)
    (found,) = json.loads((tmp_path / "modules.json").read_text())["contests"]
    assert (found["name"], found["dtype"], found["batch"]) == ("some layer", "float32", 3)
    assert len(found["seconds"]["fastvit"]) == 12
    assert "| some layer | float32 | 3 |" in (tmp_path / "modules.md").read_text()


def test_selection_by_pattern() -> None:
    found = contests.select(contests.entries(), ["GPSA B*float32 batch 8", "uint8"])
    assert [e.id for e in found] == [
        "GPSA B forward float32 batch 8",
        "GPSA B forward+backward float32 batch 8",
        "patch embedding 768 uint8 float32 batch 8",
        "patch embedding 768 uint8 bfloat16 batch 8",
    ]
    with pytest.raises(ValueError, match="no contest matches 'ResNet'"):
        contests.select(contests.entries(), ["ResNet"])


@pytest.mark.parametrize("one", contests.entries(batch=1)[:4], ids=lambda e: e.id)
def test_every_contender_of_a_layer_runs(one: Entry) -> None:
    contest = one.build(one.dtype, one.batch)
    assert contest.agreement.ok
    for name, run in contest.runs.items():
        if name != contests.COMPILED:
            run()


@pytest.mark.parametrize("size", ["S", "B"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpsa_needs_a_third_of_the_memory(
    size: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training step at 14 x 14 patches, batch 8; scratch memory grows with the cores."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    pattern = f"GPSA {size} forward+backward {dtype} batch 8"
    (one,) = contests.select(contests.entries(), [pattern])
    memory = one.build(one.dtype, one.batch).memory
    assert modules.peak_bytes(memory["fastvit"]) < modules.peak_bytes(memory["library"]) / 3


def test_the_stem_needs_no_more_memory_than_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training step; autograd used to make zeros for all that the stem keeps."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    (one,) = contests.select(contests.entries(), ["stem training float32 batch 8"])
    memory = one.build(one.dtype, one.batch).memory
    assert modules.peak_bytes(memory["fastvit"]) < modules.peak_bytes(memory["library"])

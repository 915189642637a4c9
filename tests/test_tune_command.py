# SPDX-License-Identifier: Apache-2.0
"""``fastvit tune``: what it prints, writes and refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import tuned as tables
from fastvit.kernels.configs import Config
from fastvit.kernels.tuned import Attention

from fastvit.__main__ import main
from fastvit.ops.tuned import triton_version
from fastvit.tuning import candidates, command, report, search, session
from fastvit.tuning.search import Outcome, Times

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter stands for a GPU here"
)

TOY = Attention("gpsa", "forward", "half", 1, 1, 20, 16, (4, 5))
PLAIN = Attention("mhsa", "forward", "half", 1, 1, 17, 16, None)
HERE = session.target(torch.device("cpu"), "bfloat16")
FAST = Config(rows=16, keys=(32,), channels=(16,))
Capture = pytest.CaptureFixture[str]


def outcome(problem: Attention = TOY, faster: bool = True) -> Outcome:
    built_in = candidates.built_in(problem, "sm_90")
    chosen = tuple((n, FAST if n == "forward_tile" else c) for n, c in built_in)
    before, after = Times(120.0, 118.0, 123.0), Times(100.0, 99.0, 101.0)
    if not faster:
        chosen, after = built_in, before
    return Outcome(problem, built_in, chosen, before, after, 9, 3, 2, 1, ("out differs",))


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``found(outcome, ...)``: what the search will find; an exception is raised."""

    def found(*outcomes: Any) -> None:
        def run(*_: Any, **__: Any) -> Any:
            for each in outcomes:
                if isinstance(each, BaseException):
                    raise each
                yield each

        monkeypatch.setattr(session, "run", run)

    return found


def read(file: Path) -> list[tables.Entry]:
    return list(tables.read(file, "sm_90", triton_version()).entries)


def test_it_prints_what_changed_and_writes_it(
    found: Callable[..., None], tmp_path: Path, capsys: Capture
) -> None:
    found(outcome(), outcome(PLAIN, faster=False))
    file = tmp_path / "tuned.json"
    assert command.search([TOY, PLAIN], HERE, 5.0, file) == 0
    out = capsys.readouterr().out
    assert f"2 problems, none (sm_90), 5 s, into {file}" in out
    assert "[1/2] gpsa forward half B1 H1 4x5 d16: 120.0 µs (118.0–123.0) → 100.0 µs" in out
    assert "[9 timed, 3 spill or do not fit, 2 too slow, 1 not compiled in time]" in out
    assert "nothing faster beyond the spread" in out
    assert "1 of 2 problems have a faster configuration:" in out
    assert f"\n{TOY.name}: 1.20 times as fast\n  built-in  120.0 µs" in out
    assert "forward_tile: 64 x 32, d 16, 4 warps, 1 stages → 16 x 32, d 16, 4 warps" in out
    first, second = read(file)
    assert dict(first.kernels)["forward_tile"] == FAST
    assert (second.problem, second.kernels) == (PLAIN, ())
    entry = json.loads(file.read_text("utf-8"))["sm_90"][triton_version()]["entries"][0]
    assert entry["us"]["tuned"] == {"median": 100.0, "q20": 99.0, "q80": 101.0}
    assert entry["us"]["built-in"]["median"] == 120.0


def test_it_keeps_what_the_file_has(found: Callable[..., None], tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    found(outcome())
    command.search([TOY], HERE, 5.0, file)
    found(outcome(PLAIN, faster=False))
    command.search([PLAIN], HERE, 5.0, file)
    assert [entry.problem for entry in read(file)] == [TOY, PLAIN]


def test_two_searches_at_once_keep_what_both_found(tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"

    def first(*_: Any, **__: Any) -> Any:
        yield outcome()
        # Meanwhile, in another process.
        session.keep(file, HERE, [outcome(PLAIN, faster=False)])
        yield outcome(TOY._replace(images=2))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(session, "run", first)
        command.search([TOY], HERE, 5.0, file)
    assert {entry.problem for entry in read(file)} == {TOY, PLAIN, TOY._replace(images=2)}


def test_what_was_cut_short_replaces_nothing(
    found: Callable[..., None], tmp_path: Path, capsys: Capture
) -> None:
    """Nor does it say that nothing is faster."""
    file = tmp_path / "tuned.json"
    found(outcome())
    command.search([TOY], HERE, 5.0, file)
    short = outcome(faster=False)._replace(complete=False)
    found(short, short._replace(problem=PLAIN))
    capsys.readouterr()
    command.search([TOY], HERE, 5.0, file)
    assert "nothing faster until its time was over, not kept" in capsys.readouterr().out
    (entry,) = read(file)
    assert dict(entry.kernels)["forward_tile"] == FAST
    # What was found before the time was over is.
    found(outcome(TOY._replace(images=2))._replace(complete=False))
    command.search([TOY], HERE, 5.0, file)
    assert len(read(file)) == 2


def test_an_interruption_keeps_what_was_measured(
    found: Callable[..., None], tmp_path: Path, capsys: Capture
) -> None:
    found(outcome(), KeyboardInterrupt())
    file = tmp_path / "tuned.json"
    assert command.search([TOY, PLAIN], HERE, 5.0, file) == 0
    assert [entry.problem for entry in read(file)] == [TOY]
    captured = capsys.readouterr()
    assert f"interrupted; what was measured is kept in {file}" in captured.err
    assert "1 of 1 problems have a faster configuration" in captured.out


def test_a_search_in_the_interpreter(tmp_path: Path, capsys: Capture) -> None:
    """All of it: compiled ahead in another process, compared, timed, written."""
    file = tmp_path / "tuned.json"
    assert command.search([PLAIN], HERE, 100.0, file, variants=2) == 0
    (entry,) = read(file)
    assert entry.problem == PLAIN
    assert "[1/1] mhsa forward half B1 H1 N17 d16: " in capsys.readouterr().out


def test_a_problem_that_fails_costs_no_other(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune = session._tuned

    def failing(problem: Any, *args: Any) -> Any:
        if problem == TOY:
            raise RuntimeError("out of memory\nand more")
        return tune(problem, *args)

    monkeypatch.setattr(session, "_tuned", failing)
    file = tmp_path / "tuned.json"
    assert command.search([TOY, PLAIN], HERE, 100.0, file, variants=1) == 0
    assert [entry.problem for entry in read(file)] == [PLAIN]
    assert f"{TOY.name}: RuntimeError: out of memory\n" in capsys.readouterr().err


def test_problems_that_are_not_reached_are_told(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "tuned.json"
    assert command.search([TOY, PLAIN], HERE, 1e-9, file, variants=1) == 0
    assert f"not reached in 1e-09 s: 2 problems, {TOY.name} the first" in capsys.readouterr().out
    assert not file.exists()


def test_without_a_gpu_it_says_so(capsys: Capture) -> None:
    assert main(["tune"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("fastvit tune: PyTorch sees no CUDA device to measure on; ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--op", "gspa"], "--op: unknown 'gspa'; did you mean gpsa?"),
        (["--op", "linear"], "--op: unknown 'linear'; known: gpsa, mhsa, conv_stem"),
        (["--dtype", "bfloat"], "--dtype: unknown 'bfloat'; did you mean bfloat16?"),
        (["--seconds", "0"], "--seconds: expected a positive number, got 0"),
        (["--seconds", "inf"], "--seconds: expected a positive number, got inf"),
        (["--seconds", "nan"], "--seconds: expected a positive number, got nan"),
        (["--arch", "sm_91", "--predict"], "--arch: unknown 'sm_91'; did you mean sm_9"),
        (["--arch", "sm_90"], "--arch goes with --predict"),
        (["--arch", "sm_90", "--predict", "--shapes", "5GF"], "did you mean 4GF?"),
        (["--arch", "sm_90", "--predict", "--shapes", "1x1x8x8x256"], "has 256 channels a head"),
        (["--predict", "--arch=sm_90", "--op=mhsa", "--shapes=4GF"], "is no shape of mhsa"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(arguments: list[str], words: str, capsys: Capture) -> None:
    assert main(["tune", *arguments]) == 2
    captured = capsys.readouterr()
    assert words.split("sm_9")[0] in captured.err
    assert captured.err.count("\n") == 1


def test_a_file_that_is_no_table_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "notes.json"
    file.write_text('{"my": "notes"}', "utf-8")
    with pytest.raises(command._Misuse, match="is there, and no table of configurations"):
        command.search([TOY], HERE, 1.0, file)
    assert file.read_text("utf-8") == '{"my": "notes"}'


@pytest.mark.parametrize("way", ["a_file", "read_only", "full"])
def test_a_place_that_cannot_be_written_is_named(
    found: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Before anything is searched, if that can be."""
    found(RuntimeError("searched"))
    file = tmp_path / "tuned.json"
    if way == "a_file":
        (tmp_path / "file").write_text("")
        file = tmp_path / "file" / "tuned.json"
    elif way == "read_only":
        monkeypatch.setattr(os, "access", lambda *_: False)
    else:
        found(outcome())

        def fails(*_: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(command._Misuse, match=r"tuned\.json cannot be written"):
        command.search([TOY], HERE, 1.0, file)


def test_nothing_is_kept_of_a_problem_after_which_the_gpu_is_lost(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever disagreed then disagreed for that."""
    monkeypatch.setattr(session, "_tuned", lambda problem, *_: outcome(problem, faster=False))
    lost = iter([False, True])
    monkeypatch.setattr(session, "_gpu_is_lost", lambda: next(lost))
    file = tmp_path / "tuned.json"
    problems = [TOY, PLAIN, TOY._replace(images=2)]
    assert command.search(problems, HERE, 100.0, file, variants=1) == 0
    assert [entry.problem for entry in read(file)] == [TOY]
    assert f"{PLAIN.name}: the GPU refuses all that follows" in capsys.readouterr().err


def test_predictions_need_no_gpu_and_write_nothing(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(session, "workers", lambda: 1)
    few = session.predict
    monkeypatch.setattr(session, "predict", lambda *a, **k: few(*a, **k, variants=1))
    arguments = ["--arch", "sm_80", "--predict", "--op", "mhsa", "--shapes", "1x1x17x16"]
    assert main(["tune", *arguments]) == 0
    out = capsys.readouterr().out
    assert "sm_80: times are predicted, not measured, and nothing is written" in out
    assert "mhsa forward half B1 H1 N17 d16, forward_tile: built-in " in out
    assert "mhsa backward half B1 H1 N17 d16, backward_key: built-in " in out
    assert "[2 compiled" in out
    assert not (tmp_path / "cache").exists()


def test_help_has_examples(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["tune", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "examples:\n  fastvit tune   " in out
    assert "--arch sm_90 --predict" in out


def test_nothing_beaten_is_told() -> None:
    assert report.table([outcome(faster=False)]) == (
        "1 problems measured; what is built in was not beaten."
    )


def test_one_sample_beats_nothing() -> None:
    alone = search.quantiles([1.0])
    assert not alone.q80 < 1e9
    assert not alone.q20 > 1e-9

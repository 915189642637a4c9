# SPDX-License-Identifier: Apache-2.0
"""A kernel's check that two processes do not survive counts as failed, for the next ones."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastvit
from fastvit import _native
from fastvit.ops import patch_embed_trust, trust
from fastvit.ops.trust import Candidate
from fastvit.testing import Agreement

#: A check that tells when it runs and then does what a kernel may do to its process.
SCRIPT = """
import os, signal, time
from fastvit.ops import trust

def check():
    print("running", flush=True)
    {deed}
    return []

trust.trusts(trust.Candidate("op/key", check), "auto")
"""


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path / "cache"))
    trust.forget()
    yield tmp_path / "cache"
    trust.forget()


def agrees() -> list[Agreement]:
    return [Agreement("out", 0.0, 0.0, 1.0)]


def not_run() -> list[Agreement]:
    pytest.fail("the check was repeated")


def other_process(deed: str) -> subprocess.Popen:
    """Another process, once its check is running."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(deed=deed)],
        stdout=subprocess.PIPE, text=True, cwd=Path(os.environ["FASTVIT_CACHE"]).parent,
    )  # fmt: skip
    assert process.stdout.readline() == "running\n"
    return process


@pytest.mark.parametrize(
    "deed",
    ["os.kill(os.getpid(), signal.SIGSEGV)", "os._exit(1)", "time.sleep(600)"],
    ids=["crash", "exit", "hang"],
)
def test_a_check_that_its_process_did_not_survive(deed, cache):
    for _ in range(2):
        process = other_process(deed)
        if "sleep" in deed:
            process.kill()
        process.wait()
        process.stdout.close()
        assert len(list(cache.glob("*.check"))) == 1
    words = rf"process {process.pid}, which began the check at 20\d\d-.*, ended before it did"
    with pytest.warns(RuntimeWarning, match=words) as caught:
        assert not trust.trusts(Candidate("op/key", not_run), "auto")
    assert len(caught) == 1
    # Once it was told it is a verdict like others.
    assert not list(cache.glob("*.check"))
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not trust.trusts(Candidate("op/key", not_run), "auto")
        with pytest.raises(RuntimeError, match=f"'native' was asked for.*process {process.pid},"):
            trust.trusts(Candidate("op/key", not_run), "native")
        trust.forget()
    (cache / "verdicts.json").unlink()
    assert trust.trusts(Candidate("op/key", agrees), "auto")


def test_a_process_that_is_killed_once_costs_no_kernel(cache):
    """As when its job is ended while it compiles."""
    process = other_process("time.sleep(600)")
    process.terminate()
    process.wait()
    process.stdout.close()
    assert len(list(cache.glob("*.check"))) == 1
    assert trust.trusts(Candidate("op/key", agrees), "auto")
    assert [file.name for file in cache.iterdir()] == ["verdicts.json"]


def leave_marker(cache: Path, key: str, **changes: object) -> None:
    """What a process leaves that a check ended twice."""
    cache.mkdir(exist_ok=True)
    marker = {"key": key, "pid": 17, "at": "2026-01-02 03:04:05", "tries": 2}
    marker["host"] = socket.gethostname()
    (cache / "left.check").write_text(json.dumps({**marker, **changes}))


def test_markers_of_other_hosts_say_nothing(cache):
    """Their locks may not be seen here."""
    leave_marker(cache, "op/key", host="another")
    assert trust.trusts(Candidate("op/key", agrees), "auto")


def test_a_verdict_that_came_meanwhile_counts(cache):
    leave_marker(cache, "op/key")
    assert "op/key" in trust._verdicts.load()
    (cache / "verdicts.json").write_text(json.dumps({"op/key": ""}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trust.trusts(Candidate("op/key", not_run), "auto")
    assert json.loads((cache / "verdicts.json").read_text()) == {"op/key": ""}


def test_a_check_that_is_running_elsewhere_says_nothing(cache):
    process = other_process("time.sleep(600)")
    try:
        assert len(list(cache.glob("*.check"))) == 1
        assert trust._verdicts.load() == {}
        assert trust.trusts(Candidate("op/key", agrees), "auto")
        # Its own marker is gone, the other's stands.
        assert len(list(cache.glob("*.check"))) == 1
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    # There is a verdict by now, and what was left behind changes nothing.
    trust.forget()
    assert trust.trusts(Candidate("op/key", not_run), "auto")
    assert [file.name for file in cache.iterdir()] == ["verdicts.json"]


def test_there_is_a_marker_while_a_check_runs_and_none_after(cache):
    found = []

    def check() -> list[Agreement]:
        found.extend(json.loads(file.read_text()) for file in cache.glob("*.check"))
        assert trust._died({}) == {}
        return agrees()

    assert trust.trusts(Candidate("op/key", check), "auto")
    [marker] = found
    assert marker["key"] == "op/key"
    assert marker["pid"] == os.getpid()
    assert [file.name for file in cache.iterdir()] == ["verdicts.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_no_marker(error, cache):
    def check() -> list[Agreement]:
        raise error("stopped")

    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            trust.trusts(Candidate("op/key", check), "auto")
    else:
        with pytest.warns(RuntimeWarning, match="RuntimeError: stopped"):
            assert not trust.trusts(Candidate("op/key", check), "auto")
    assert list(cache.iterdir()) == []


def test_an_error_that_breaks_the_gpu_for_the_process_is_remembered(cache, monkeypatch):
    def check() -> list[Agreement]:
        raise RuntimeError("an illegal memory access was encountered")

    def synchronize() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.warns(RuntimeWarning, match="illegal memory access"):
        trust.trusts(Candidate("op/key", check), "auto")
    trust.forget()
    assert not trust.trusts(Candidate("op/key", not_run), "auto")


def test_where_nothing_can_be_locked(cache, monkeypatch):
    def flock(*args: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(trust.fcntl, "flock", flock)
    assert trust.trusts(Candidate("op/key", agrees), "auto")
    assert [file.name for file in cache.iterdir()] == ["verdicts.json"]


def test_where_nothing_can_be_written(cache, monkeypatch):
    cache.write_text("")
    ran = []

    def check() -> list[Agreement]:
        ran.append(1)
        return agrees()

    for _ in range(2):
        assert trust.trusts(Candidate("op/key", check), "auto")
    assert ran == [1]


@pytest.mark.skipif(_native.reason() is not None, reason="needs the compiled module fastvit._C")
def test_info_shows_it_and_leaves_out_other_versions(cache):
    key = f"patch_embed/forward/bfloat16/float/mma/{patch_embed_trust.code()}/sm_80"
    leave_marker(cache, key)
    earlier = "patch_embed/forward/float16/float/mma/0123456789ab-cdef/nvcc-12.0/sm_80"
    (cache / "verdicts.json").write_text(json.dumps({earlier: "DISAGREES"}))
    found = fastvit.info()
    assert list(found.verdicts) == [key]
    assert f"{key} failed its check on this machine and is not used: process 17, which" in str(
        found
    )
    # Nobody was warned yet.
    with pytest.warns(RuntimeWarning, match="did not finish its check on this machine"):
        assert not trust.trusts(Candidate(key, not_run, "the portable CUDA kernel"), "auto")


def test_a_cache_that_may_only_be_read(cache, monkeypatch):
    """What others left there is heeded; what is found stays in memory."""
    leave_marker(cache, "op/key")

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(trust.tempfile, "mkstemp", refuse)
    with pytest.warns(RuntimeWarning, match="did not finish its check"):
        assert not trust.trusts(Candidate("op/key", not_run), "auto")
    assert not trust.trusts(Candidate("op/key", not_run), "auto")
    assert trust.trusts(Candidate("op/other", agrees), "auto")
    assert trust.trusts(Candidate("op/other", not_run), "auto")
    assert [file.name for file in cache.iterdir()] == ["left.check"]


def test_the_warning_says_what_serves(cache):
    with pytest.warns(RuntimeWarning, match="not used; the portable CUDA kernel serves instead"):
        trust.trusts(Candidate("op/key", list, "the portable CUDA kernel"), "auto")
    with pytest.warns(RuntimeWarning, match="not used; the torch backend serves instead"):
        trust.trusts(Candidate("op/other", list), "auto")

# SPDX-License-Identifier: Apache-2.0
"""``fastvit.info`` and the command: what a bug report needs, and what a check finds."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import subprocess
import sys

import pytest
import torch

import fastvit
from fastvit import __main__, _native, selfcheck
from fastvit._info import info


@pytest.fixture(scope="module")
def found():
    return info()


def test_the_function_is_public_and_stays_so():
    """A submodule of the same name replaced the function after its first use."""
    code = "import fastvit; fastvit.info(); print(type(fastvit.info()).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "Info\n", done.stderr


def test_versions_and_machine_are_those_of_this_process(found):
    assert found.versions["fastvit"] == fastvit.__version__
    assert found.versions["python"].startswith(platform.python_version())
    assert found.versions["torch"] == torch.__version__
    assert found.machine["threads"] == torch.get_num_threads()
    assert len(found.gpus) == torch.cuda.device_count()


def test_every_op_has_every_backend_with_a_reason_for_each_refusal(found):
    ops = ("gpsa", "mhsa", "conv_stem", "patch_embed")
    backends = ("reference", "torch", "triton", "native")
    rows = {(status.op, status.backend): status for status in found.backends}
    assert set(rows) == {(op, backend) for op in ops for backend in backends}
    assert all(rows[op, backend].available for op in ops for backend in ("reference", "torch"))
    assert all(bool(status.reason) != status.available for status in found.backends)


def test_the_text_holds_what_a_report_needs(found):
    text = str(found)
    build = _native.load().build_info()
    for needed in (
        f"fastvit      {fastvit.__version__}",
        torch.__version__,
        build["compiler"],
        f"commit {build['commit'] or 'unknown'}",
    ):
        assert needed in text
    for status in found.backends:
        if not status.available:
            assert f"  {status.op}, {status.backend}: {status.reason}" in text
    assert re.search(r"^gpsa +yes +yes", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) < 250


def test_cuda_code_is_reported_with_its_architectures(found):
    cuda = {"compiled": True, "error": None, "devices": []}
    devices = [
        {"name": "Card A", "capability": "9.0", "has_kernels": True, "error": None},
        {"name": "Card B", "capability": "7.0", "has_kernels": False, "error": "no kernel image"},
    ]
    built = {**(found.build or {}), "cuda_archs": ["80", "90a"], "cuda_ptx": ["80"], "nvcc": "13.0"}
    gpu = {"name": "Card A", "capability": "9.0", "memory": 80 * 2**30}

    with_gpus = dataclasses.replace(
        found, gpus=(gpu,), build=built, cuda={**cuda, "devices": devices}
    )
    without_driver = dataclasses.replace(found, build=built, cuda={**cuda, "error": "no driver"})
    cpu_only = dataclasses.replace(
        found, cuda={**cuda, "compiled": False, "error": "built without CUDA code"}
    )

    assert "gpu 0        Card A, 9.0, 80 GiB" in str(with_gpus)
    assert "sm 80 90a, PTX 80, nvcc 13.0" in str(with_gpus)
    assert "gpu 0 (Card A, 9.0): has code for it" in str(with_gpus)
    assert "gpu 1 (Card B, 7.0): no: no kernel image" in str(with_gpus)
    assert "cannot run here: no driver" in str(without_driver)
    assert "native cuda  built without CUDA code" in str(cpu_only)


def test_plain_data_survives_json(found):
    data = json.loads(json.dumps(found.to_dict()))
    assert data["versions"] == found.versions
    assert data["build"] == _native.load().build_info()
    assert len(data["backends"]) == len(found.backends)
    assert data["ok"] is True


def test_a_missing_module_is_explained_in_its_place(monkeypatch):
    monkeypatch.setattr(_native, "reason", lambda: "it is not built: build it")
    found = info()
    assert found.build is None
    assert found.to_dict()["native_problem"] == "it is not built: build it"
    assert "native       it is not built: build it" in str(found)


def test_a_check_compares_every_backend_that_runs(found):
    checked = info(check=True)
    assert checked.ok, str(checked)
    for status in checked.backends:
        expected = status.available and status.backend != "reference"
        assert (status.agrees is True) == expected
    gpsa = next(s for s in checked.backends if (s.op, s.backend) == ("gpsa", "torch"))
    assert any(line.startswith("output agrees: error ") for line in gpsa.checks)
    assert any(line.startswith("gradient of gating_param agrees") for line in gpsa.checks)
    assert "  gpsa, torch: output agrees: error " in str(checked)


@pytest.mark.parametrize("op", ["gpsa", "mhsa", "conv_stem", "patch_embed"])
def test_a_comparison_covers_output_and_gradients_by_a_tight_measure(op):
    """With the input shared between its runs, the gradients of x once passed with error 1."""
    results = list(selfcheck.compare(op, "torch"))
    assert {"output", "gradient of x"} < {result.name for result in results}
    assert all(result.reference_error < 1e-5 for result in results), results


def wrong_layer(name):
    layer = fastvit.MHSA(72, 3, qkv_bias=True, backend=name)
    if name == "torch":
        layer.register_forward_hook(lambda module, inputs, output: output * 1.0001)
    return layer


def failing_layer(name):
    if name == "torch":
        raise RuntimeError("the compiler of the kernel gave up")
    return fastvit.MHSA(72, 3, qkv_bias=True, backend=name)


@pytest.mark.parametrize(
    ("layer", "finding"),
    [
        pytest.param(wrong_layer, "output DISAGREES: error ", id="wrong by a ten-thousandth"),
        pytest.param(
            failing_layer,
            "FAILED with RuntimeError: the compiler of the kernel gave up",
            id="raises",
        ),
    ],
)
def test_a_wrong_backend_is_found_and_fails_the_command(monkeypatch, capsys, layer, finding):
    case = selfcheck._CASES["mhsa"]._replace(layer=layer)
    monkeypatch.setitem(selfcheck._CASES, "mhsa", case)
    assert __main__.main(["info", "--check"]) == 1
    assert f"  mhsa, torch: {finding}" in capsys.readouterr().out


def test_the_command_prints_text_or_json(capsys):
    assert __main__.main(["info"]) == 0
    assert capsys.readouterr().out.startswith(f"fastvit      {fastvit.__version__} in ")
    assert __main__.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["fastvit"] == fastvit.__version__


@pytest.mark.parametrize(
    ("arguments", "status", "stream", "words"),
    [
        (["--version"], 0, "out", f"fastvit {fastvit.__version__}"),
        (["--help"], 0, "out", "fastvit info --help"),
        (["info", "--help"], 0, "out", "fastvit info --check"),
        ([], 2, "err", "the following arguments are required: command"),
        (["infos"], 2, "err", "unknown command 'infos'; did you mean info?"),
        (["serve"], 2, "err", "unknown command 'serve'; known: info"),
    ],
    ids=["version", "help", "help of a command", "nothing", "misspelt", "unknown command"],
)
def test_the_command_explains_itself(capsys, arguments, status, stream, words):
    with pytest.raises(SystemExit) as exit_:
        __main__.main(arguments)
    assert exit_.value.code == status
    assert words in getattr(capsys.readouterr(), stream)

# SPDX-License-Identifier: Apache-2.0
"""That the sanitizers of ``make sanitize`` are on: each stops a process that commits a fault."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastvit import _native

EXPECTED = os.environ.get("FASTVIT_TEST_SANITIZERS", "").split()
sanitized = pytest.mark.skipif(not EXPECTED, reason="only under `make sanitize`")


def test_the_module_was_built_with_what_is_asked_for():
    """Also that of a usual build: nothing of a sanitizer may be in a module that is installed."""
    module = _native.load()
    assert module.build_info()["sanitizers"] == EXPECTED
    assert [name for name in dir(module) if "probe" in name] == (
        ["probe_add", "probe_read_byte"] if EXPECTED else []
    )


@sanitized
def test_what_is_no_fault_passes():
    module = _native.load()
    tensor = torch.arange(64, dtype=torch.uint8)
    assert module.probe_read_byte(tensor.data_ptr() + 63) == 63
    assert module.probe_add(2**31 - 2, 1) == 2**31 - 1


FAULTS = {
    "past the end of a tensor": (
        "t = torch.empty(64, dtype=torch.uint8); m.probe_read_byte(t.data_ptr() + 64)",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "a tensor that is gone": (
        "a = torch.empty(64, dtype=torch.uint8).data_ptr(); m.probe_read_byte(a)",
        "AddressSanitizer: heap-use-after-free",
    ),
    "past the end of a Python object": (
        "m.probe_read_byte(id(s) + sys.getsizeof(s))",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "overflow": ("m.probe_add(2**31 - 1, 1)", "runtime error: signed integer overflow"),
}


@sanitized
@pytest.mark.parametrize(("fault", "report"), FAULTS.values(), ids=FAULTS)
def test_a_fault_ends_the_process_with_a_report(fault, report, tmp_path):
    code = (
        "import sys, torch; from fastvit import _native; m = _native.load(); s = bytes(64);"
        f"print('before', flush=True); {fault}; print('after')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        # From elsewhere: a `fastvit` in the current folder would be imported instead.
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "before\n"
    assert done.returncode != 0
    assert report in done.stderr

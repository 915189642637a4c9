# SPDX-License-Identifier: Apache-2.0
"""The tables of ``bench/resources.py``, and the tool against what is installed here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
TABLES = BENCH / "results" / "resources"
VERSIONS = ("3.6", "3.9")
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
# KiB that a block may opt in to; written down here a second time on purpose.
SHARED = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
#: Kernels of the stem without products.
WITHOUT_PRODUCTS = (
    "stem_statistics", "stem_affine", "stem_raw_gradient", "stem_weight_sum", "stem_norm_gradient",
)  # fmt: skip
MATRIX = {"sm_90": "wgmma", "sm_100": "tcgen05.mma"}

pytestmark = pytest.mark.skipif(
    not (BENCH / "resources.py").exists(), reason="bench/ is not beside tests/"
)


def load(name: str) -> ModuleType:
    """A module of bench/, which is no package; it needs neither torch nor Triton."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses and named tuples look for their annotations.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


model = load("resource_model")


def table(version: str) -> list[dict]:
    return json.loads((TABLES / f"triton-{version}.json").read_text("utf-8"))["rows"]


def is_stem(row: dict) -> bool:
    return row["kernel"].startswith("stem_")


def installed() -> str:
    """Triton's minor version; skips without one that has a table."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    version = ".".join(triton.__version__.split(".")[:2])
    if not (TABLES / f"triton-{version}.json").exists():
        pytest.skip(f"no table of resources for Triton {version}")
    return version


def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    # This process interprets kernels where there is no GPU; the tool compiles them.
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, BENCH / "resources.py", *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_spills(version):
    """No stack, no loads and stores of registers, and shared memory that a block can have."""
    for row in table(version):
        assert row["stack"] == 0, row
        assert row["spills"] == 0, row
        assert row["shared"] <= SHARED[row["arch"]] * 1024, row
        assert row["blocks_per_sm"] >= 1, row


@pytest.mark.parametrize("version", VERSIONS)
def test_half_precision_uses_the_matrix_units(version):
    """Attention's kernels and the stem's use the instructions of Hopper and of data-centre
    Blackwell.
    """
    seen = set()
    for row in table(version):
        half = row["case"].split()[0] in ("float16", "bfloat16")
        multiplies = row["kernel"].startswith(("forward_", "backward_", "dropout_", "stem_"))
        if half and multiplies and row["kernel"] not in WITHOUT_PRODUCTS and row["arch"] in MATRIX:
            assert MATRIX[row["arch"]] in row["instruction"], row
            seen.add(row["kernel"])
    assert seen >= {
        "forward_tile",
        "forward_stream",
        "backward_tile",
        "backward_query",
        "backward_key",
        "dropout_forward",
        "dropout_query",
        "dropout_key",
        "stem_pair",
        "stem_first",
        "stem_conv",
        "stem_tokens",
        "stem_input_gradient",
        "stem_weight_gradient",
        "stem_image_gradient",
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_tf32_uses_the_matrix_units_in_the_stem(version):
    rows = [r for r in table(version) if is_stem(r) and r["case"].startswith("tf32")]
    assert {row["arch"] for row in rows} == set(ARCHITECTURES)
    for row in rows:
        assert MATRIX.get(row["arch"], "mma.sync") in row["instruction"], row


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cases_cover_what_is_supported(version, arch):
    """Dtypes, heads, numbers of tokens, plain attention and GPSA, on every architecture."""
    rows = [row for row in table(version) if row["arch"] == arch and not is_stem(row)]
    words = [row["case"].split() for row in rows]
    assert {w[0] for w in words} == {"float16", "bfloat16", "tf32", "ieee"}
    assert {w[4] for w in words} == {f"d{d}" for d in (16, 40, 48, 64, 80, 112, 128)}
    grids = {"7x7", "14x14", "16x16", "24x24", "64x64", "7x28", "N197"}
    assert {w[3] for w in words} == grids
    assert {"B1", "B256"} <= {w[1] for w in words}
    assert {row["direction"] for row in rows} == {"forward", "backward"}
    assert any(case.endswith(" dropout") for case in (row["case"] for row in rows))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cases_cover_the_stem(version, arch):
    """The published stems' layers by both strides, training and inference, uint8 and float, and
    their gradients.
    """
    rows = [row for row in table(version) if row["arch"] == arch and is_stem(row)]
    cases: dict[str, set[str]] = {}
    for row in rows:
        cases.setdefault(row["kernel"], set()).add(row["case"])
    words = {w for found in cases.values() for case in found for w in case.split()}
    assert {"float16", "bfloat16", "tf32", "ieee", "B1", "B256", "uint8", "train"} <= words
    pairs = {w for case in cases["stem_pair"] for w in case.split()}
    assert {"c3-24-48", "c3-48-96", "c3-64-128", "s2-2"} <= pairs
    convolutions = {w for case in cases["stem_conv"] for w in case.split()}
    assert {"c96-192", "c128-128", "c256-512", "s1", "s2"} <= convolutions
    for kernel in ("stem_input_gradient", "stem_weight_gradient"):
        gradients = {w for case in cases[kernel] for w in case.split()}
        # The last one is the 1x1.
        assert {"c24-48", "c48-96", "c96-192", "c128-128", "s1", "s2", "c384-384"} <= gradients
    images = {w for case in cases["stem_image_gradient"] for w in case.split()}
    assert {"c3-24", "c3-48", "c3-64", "uint8", "train", "tf32", "ieee"} <= images


def test_every_kernel_is_compiled_in_few_pairs():
    """All kernels, both versions the same pairs, and no more than a check has time for."""
    pairs = {
        version: {(r["kernel"], r["direction"], r["case"]) for r in table(version)}
        for version in VERSIONS
    }
    assert pairs["3.6"] == pairs["3.9"]
    stem = {pair for pair in pairs["3.9"] if pair[0].startswith("stem_")}
    backward = {pair for pair in stem if pair[1] == "backward"}
    assert len(pairs["3.9"] - stem) <= 48
    assert len(stem - backward) <= 40
    assert len(backward) <= 40
    kernels = {path.stem for path in (ROOT / "kernels").glob("*.py")}
    launched = {kernel for kernel, _, _ in pairs["3.9"]}
    # Files of more than one kernel, and those without.
    several = {
        "position_factors", "factor_gradient", "parameter_gradient", "stem_affine",
        "stem_weight_sum", "stem_norm_gradient",
    }  # fmt: skip
    assert several <= launched
    without = {
        "__init__", "blocks", "configs", "dropout", "stem_blocks", "stem_configs",
        "stem_gradient_blocks", "stem_gradient_configs", "tuned",
    }  # fmt: skip
    assert launched - several == kernels - without - {"position_gradient", "stem_sums"}


def test_what_is_installed_compiles_to_the_table():
    """Changed pairs and a sample of the others: no spills, and the numbers of the table."""
    version = installed()
    done = tool("--check")
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"Triton {version}" in done.stdout
    assert "no spills" in done.stdout


def test_check_reports_a_difference(tmp_path):
    """A row that differs fails the check with what was expected, what came and what to do."""
    version = installed()
    text = json.loads((TABLES / f"triton-{version}.json").read_text("utf-8"))
    row = next(
        r for r in text["rows"] if r["arch"] == "sm_90" and r["kernel"] == "position_factors"
    )
    came = row["registers"]
    row["registers"], row["hash"] = came + 8, "0" * 12
    (tmp_path / f"triton-{version}.json").write_text(json.dumps(text), "utf-8")
    done = tool("--check", "--arch=sm_90", "--kernel=position_factors", f"--table={tmp_path}")
    assert done.returncode == 1
    assert f"expected registers {came + 8}, but came registers {came}" in done.stderr
    assert "python bench/resources.py --write" in done.stderr


@pytest.mark.parametrize("name", ["predicted_us", "bytes", "blocks_per_sm"])
def test_check_reports_what_does_not_come_from_the_compiler(tmp_path, name):
    """A predicted time, or what it is computed from, is another than the table has it, although
    the sources and with them the hash are the same.
    """
    version = installed()
    text = json.loads((TABLES / f"triton-{version}.json").read_text("utf-8"))
    row = next(r for r in text["rows"] if r["arch"] == "sm_90" and r["kernel"] == "kronecker")
    came = row[name]
    row[name] = came - 1 if name == "blocks_per_sm" else round(0.9 * came, 3)
    (tmp_path / f"triton-{version}.json").write_text(json.dumps(text), "utf-8")
    done = tool("--check", "--arch=sm_90", "--kernel=kronecker", f"--table={tmp_path}")
    assert done.returncode == 1
    assert f"expected {name} {row[name]}, but came {name} {came};" in done.stderr


def test_check_reports_a_missing_row(tmp_path):
    """A pair without a row fails, and so does a folder without a table."""
    version = installed()
    arguments = ("--check", "--arch=sm_90", "--kernel=position_factors", f"--table={tmp_path}")
    done = tool(*arguments)
    assert done.returncode == 1
    assert f"no table for Triton {version}" in done.stderr
    (tmp_path / f"triton-{version}.json").write_text('{"rows": []}', "utf-8")
    done = tool(*arguments)
    assert done.returncode == 1
    assert "not in the table" in done.stderr


def test_work_of_the_stem_by_hand():
    """The first two layers of 4GF for two images of 30 x 22 pixels."""
    arguments = {
        "x": SimpleNamespace(shape=(2, 3, 30, 22), dtype="uint8"),
        "weight1": SimpleNamespace(shape=(48, 3, 3, 3), dtype="bfloat16"),
        "weight2": SimpleNamespace(shape=(96, 48, 3, 3), dtype="bfloat16"),
        "out": SimpleNamespace(shape=(2, 96, 8, 6), dtype="bfloat16"),
        "B": 2,
        "OH": 8,
        "OW": 6,
        "OUT": 96,
        "K": 32,
        "ROWS": 64,
        "OUT_CHUNKS": (64, 32),
        "C1_CHUNKS": (32, 16),
    }
    work = model.work("stem_pair", arguments)
    assert work.bytes == 2 * 3 * 30 * 22 + 2 * (48 * 27 + 96 * 48 * 9 + 2 * 96 * 8 * 6)
    # Two tiles of 64 positions; at each of nine taps 27 values, padded to 32, become 48 channels.
    assert work.flops == 2 * 128 * 9 * (32 * 48 + 48 * 96)
    assert work.exponentials == 0


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "columns", "blocks"),
    [
        # 32 * 128 = 4096 registers a warp: 16 warps, so 4 blocks of 4; shared memory has room for
        # 228 / (40 + 1) = 5.
        ("sm_90", 128, 40 * 1024, 4, 0, 4),
        # Shared memory decides: 100 / (49 + 1).
        ("sm_89", 64, 49 * 1024, 4, 0, 2),
        # 8192 a warp at 255 registers: 8 warps, a single block of 8.
        ("sm_80", 255, 1024, 8, 0, 1),
        # 72 registers are 2304 = 9 * 256 a warp, 28 warps; 73 are 2560, 25 warps, of which 24
        # can be handed out.
        ("sm_90", 72, 0, 4, 0, 7),
        ("sm_90", 73, 0, 4, 0, 6),
        # Tensor memory: 512 / 256 columns.
        ("sm_100", 64, 1024, 4, 256, 2),
        # Warps, and more shared memory than a block may have.
        ("sm_120", 16, 0, 8, 0, 6),
        ("sm_120", 16, 100 * 1024, 8, 0, 0),
    ],
)
def test_occupancy_by_hand(arch, registers, shared, warps, columns, blocks):
    found = model.blocks_per_multiprocessor(arch, registers, shared, warps, columns)
    assert found == blocks


def test_work_by_hand():
    """GPSA's forward of 2 images, 3 heads, 196 tokens and 48 channels in half precision."""
    heads = SimpleNamespace(shape=(2, 3, 196, 48), dtype="bfloat16")
    arguments = {
        **dict.fromkeys(("q", "k", "v", "out"), heads),
        "table": SimpleNamespace(shape=(3, 196, 256), dtype="bfloat16"),
        "N": 196,
        "ROWS": 64,
        "KEYS": (128, 64, 16),
        "D_CHUNKS": (32, 16),
        "GATED": True,
    }
    work = model.work("forward_tile", arguments)
    # Four tensors and the table, two bytes each.
    assert work.bytes == 4 * 2 * 3 * 196 * 48 * 2 + 3 * 196 * 256 * 2
    # 4 blocks of 64 queries by 208 keys, two products of 48 channels.
    assert work.flops == 2 * 3 * 256 * 208 * 48 * 2 * 2
    assert work.exponentials == 2 * 3 * 256 * 208
    # 0.75 MB at 4.3 TB/s are 0.175 µs, which is more than 61 MFLOP at 790 TFLOP/s are (0.08) and
    # 319488 exponentials at 16 * 132 * 1.98 a ns (0.08); a single block adds them up.
    assert model.floor("sm_90", work) == pytest.approx(0.1750, abs=0.0001)
    together = model.predict("sm_90", "half", "wgmma", 2, work)
    assert together == pytest.approx(0.1750, abs=0.0001)
    alone = model.predict("sm_90", "half", "wgmma", 1, work)
    assert alone == pytest.approx(0.1750 + 0.0776 + 0.0764, abs=0.0003)


def test_work_with_a_running_softmax():
    """Plain attention by backward_query: 5 products, the exponentials twice, and its sums."""
    heads = SimpleNamespace(shape=(1, 2, 100, 64), dtype="float16")
    arguments = {
        **dict.fromkeys(("grad", "q", "k", "v", "dq"), heads),
        "statistics": SimpleNamespace(shape=(2, 1, 2, 100), dtype="float32"),
        "content": None,
        "N": 100,
        "ROWS": 64,
        "KEYS": 32,
        "D_CHUNKS": (64,),
        "GATED": False,
    }
    assert model.work("backward_query", arguments) == (
        5 * 2 * 100 * 64 * 2 + 2 * 2 * 100 * 4,
        2 * 5 * 2 * 128 * 128 * 64,
        2 * 2 * 128 * 128,
    )


def test_work_of_the_stems_gradients_by_hand():
    """Two images through a convolution of 48 to 96 channels, 15 x 11 pixels to 8 x 6."""
    above = SimpleNamespace(shape=(2, 96, 8, 6), dtype="bfloat16")
    below = SimpleNamespace(shape=(2, 48, 15, 11), dtype="bfloat16")
    sizes = {"B": 2, "H": 15, "W": 11, "OH": 8, "OW": 6, "C": 48, "OUT": 96, "STRIDE": 2}
    inputs = {
        **sizes,
        "grad": above,
        "weight": SimpleNamespace(shape=(96, 48, 3, 3), dtype="bfloat16"),
        "below": below,
        "dx": below,
        "TAPS": 9,
        "ROWS": 64,
        "WIDTH": 64,
        "DEPTH": 32,
    }
    work = model.work("stem_input_gradient", inputs)
    assert work.bytes == 2 * (2 * 96 * 48 + 96 * 48 * 9 + 2 * 2 * 48 * 15 * 11)
    # Pixels of four kinds, 8 x 6 of an image at the most, in two tiles of each kind; by all kinds
    # together nine taps.
    assert work.flops == 2 * 128 * 9 * 64 * 96
    weights = {
        **sizes,
        "grad": above,
        "below": below,
        "TAPS": 9,
        "ROWS": 32,
        "INS": 64,
        "OUTS": 128,
    }
    work = model.work("stem_weight_gradient", weights)
    assert work.bytes == 2 * (2 * 96 * 48 + 2 * 48 * 15 * 11)
    assert work.flops == 2 * 96 * 9 * 64 * 128

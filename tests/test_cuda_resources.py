# SPDX-License-Identifier: Apache-2.0
"""The tables and rules of ``bench/cuda_resources.py``, and the tool against the nvcc here."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
TABLES = sorted((BENCH / "results" / "resources").glob("nvcc-*.json"))

if not (BENCH / "cuda_resources.py").exists():
    pytest.skip("bench/ is not beside tests/", allow_module_level=True)


def load(name: str) -> ModuleType:
    """A module of bench/, which is no package; it needs no torch."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where the others import it from.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


load("resource_model")
report = load("cuda_resource_report")
build = load("cuda_resource_build")
resources = load("cuda_resources")

FORWARD = (
    "_ZN7fastvit18patch_embed_kernelILNS_10ArithmeticE1EhNS_11ForwardTileILi128ELi128ELi2ELi4ELi2E"
    "EEEEvNS_11ForwardArgsE"
)
FOLD = "_ZN7fastvit18weight_fold_kernelINS_4HalfEEEvNS_14WeightFoldArgsE"
ENUM = "enum class Arithmetic : int32_t { kHalf, kBfloat16, kTf32, kIeee };"

# As nvcc 13.0 writes it; the first of the two with a function that was not inlined.
LOG = f"""ptxas info    : 0 bytes gmem, 32 bytes cmem[3]
ptxas info    : Compiling entry function '{FORWARD}' for 'sm_80'
ptxas info    : Function properties for {FORWARD}
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for _Z6helperi
    8 bytes stack frame, 4 bytes spill stores, 2 bytes spill loads
ptxas info    : Used 127 registers, used 1 barriers, 24 bytes cumulative stack size, 64 bytes \
smem, 2792 bytes cmem[0], 8 bytes cmem[2]
ptxas info    : Compile time = 25.641 ms
ptxas info    : Compiling entry function '{FOLD}' for 'sm_80'
ptxas info    : Function properties for {FOLD}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 27 registers, used 0 barriers
ptxas info    : Compile time = 5.1 ms
"""
REMARK = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
    f"serialized due to insufficient register resources in function '{FORWARD}'"
)
PTX = f"""
.visible .entry {FORWARD}(
\t.param .align 8 .b8 {FORWARD}_param_0[2208]
)
.maxntid 128, 2, 1
.minnctapersm 2
{{
\t// begin inline asm
{{
\t.reg .pred p;
}}
\tcp.async.cg.shared.global [%r1], [%rd2], 16, %r3;
\tldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r1, %r2, %r3, %r4}}, [%r5];
\tmma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%f1}}, {{%r1}}, {{%r2}}, {{%f1}};
}}
}}
.func helper()
{{
\twgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16;
}}
\t// .globl\t{FOLD}
.visible .entry {FOLD}(
\t.param .align 8 .b8 {FOLD}_param_0[2208]
)
.maxntid 256, 1, 1
{{
\twmma.mma.sync.aligned.row.col.m16n16k16.f32.f32;
\tcp.async.wait_group 0;
}}
"""


def row(**changes) -> dict:
    """That of a kernel without a fault."""
    usual = {
        "arch": "sm_80",
        "kernel": "patch_embed_kernel<bfloat16, bfloat16, 128x128>",
        "file": "patch_embed_forward.cu",
        "instructions": "mma.sync + ldmatrix + cp.async",
        "registers": 128,
        "stack": 0,
        "spill_stores": 0,
        "spill_loads": 0,
        "remarks": [],
        "hash": "0" * 12,
    }
    return {**usual, **changes}


def test_the_log_is_read():
    assert report.parse_log(LOG) == {
        FORWARD: {
            "registers": 127,
            "stack": 24,
            "spill_stores": 16,
            "spill_loads": 10,
            "barriers": 1,
            "shared": 64,
            "constant": 2800,
        },
        FOLD: {
            "registers": 27,
            "stack": 0,
            "spill_stores": 0,
            "spill_loads": 0,
            "barriers": 0,
            "shared": 0,
            "constant": None,
        },
    }
    assert report.parse_remarks(LOG) == []
    assert report.parse_remarks(f"{LOG}{REMARK}\n") == [REMARK]
    with pytest.raises(ValueError, match="no registers or no stack of _Z1k"):
        report.parse_log("ptxas info : Compiling entry function '_Z1k' for 'sm_80'\n")


def test_ptx_is_read():
    """Instructions of one kernel are not another's, and similar ones are none."""
    assert report.parse_ptx(PTX) == {
        FORWARD: {
            "threads": 256,
            "least_blocks": 2,
            "instructions": "mma.sync + ldmatrix + cp.async",
        },
        FOLD: {"threads": 256, "least_blocks": 1, "instructions": "none"},
    }
    hopper = "wgmma.mma_async.sync.aligned.m64n128k16 cp.async.bulk.tensor.2d.shared::cluster"
    ptx = f".entry _Z1k(\n)\n.maxntid 384\n{{\n{hopper}\n}}\n"
    assert report.parse_ptx(ptx)["_Z1k"]["instructions"] == "wgmma + TMA"
    ptx = ".weak .entry _Z1k(\n)\n.maxntid 384, 1, 1\n{\n\n// %bb.0:\n\tret;\n\n}\n"
    assert report.parse_ptx(ptx)["_Z1k"]["instructions"] == report.EMPTY
    with pytest.raises(ValueError, match="no launch bounds: _Z1k"):
        report.parse_ptx(".entry _Z1k(\n)\n{\n}\n")


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        (
            "void fastvit::patch_embed_kernel<(fastvit::Arithmetic)1, unsigned char, "
            "fastvit::ForwardTile<128, 128, 2, 4, 2> >(fastvit::ForwardArgs)",
            "patch_embed_kernel<bfloat16, uint8, 128x128>",
        ),
        (
            "void fastvit::weight_gradient_kernel<(fastvit::Arithmetic)3, float>"
            "(fastvit::WeightGradientArgs)",
            "weight_gradient_kernel<ieee, float>",
        ),
        (
            "void fastvit::weight_fold_kernel<fastvit::Half>(fastvit::A)",
            "weight_fold_kernel<float16>",
        ),
        ("void fastvit::k<fastvit::HopperTile<192> >(fastvit::A)", "k<192>"),
        ("fastvit::plain(fastvit::A, int)", "plain"),
    ],
)
def test_names_are_short(demangled, short):
    enums = report.enumerators(ENUM)
    assert enums == {"Arithmetic": ["Half", "Bfloat16", "Tf32", "Ieee"]}
    assert report.short_name(demangled, enums) == short


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt (of binutils) is not on PATH")
def test_rows_are_put_together():
    sources = build.Sources(("a.cu",), ("80",), ENUM)
    rows = build.rows_of(f"{LOG}{REMARK}\n", PTX, "a.cu", "80", sources)
    assert [(r["kernel"], r["registers"], r["threads"]) for r in rows] == [
        ("patch_embed_kernel<bfloat16, uint8, 128x128>", 127, 256),
        ("weight_fold_kernel<float16>", 27, 256),
    ]
    assert [r["remarks"] for r in rows] == [[REMARK], []]
    # 65536 / (256 * 2), and 65536 / (128 * 256).
    assert (rows[0]["most_registers"], rows[0]["blocks"]) == (128, 2)
    # At most 255, and 64 warps of 8.
    assert (rows[1]["most_registers"], rows[1]["blocks"]) == (255, 8)
    assert build.rows_of(LOG, PTX, "a.cu", "86", sources)[1]["blocks"] == 6
    with pytest.raises(SystemExit, match="other kernels"):
        build.rows_of(LOG, PTX.partition("\t// .globl")[0], "a.cu", "80", sources)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stack": 16}, "spills, 128 registers, 16 bytes of stack"),
        ({"spill_stores": 4}, "4 stored, 0 loaded"),
        ({"spill_loads": 4}, "0 stored, 4 loaded"),
        ({"remarks": [REMARK]}, "Potential Performance Loss"),
        ({"instructions": "ldmatrix + cp.async"}, "expected mma.sync, got ldmatrix"),
        ({"instructions": "mma.sync"}, "expected cp.async, got mma.sync"),
        ({"kernel": "weight_gradient_kernel<tf32, float>", "instructions": "none"}, "expected cp"),
    ],
)
def test_a_fault_is_found(changes, words):
    assert resources.faults([row()], "") == []
    assert any(words in found for found in resources.faults([row(), row(**changes)], ""))


def test_what_needs_no_matrix_units_is_no_fault():
    names = ("patch_embed_kernel<ieee, float, 64x64>", "weight_gradient_sum_kernel<float>")
    rows = [row(kernel=name, instructions="none") for name in names]
    assert resources.faults(rows, "") == []


def test_instantiations_are_counted_by_architecture():
    """24 on each, without the passes before and after and what is empty."""
    rows = [row(arch=arch) for arch in ("sm_80", "sm_90a") for _ in range(24)]
    rows += [row(kernel=f"{name}_kernel<float>") for name in ("weight_fold", "weight_gradient_sum")]
    rows.append(row(kernel="patch_embed_hopper_kernel<float16>", instructions=report.EMPTY))
    assert resources.faults(rows, "") == []
    rows.append(row(arch="sm_90a", kernel="weight_gradient_kernel<bfloat16, uint8>"))
    assert resources.faults(rows, "") == ["sm_90a: 25 instantiations, expected at most 24"]


def test_hopper_needs_its_instructions_where_sources_have_them():
    text = 'asm("wgmma.mma_async.sync.aligned");'
    rows = [row(), row(arch="sm_90a")]
    assert resources.faults(rows, "") == []
    assert resources.faults(rows[:1], text) == []
    missing = ["sm_90a: no kernel has TMA", "sm_90a: no kernel has wgmma"]
    assert resources.faults(rows, text) == missing
    # In different kernels, whatever their names.
    rows += [row(arch="sm_90a", kernel=x, instructions=x) for x in ("wgmma", "TMA")]
    assert resources.faults(rows, text) == []


def test_sources_are_found(tmp_path):
    """With what they include, whatever comments say."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (tmp_path / "CMakeLists.txt").write_text("set(default_cuda_archs 80 90a)\n")
    (folder / "b.cu").write_text('#include "b.cuh"\n#include <c.h>\n')
    (folder / "a.cu").write_text('#include "absent.h"\nint a;\n')
    (folder / "b.cuh").write_text("  // Why.\nint b;  // There.\n")
    (folder / "c.h").write_text("int c;\n")
    first = build.read_sources(tmp_path)
    assert (first.files, first.archs) == (("a.cu", "b.cu"), ("80", "90a"))
    assert "int b;" in first.text
    assert "int c;" not in first.text
    assert "Why" not in first.text
    assert first.sample in first.archs
    (folder / "b.cuh").write_text("// Another reason.\n\nint b;  // There.\n")
    assert build.read_sources(tmp_path).hash == first.hash
    (folder / "b.cuh").write_text("int b = 1;\n")
    assert build.read_sources(tmp_path).hash != first.hash


@pytest.fixture
def compiler():
    return build.Compiler("nvcc", "13.0.88", frozenset({"80", "90"}))


@pytest.fixture
def checked(compiler, monkeypatch, tmp_path):
    """Checks a table of these rows against what a made-up compiler makes."""
    sources = build.Sources(("a.cu",), ("80", "90a"), "")
    made = [row(arch=arch, hash=sources.hash) for arch in ("sm_80", "sm_90a")]
    monkeypatch.setattr(
        resources, "compile_all", lambda c, s, archs, jobs: [made[s.archs.index(a)] for a in archs]
    )

    def check(version="13.0.88", **changes) -> list[str]:
        rows = [{**made[0], **changes}, made[1]]
        text = json.dumps({"nvcc": version, "rows": rows})
        (tmp_path / compiler.table).write_text(text)
        return resources.check(compiler, sources, ["80", "90a"], ["80"], tmp_path, 1)

    return check


def test_check_accepts_what_is_the_same(checked):
    assert checked() == []


def test_check_reports_changed_sources(checked):
    (found,) = checked(hash="f" * 12)
    assert "the table is of sources ffffffffffff" in found
    assert "python bench/cuda_resources.py --write" in found


def test_check_reports_a_missing_architecture(checked):
    (found,) = checked(arch="sm_90a")
    assert "the table has sm_90a, expected sm_80, sm_90a" in found


def test_check_reports_a_difference(checked):
    (found,) = checked(registers=136)
    assert "expected registers 136, got 128" in found
    found = checked(kernel="another")
    assert any("another: in the table only" in words for words in found)
    assert any("128x128>: not in the table" in words for words in found)


def test_check_with_another_compiler_asks_for_the_rules_only(checked, capsys):
    assert checked(version="13.0.48", registers=136, hash="f" * 12) == []
    assert "only the rules are checked" in capsys.readouterr().out


def test_a_table_is_written_and_kept_in_part(compiler, checked, monkeypatch, tmp_path):
    checked()
    sources = build.Sources(("a.cu",), ("80", "90a"), "")
    full = {"threads": 256, "most_registers": 128, "blocks": 2}
    path = tmp_path / compiler.table
    stored = [{**r, **full} for r in json.loads(path.read_text())["rows"]]
    path.write_text(json.dumps({"nvcc": "13.0.88", "rows": stored}))
    made = [{**stored[0], "registers": 96}]
    monkeypatch.setattr(resources, "compile_all", lambda *arguments: made)
    assert resources.write(compiler, sources, ["80"], tmp_path, 1) == []
    version, rows = resources.read(path)
    assert version == "13.0.88"
    assert [(r["arch"], r["registers"]) for r in rows] == [("sm_80", 96), ("sm_90a", 128)]
    assert "| 96 (2) | 128 (2) | mma.sync" in (tmp_path / "cuda.md").read_text("utf-8")


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_kept_table_has_no_fault(path):
    """Whether or not there is an nvcc, and of whatever sources it is."""
    rows = resources.read(path)[1]
    assert resources.faults(rows, "") == []
    cmake = (ROOT / "CMakeLists.txt").read_text("utf-8")
    archs = re.search(r"default_cuda_archs ([^)]+)", cmake)[1].split()
    assert {r["arch"] for r in rows} == {f"sm_{arch}" for arch in archs}


@pytest.mark.skipif(build.find_compiler() is None, reason="no nvcc was found")
def test_the_nvcc_here_compiles_to_the_table():
    command = [sys.executable, BENCH / "cuda_resources.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "no spills" in done.stdout

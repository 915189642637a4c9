# SPDX-License-Identifier: Apache-2.0
"""Figures, tables and files of the benchmark, from results made up here."""

# ruff: noqa: E501, since the tables below stand as they are printed
from __future__ import annotations

import dataclasses
import json
import os
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from fastvit.benchmark.machine import Machine, this_machine
from fastvit.benchmark.report import Run, markdown_report, text_report, write_json, write_report
from fastvit.benchmark.result import Result, Samples, minutes_per_epoch
from fastvit.benchmark.rows import select_rows
from fastvit.benchmark.table import citation_table, epoch_table, inference_table
from fastvit.benchmark.text import notes
from fastvit.testing import Agreement

MACHINE = Machine(
    device="cpu",
    cpu="A CPU, 2 cores",
    threads=2,
    gpu=None,
    cuda=None,
    tf32=None,
    python="3.11.7",
    platform="Linux",
    versions={"fastvit": "0.1.0", "torch": "2.15.0"},
    commit="0123456789ab",
)


def result(name, reference=None, ours=None, **kwargs):
    (row,) = select_rows([name])
    return Result(
        row,
        batch=kwargs.pop("batch", 2),
        dtype="float32",
        counted=row.verified,
        reference=Samples(*reference) if reference else Samples(),
        fastvit=Samples(*ours) if ours else Samples(),
        **kwargs,
    )


@pytest.fixture
def run():
    agreed = [Agreement("output in eval()", 4e-7, 5e-7, 1.2e-6)]
    wrong = Agreement("gradient of the images", 3e-2, 1e-6, 2.2e-6)
    failed = result("DeiT-B", batch=1, agreements=[wrong])
    failed.fail(str(wrong))
    results = [
        result(
            "ConViT-S",
            ([0.8, 0.4, 0.5], [0.02, 0.02, 0.5], [0.1, 0.2, 0.1]),
            ([0.2, 0.2, 0.3], [0.02, 0.02, 0.02], [0.04, 0.05, 0.06]),
            agreements=agreed,
        ),
        failed,
        result("RegNetZ-4GF", ([0.001], [0.0], [0.0005])),
        result(
            "ViT_C-36GF",
            ([4.0, 4.0], [1.0, 1.0], [1.0, 1.0]),
            ([8.0, 8.0], [1.0, 1.0], [2.0, 2.0]),
            batch=1,
            agreements=agreed,
        ),
    ]
    return Run(MACHINE, "float32", results)


class TestFigures:
    def test_minutes_follow_the_formula(self):
        """One epoch is 1,281,167 images; the optimiser steps once per batch of the paper."""
        minutes = minutes_per_epoch(0.6, 0.0, batch=2, batch_per_gpu=128)
        assert minutes == pytest.approx(1_281_167 * 0.3 / 60)
        minutes = minutes_per_epoch(0.0, 0.6, batch=2, batch_per_gpu=128)
        assert minutes == pytest.approx(1_281_167 / 128 * 0.6 / 60)
        both = minutes_per_epoch(0.6, 0.6, batch=2, batch_per_gpu=128)
        assert both == pytest.approx(1_281_167 / 60 * (0.6 / 2 + 0.6 / 128))

    def test_figures_are_medians(self, run):
        convit = run.results[0]
        assert convit.minutes_reference == minutes_per_epoch(0.5, 0.02, batch=2, batch_per_gpu=128)
        assert convit.minutes_fastvit == minutes_per_epoch(0.2, 0.02, batch=2, batch_per_gpu=128)
        assert convit.speedup == convit.minutes_reference / convit.minutes_fastvit
        assert convit.images_per_s_reference == 20.0
        assert convit.images_per_s_fastvit == 40.0
        assert convit.inference_speedup == 2.0

    def test_what_was_not_measured_is_none_not_zero(self, run):
        failed, network = run.results[1:3]
        assert failed.minutes_reference is failed.images_per_s_fastvit is failed.speedup is None
        assert network.minutes_fastvit is network.inference_speedup is network.max_error is None


EPOCH_TABLE = """\
model                          flops (B)     params (M)     acts (M)     batch         paper  library min  fastvit min  speed-up  steps
---------------------------------------------------------------------------------------------------------------------------------------
ConViT (arXiv 2103.10697), Table 1
ConViT-S                     5.76 [5.4]    27.8 [27]     17.9 [–]     2 [1024]  305 images/s        5,342        2,139     2.50x      3
DeiT-B                      17.58 [17]     86.6 [86]     23.9 [–]     1 [1024]  187 images/s            –       failed         –      –
Early Convolutions (arXiv 2106.14881), Table 2
RegNetZ-4GF (head matched)   4.05 [4.0]    28.1 [28.1]   24.3 [24.3]  2 [1024]      12.9 min         10.7            –         –      1
ViT_C-36GF                  35.03 [35.0]  167.8 [167.8]  36.6 [36.7]  1 [512]       18.6 min       85,745      171,156     0.50x      2"""

INFERENCE_TABLE = """\
model                       batch  library images/s  fastvit images/s  speed-up
-------------------------------------------------------------------------------
ConViT (arXiv 2103.10697), Table 1
ConViT-S                        2             20.00             40.00     2.00x
DeiT-B                          1                 –            failed         –
Early Convolutions (arXiv 2106.14881), Table 2
RegNetZ-4GF (head matched)      2             4,000                 –         –
ViT_C-36GF                      1              1.00              0.50     0.50x"""

CITATION_TABLE = """\
model                       hidden  MLP  heads  blocks  err 100  err 200  err 400  err IN-21k  top-1  top-5  Δ flops  Δ params  Δ acts
--------------------------------------------------------------------------------------------------------------------------------------
ConViT (arXiv 2103.10697), Table 1
ConViT-S                       432    4      9      12        –        –        –           –   81.3   95.7   +6.6 %    +2.9 %       –
DeiT-B                         768    4     12      12        –        –        –           –   81.8      –   +3.4 %    +0.7 %       –
Early Convolutions (arXiv 2106.14881), Table 2
RegNetZ-4GF (head matched)       –    –      –       –     17.4     16.9     16.6           –      –      –   +1.2 %    +0.1 %  -0.2 %
ViT_C-36GF                    1024    4     16      13     18.3     17.6     16.8        14.2      –      –   +0.1 %    +0.0 %  -0.3 %"""

EPOCH_MARKDOWN = """\
| model | flops (B) | params (M) | acts (M) | batch | paper | library min | fastvit min | speed-up | steps |
| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| *ConViT (arXiv 2103.10697), Table 1* |  |  |  |  |  |  |  |  |  |
| ConViT-S | 5.76 [5.4] | 27.8 [27] | 17.9 [–] | 2 [1024] | 305 images/s | 5,342 | 2,139 | 2.50x | 3 |
| DeiT-B | 17.58 [17] | 86.6 [86] | 23.9 [–] | 1 [1024] | 187 images/s | – | failed | – | – |
| *Early Convolutions (arXiv 2106.14881), Table 2* |  |  |  |  |  |  |  |  |  |
| RegNetZ-4GF (head matched) | 4.05 [4.0] | 28.1 [28.1] | 24.3 [24.3] | 2 [1024] | 12.9 min | 10.7 | – | – | 1 |
| ViT_C-36GF | 35.03 [35.0] | 167.8 [167.8] | 36.6 [36.7] | 1 [512] | 18.6 min | 85,745 | 171,156 | 0.50x | 2 |"""


class TestTables:
    def test_epoch(self, run):
        assert epoch_table(run.results) == EPOCH_TABLE

    def test_inference(self, run):
        assert inference_table(run.results) == INFERENCE_TABLE

    def test_citations(self, run):
        assert citation_table(run.results) == CITATION_TABLE

    def test_markdown(self, run):
        assert epoch_table(run.results, markdown=True) == EPOCH_MARKDOWN

    def test_text_report_is_headed_by_the_machine_and_ends_with_failures(self, run):
        text = text_report(run)
        assert text.startswith(
            "A CPU, 2 cores, 2 threads | fastvit 0.1.0, torch 2.15.0 | float32 | "
            "commit 0123456789ab\n"
        )
        assert epoch_table(run.results) in text
        assert "err 100" not in text
        flat = " ".join(text.split())
        assert flat.endswith(
            "Not measured - DeiT-B: failed: gradient of the images DISAGREES: "
            "error 3.00e-02, limit 2.20e-06 (same-dtype reference 1.00e-06)"
        )
        run.full = True
        assert citation_table(run.results) in text_report(run)

    def test_notes_say_what_the_figures_are(self, run):
        on_cpu = " ".join(notes(run.results, device="cpu"))
        assert "minutes = (images/b · t_fb + images/B · t_opt) / 60" in on_cpu
        assert "extrapolated" in on_cpu
        assert "no GPU figures" in on_cpu
        assert "matched:" in on_cpu
        on_gpu = " ".join(notes(run.results[:1], device="cuda", interrupted=True))
        assert "extrapolated" not in on_gpu
        assert "matched:" not in on_gpu
        assert "The run was interrupted" in on_gpu


class TestFiles:
    def test_json_holds_everything(self, run, tmp_path):
        run.interrupted = True
        content = json.loads(write_json(run, tmp_path).read_text("utf-8"))
        assert set(content) >= {"rows", "versions", "machine", "commit", "interrupted"}
        assert content["versions"] == MACHINE.versions
        assert content["machine"]["cpu"] == MACHINE.cpu
        assert content["commit"] == MACHINE.commit
        assert "fingerprint" not in content
        assert content["interrupted"] is True
        first, failed, network, _ = content["rows"]
        assert first == {
            "name": "ConViT-S",
            "family": "ConViT",
            "table": "ConViT (arXiv 2103.10697), Table 1",
            "matched": None,
            "source": "ConViT paper (arXiv 2103.10697) Table 1; facebookresearch/convit@0a9340a",
            "status": "ok",
            "reason": None,
            "flops": 5756208040,
            "params": 27777322,
            "acts": 17868394,
            "image_size": 224,
            "batch": 2,
            "batch_per_gpu": 128,
            "dtype": "float32",
            "steps": 3,
            "samples_reference": [0.8, 0.4, 0.5],
            "samples_fastvit": [0.2, 0.2, 0.3],
            "optimizer_reference": [0.02, 0.02, 0.5],
            "optimizer_fastvit": [0.02, 0.02, 0.02],
            "inference_reference": [0.1, 0.2, 0.1],
            "inference_fastvit": [0.04, 0.05, 0.06],
            "minutes_reference": pytest.approx(5341.5, abs=0.1),
            "minutes_fastvit": pytest.approx(2138.6, abs=0.1),
            "speedup": pytest.approx(2.498, abs=1e-3),
            "images_per_s_reference": 20.0,
            "images_per_s_fastvit": 40.0,
            "inference_speedup": 2.0,
            "max_error": 4e-7,
            "agreement": [
                {
                    "name": "output in eval()",
                    "error": 4e-7,
                    "reference_error": 5e-7,
                    "limit": 1.2e-6,
                    "ok": True,
                }
            ],
            "paper": dataclasses.asdict(run.results[0].row.paper),
        }
        assert (failed["status"], failed["max_error"]) == ("failed", 3e-2)
        assert "DISAGREES" in failed["reason"]
        assert network["speedup"] is None

    def test_json_has_no_nan(self, run, tmp_path):
        run.results[1].agreements = [Agreement("output", float("nan"), 0.0, 0.0)]
        text = write_json(run, tmp_path).read_text("utf-8")
        assert "NaN" not in text
        assert json.loads(text)["rows"][1]["agreement"][0]["error"] is None

    def test_the_files(self, run, tmp_path):
        written = write_report(run, tmp_path / "new" / "folder")
        names = ["epoch.json", "epoch.md", "epoch.svg", "epoch-dark.svg"]
        assert [path.name for path in written] == names
        assert sorted(os.listdir(tmp_path / "new" / "folder")) == sorted(names)
        assert written[1].read_text("utf-8") == markdown_report(run)
        assert EPOCH_MARKDOWN in written[1].read_text("utf-8")

    def test_a_write_that_fails_leaves_the_old_file_and_no_other(self, run, tmp_path, monkeypatch):
        old = write_json(run, tmp_path).read_bytes()

        def broken(*_):
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", broken)
        run.results.pop()
        with pytest.raises(OSError, match="disk full"):
            write_json(run, tmp_path)
        assert os.listdir(tmp_path) == ["epoch.json"]
        assert (tmp_path / "epoch.json").read_bytes() == old

    def test_svg_shows_every_row_and_is_repeatable(self, run):
        from fastvit.benchmark.plot import epoch_svg

        svg = epoch_svg(run.results, MACHINE.line("float32"))
        assert svg == epoch_svg(run.results, MACHINE.line("float32"))
        # Glyphs are outlines; matplotlib names each text in a comment.
        ElementTree.fromstring(svg)
        for shown in [*(r.row.label for r in run.results), "failed", "library only", "2.50x"]:
            assert f"<!-- {shown} -->" in svg
        assert "prefers-color-scheme" not in svg
        assert "fill: #ffffff" in svg

    def test_svg_without_a_single_figure(self, run):
        from fastvit.benchmark.plot import epoch_svg

        assert "<!-- failed -->" in epoch_svg(run.results[1:2], "machine")


class TestMachine:
    def test_names_this_machine(self, tmp_path):
        machine = this_machine(torch.device("cpu"), checkout=tmp_path)
        assert machine.threads == torch.get_num_threads()
        assert machine.commit is None
        assert {"torch", "timm", "torchvision", "fastvit"} <= machine.versions.keys()
        assert machine.versions["torch"] == torch.__version__
        line = machine.line("bfloat16")
        assert line.endswith(" | bfloat16 | no commit")
        assert str(machine.threads) in line

    def test_names_the_gpu_and_its_tf32(self):
        machine = dataclasses.replace(
            MACHINE, gpu="A GPU", cuda="13.2", tf32="tf32 in convolution", commit=None
        )
        assert machine.line("float32") == (
            "A GPU | fastvit 0.1.0, torch 2.15.0, CUDA 13.2 | float32 (tf32 in convolution) | "
            "no commit"
        )

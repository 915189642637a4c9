# SPDX-License-Identifier: Apache-2.0
"""Figures in documents are those of the committed samples, and a false one is caught."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import documents as pages
import gpu_results
import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
RESULTS = "bench/results"
MODULES = "intel-xeon-amx-2-cores/modules.json"
# That of the first processor that has one.
EPOCH = next(
    name
    for name in ("intel-xeon-amx-2-cores/epoch.json", "amd-epyc-2-cores/epoch.json")
    if (ROOT / RESULTS / name).is_file()
)


@pytest.fixture(scope="module")
def bench():
    """Imports of modules of bench/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        yield importlib.import_module


@pytest.fixture(scope="module")
def performance(bench):
    return bench("performance")


@pytest.fixture
def checkout(tmp_path):
    """What the documents are made of, to change."""
    for name in ("README.md", "docs/performance.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("docs/pictures", RESULTS, "kernels", "fastvit/ops"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def edit(path, change):
    """Change the content of a JSON file in place."""
    data = json.loads(path.read_text("utf-8"))
    change(data)
    path.write_text(json.dumps(data), "utf-8")


def replaced(path, pattern, new):
    """Put other text in the first place that fits."""
    text, count = re.subn(pattern, new, path.read_text("utf-8"), count=1)
    assert count == 1
    path.write_text(text, "utf-8")


def gpu_run(root, *, commit="0123456789ab", **more):
    folder = root / RESULTS / "nvidia-h999" / f"2026-11-30-{commit}"
    folder.mkdir(parents=True)
    found = {name: {**stage, **more} for name, stage in gpu_results.records().items()}
    files = {"machine.json": ("ceilings",), "peers.json": ("peers",), "models.json": ("models",),
             "kernels.json": ("kernels", "patch_embed", "stem")}  # fmt: skip
    for file, stages in files.items():
        (folder / file).write_text(json.dumps({s: found[s] for s in stages}), "utf-8")
    return folder


class TestAgreement:
    def test_documents_and_pictures_are_those_of_the_results(self):
        """As `python bench/performance.py --check` finds them."""
        command = [sys.executable, "-P", str(ROOT / "bench" / "performance.py"), "--check"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout == "documents and pictures are those of the results\n"

    def test_a_doctored_row_is_caught_with_both_lines(self, performance, checkout):
        path = checkout / "docs" / "performance.md"
        row = next(line for line in path.read_text("utf-8").splitlines() if "| GPSA S f" in line)
        replaced(path, re.escape(row), row.replace("x", "9x", 1))
        (found,) = performance.check(checkout)
        assert found.startswith("docs/performance.md, block modules:")
        assert f"+{row}" in found.splitlines()

    def test_a_doctored_figure_in_a_sentence_is_caught(self, performance, checkout):
        replaced(checkout / "README.md", r"(/ConViT-\* -->)[^<]*", r"\g<1>9.99x")
        (found,) = performance.check(checkout)
        assert found.startswith("README.md, block epoch speed-up/first/ConViT-*:")

    def test_a_doctored_machine_is_caught(self, performance, checkout):
        replaced(checkout / "README.md", r"\n\*[^*\n]* threads · ", "\n*H200 · ")
        (found,) = performance.check(checkout)
        assert "block epoch:" in found

    def test_a_doctored_picture_is_caught(self, performance, checkout):
        replaced(checkout / "docs/pictures/ratios.svg", r"<!-- [\d.]+ fastvit", "<!-- 9.99 fastvit")
        assert performance.check(checkout) == [
            "docs/pictures/ratios.svg is not what the results give"
        ]

    def test_writing_mends_all_of_it(self, performance, checkout):
        expected = {n: (checkout / n).read_text("utf-8") for n in performance.DOCUMENTS}
        replaced(checkout / "README.md", r"\| DeiT-S \| 4.61", "| DeiT-S | 4.62")
        replaced(checkout / "docs" / "performance.md", r"(/\*/1 -->)[^<]*", r"\g<1>9.99x")
        (checkout / "docs/pictures/epoch-dark.svg").unlink()
        assert len(performance.check(checkout)) == 3
        performance.write(checkout)
        assert performance.check(checkout) == []
        assert {n: (checkout / n).read_text("utf-8") for n in expected} == expected

    def test_all_tables_of_the_page_stand_in_blocks(self, bench):
        documents = bench("figures.documents")
        text = pages.text_of(ROOT / "docs" / "performance.md")
        left = documents.filled(text, lambda name: "")
        assert not re.findall(r"^\|.*", left, flags=re.MULTILINE)

    @pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
    def test_no_sentence_is_cut_by_a_marker(self, page):
        """A comment that begins a line ends the paragraph before it, in Markdown."""
        lines = pages.text_of(ROOT / page).splitlines()
        begun = [line for line in lines if re.match(r"\s*<!-- (end )?figures", line)]
        assert begun
        assert [line for line in begun if not line.endswith(" -->")] == []


class TestSamples:
    def test_minutes_that_their_samples_do_not_give_are_refused(self, performance, bench, checkout):
        def faster(data):
            data["rows"][1]["minutes_fastvit"] *= 0.5

        edit(checkout / RESULTS / EPOCH, faster)
        with pytest.raises(bench("figures.load").Doctored, match="ConViT-S: minutes_fastvit is"):
            performance.check(checkout)

    def test_so_are_samples_that_do_not_give_the_minutes(self, performance, bench, checkout):
        def faster(data):
            row = data["rows"][1]
            row["samples_fastvit"] = [0.5 * s for s in row["samples_fastvit"]]

        edit(checkout / RESULTS / EPOCH, faster)
        with pytest.raises(bench("figures.load").Doctored, match="its samples give"):
            performance.check(checkout)

    def test_changed_samples_of_a_contest_change_the_tables(self, performance, checkout):
        def faster(data):
            seconds = data["contests"][0]["seconds"]
            seconds["fastvit"] = [0.5 * s for s in seconds["fastvit"]]

        edit(checkout / RESULTS / MODULES, faster)
        found = performance.check(checkout)
        assert len(found) == 1
        assert "block modules:" in found[0]

    def test_a_contest_that_disagreed_is_refused(self, performance, bench, checkout):
        edit(checkout / RESULTS / MODULES, lambda data: data["contests"][0].update(error=1.0))
        with pytest.raises(bench("figures.load").Doctored, match="GPSA S forward float32"):
            performance.check(checkout)

    @pytest.mark.parametrize("name", ["median", "q20", "q80"])
    def test_so_is_a_quantile_of_a_gpu_run(self, performance, bench, checkout, name):
        folder = gpu_run(checkout)

        def faster(data):
            data["kernels"]["cases"][0]["contenders"]["fastvit"][name] *= 0.9

        edit(folder / "kernels.json", faster)
        with pytest.raises(bench("figures.load").Doctored, match=f"kernels: {name} is"):
            performance.check(checkout)

    def test_so_are_images_per_second_of_a_gpu_run(self, performance, bench, checkout):
        folder = gpu_run(checkout)

        def faster(data):
            data["models"]["cases"][0]["contenders"]["fastvit convit"]["images_per_s"] *= 1.1

        edit(folder / "models.json", faster)
        with pytest.raises(bench("figures.load").Doctored, match="fastvit convit: images_per_s is"):
            performance.check(checkout)

    def test_so_is_a_share_of_a_floor(self, performance, bench, checkout):
        folder = gpu_run(checkout)

        def fuller(data):
            times = data["kernels"]["cases"][0]["contenders"]["fastvit"]
            times.update(floor=0.5 * times["median"], share=0.9)

        edit(folder / "kernels.json", fuller)
        with pytest.raises(bench("figures.load").Doctored, match=r"fastvit: share is 0\.9"):
            performance.check(checkout)

    def test_so_are_stages_of_two_commits(self, performance, bench, checkout):
        folder = gpu_run(checkout)
        edit(folder / "models.json", lambda data: data["models"]["machine"].update(commit="f00"))
        with pytest.raises(bench("figures.load").Doctored, match=r"several runs: .*f00"):
            performance.check(checkout)

    def test_the_command_says_so_and_fails(self, performance, checkout, monkeypatch, capsys):
        edit(checkout / RESULTS / EPOCH, lambda data: data["rows"][0].update(speedup=2.0))
        monkeypatch.setattr(performance, "ROOT", checkout)
        monkeypatch.setattr(sys, "argv", ["performance.py", "--check"])
        assert performance.main() == 1
        assert capsys.readouterr().out.startswith("refused: DeiT-S: speedup is 2.0, its samples")


class TestNewest:
    def test_of_two_runs_of_a_day_the_later_counts(self, bench, checkout):
        """Folders of a day are in the order of their commits, which says nothing."""
        gpu_run(checkout, commit="ffffffffffff", date="2026-11-30T09:00:00+0000")
        later = gpu_run(checkout, commit="0123456789ab", date="2026-11-30T10:00:00+0100")
        last = gpu_run(checkout, commit="7" * 12, date="2026-11-30T09:30:00+0000")
        (run,) = bench("figures.sources").gpu_runs(checkout)
        assert run.path == last
        assert later < last


class TestFailed:
    def test_stages_that_failed_are_named(self, performance, bench, checkout):
        folder = gpu_run(checkout)
        tables = bench("figures.graphics").tables
        assert "failed" not in tables(checkout, checkout)
        fault = "S core, fastvit: 130 % of its floor: a fault of the measurement"
        edit(
            folder / "kernels.json",
            lambda data: data["kernels"].update(status="failed", problems=[fault]),
        )
        assert f"**Stages that failed: kernels ({fault}).**" in tables(checkout, checkout)


class TestStale:
    def test_sources_that_changed_since_are_named(self, performance, bench, checkout):
        now = bench("gpu.fingerprint").fingerprint(checkout)
        assert now.keys() == {"gpsa", "conv_stem", "patch_embed"}
        path = checkout / RESULTS / MODULES
        edit(path, lambda data: data.update(fingerprint=now))
        assert performance.check(checkout) == []
        kernel = checkout / "kernels" / "forward_tile.py"
        kernel.write_text(kernel.read_text("utf-8") + "\n# changed\n", "utf-8")
        found = performance.check(checkout)
        assert found
        assert all("+**The sources of gpsa changed since.**" in block for block in found)

    def test_results_without_a_fingerprint_state_their_commit(self, bench, checkout):
        sources = bench("figures.sources")
        source = sources.results(checkout, "modules.json")[0]
        assert "fingerprint" not in source.data
        head = source.head("float32", checkout)
        assert "changed since" not in head
        assert f"commit {source.data['commit']}" in head

    def test_a_stale_gpu_run_says_so(self, performance, bench, checkout):
        now = bench("gpu.fingerprint").fingerprint(checkout)
        gpu_run(checkout, fingerprint={**now, "conv_stem": "0" * 16})
        text = performance.maker(checkout, "README.md")("gpu")
        assert "**The sources of conv_stem changed since.**" in text


class TestNewResults:
    def test_a_gpu_run_fills_its_tables(self, performance, checkout):
        make = performance.maker(checkout, "docs/performance.md")
        assert make("gpu") == make("gpu state") == "Not measured on a GPU."
        gpu_run(checkout)
        make = performance.maker(checkout, "docs/performance.md")
        assert make("gpu state") == "Measured on NVIDIA H999."
        text = make("gpu")
        assert (
            "*NVIDIA H999 · fastvit 0.1.0, torch 2.11.0, triton 3.6.0 · commit 0123456789ab" in text
        )
        assert "Ceilings: 4.00 TB/s copied; 800 TFLOP/s bfloat16" in text
        rows = [line for line in text.splitlines() if line.startswith("| S N=196 B=256 |")]
        assert [row.split(" | ")[-1] for row in rows] == ["1.30 |", "2.50 |"]
        assert "| ConViT ÷ DeiT small | inference | 0.30 | 0.99 |" in text

    def test_and_draws_its_pictures(self, performance, checkout):
        gpu_run(checkout)
        performance.write(checkout)
        folder = checkout / "docs" / "pictures"
        assert (folder / "nvidia-h999-roofline_gpsa_core-dark.svg").is_file()
        assert "<!-- 0.99 fastvit, H999 -->" in (folder / "ratios.svg").read_text("utf-8")
        # It has no epochs: the processor's stay.
        assert "H999" not in (folder / "epoch.svg").read_text("utf-8")
        assert performance.check(checkout) == []

    def test_a_dry_run_is_no_measurement(self, performance, checkout):
        gpu_run(checkout, dry=True)
        assert performance.maker(checkout, "README.md")("gpu state") == "Not measured on a GPU."

    def test_epochs_of_the_first_processor_are_taken_when_they_come(self, performance, checkout):
        target = checkout / RESULTS / "intel-xeon-amx-2-cores" / "epoch.json"
        if str(target.relative_to(checkout / RESULTS)) != EPOCH:
            shutil.copy(checkout / RESULTS / EPOCH, target)
        edit(target, lambda data: data["machine"].update(cpu="Intel(R) Xeon(R) Processor, 2 cores"))
        text = performance.maker(checkout, "README.md")("epoch")
        assert text.startswith("*Intel Xeon with AMX, 2 cores, 2 threads")
        assert "(bench/results/intel-xeon-amx-2-cores/epoch.json)" in text
        performance.write(checkout)
        picture = (checkout / "docs" / "pictures" / "epoch.svg").read_text("utf-8")
        assert "<!-- Intel Xeon with AMX, 2 cores" in picture

    def test_those_of_a_gpu_come_before_them(self, performance, checkout):
        target = gpu_run(checkout) / "epoch.json"
        shutil.copy(checkout / RESULTS / EPOCH, target)
        edit(target, lambda data: data["machine"].update(gpu="NVIDIA H999"))
        text = performance.maker(checkout, "README.md")("epoch")
        assert text.startswith("*NVIDIA H999 · ")
        assert " · `make gpu` · samples: [epoch.json](bench/results/nvidia-h999/2026" in text

    def test_accelerated_models_measured_with_the_others_supersede(self, performance, checkout):
        older = checkout / RESULTS / "intel-xeon-amx-2-cores" / "accelerated" / "modules.json"
        contests = json.loads(older.read_text("utf-8"))["contests"]
        make = performance.maker(checkout, "README.md")

        def without(data):
            found = data["contests"]
            data["contests"] = [c for c in found if not c["name"].endswith("accelerated")]

        edit(checkout / RESULTS / MODULES, without)
        assert "accelerated/modules.json" in make("accelerated")
        edit(checkout / RESULTS / MODULES, lambda data: data["contests"].extend(contests))
        assert "accelerated/modules.json" not in make("accelerated")
        assert "| timm's ConViT-small | float32 | 8 | 580.91 |" in make("accelerated")
        assert "accelerated" not in make("modules")


class TestBlocks:
    def test_lines_stay_lines_and_sentences_sentences(self, bench):
        documents = bench("figures.documents")
        text = (
            "<!-- figures: a -->\n\nold\n\n<!-- end figures -->\n"
            "It is <!-- figures: b/c -->old<!-- end figures -->.\n"
        )
        made = documents.filled(text, lambda name: f"new {name}")
        assert made == (
            "<!-- figures: a -->\n\nnew a\n\n<!-- end figures -->\n"
            "It is <!-- figures: b/c -->new b/c<!-- end figures -->.\n"
        )
        assert documents.differing(made, lambda name: f"new {name}") == {}
        assert list(documents.differing(text, lambda name: f"new {name}")) == ["a", "b/c"]

    def test_what_is_not_there_is_named(self, performance):
        make = performance.maker(ROOT, "README.md")
        with pytest.raises(KeyError, match="no block is called 'modulse'; there are"):
            make("modulse")
        with pytest.raises(KeyError, match="no figure is called"):
            make("speed-up/first/GPSA Z*/float32/8")
        with pytest.raises(KeyError, match=r"elsewhere has no modules\.json"):
            make("speed-up/elsewhere/GPSA S forward/float32/8")

    def test_a_figure_is_the_least_and_the_most_of_its_contests(self, performance, checkout):
        def times(data):
            for contest in data["contests"]:
                if contest["name"].startswith("GPSA S forward"):
                    contest["seconds"]["fastvit"] = [1.0, 2.0]
                    contest["seconds"]["library"] = [5.0, 4.0]
                    contest["peak_bytes"] = {"fastvit": 1, "library": 4}
            data["contests"][0]["seconds"]["library"] = [6.0]

        edit(checkout / RESULTS / MODULES, times)
        make = performance.maker(checkout, "README.md")
        assert make("speed-up/first/GPSA S forward/float32/8") == "6.00x"
        assert make("speed-up/first/GPSA S forward*/*/8") == "4.00x to 6.00x"
        assert make("memory/first/GPSA S forward*/*/8") == "0.25"
        assert make("library ms/first/GPSA S forward/float32/8") == "6,000.00"

    def test_what_timm_publishes_is_cited_with_its_file(self, bench):
        cited = bench("figures.cited")
        table = cited.published_table()
        # 4379.04 ÷ 18550.12, 1976.08 ÷ 8206.39, 1048.86 ÷ 2989.27.
        assert "| RTX 4090 | inference | amp | 2.9.1 | eager | 0.24 | 0.24 | 0.35 |" in table
        assert "`benchmark-infer-amp-nchw-pt291-cu128-4090.csv`" in table
        assert cited.published_range() == "0.24 to 0.35"

    def test_what_the_papers_print_as_ratios(self, bench):
        cited = bench("figures.cited")
        found = cited.paper_ratios("ConViT ÷ DeiT")
        assert found == {
            "small": 305 / 587, "small+": 382 / 480, "base": 141 / 187, "base+": 96 / 114,
        }  # fmt: skip
        assert cited.paper_ratios("ViT_C ÷ ViT_P") == pytest.approx(
            {"1GF": 2.6 / 2.7, "4GF": 3.8 / 3.9, "18GF": 11.5 / 11.4, "36GF": 18.8 / 18.6}
        )

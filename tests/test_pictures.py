# SPDX-License-Identifier: Apache-2.0
"""Pictures from made-up data: their numbers, both variants, and that nothing covers anything."""

from __future__ import annotations

import ast
import copy
import itertools
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import gpu_results
import pytest

pytest.importorskip("matplotlib")

from fastvit.benchmark.pictures import epoch, ratios, roofline, scaling, theme
from fastvit.benchmark.pictures.theme import DARK, LIGHT, NothingToDraw

ROOT = Path(__file__).parents[1]
LINE = "A GPU · fastvit 0.1.0, torch 2.11.0 · bfloat16 · commit 0123456789ab"
THEMES = pytest.mark.parametrize("variant", [LIGHT, DARK], ids=["light", "dark"])


@pytest.fixture(scope="module")
def gpu():
    """The module that draws a run of ``make gpu``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        from figures import gpu

        yield gpu


def rows():
    text = (ROOT / "bench" / "results" / "amd-epyc-2-cores" / "epoch.json").read_text("utf-8")
    return json.loads(text)["rows"]


def on_a_gpu():
    """The same models with minutes of the papers' order."""
    found = copy.deepcopy(rows())
    for row in found:
        for name in ("minutes_reference", "minutes_fastvit"):
            row[name] = row[name] and row[name] / 800
    return found


POINTS = [
    roofline.Point("S", 4e6, 4e8, 1e-6, "flash", 2e-6),
    roofline.Point("B", 4e6, 4e8, 1.1e-6, "cudnn", 1.65e-6),
    roofline.Point("alone", 4e6, 1.2e9, 4e-6),
]
ROOF = roofline.Roof(4e12, {"bfloat16": 800e12})
BARS = [
    ratios.Panel(
        "one",
        ["small", "base"],
        [
            ratios.Series("cited", "paper, a card", {"small": 0.5}),
            ratios.Series("fastvit", "fastvit, a card", {"small": 0.984, "base": 1.37}),
        ],
    ),
    ratios.Panel("other", ["1GF"], [ratios.Series("library", "library, a card", {"1GF": 0.9})]),
]
PANELS = [
    scaling.Panel(
        "core",
        "tokens N",
        [
            scaling.Line("fastvit", True, [(196, 2e-7), (1024, 4e-6)]),
            scaling.Line("flash", False, [(196, 3e-7), (1024, 4e-6)]),
        ],
    ),
    scaling.Panel("models", "batch", []),
]


def draws():
    """Every picture over data of its own, by name."""
    return {
        "roofline": lambda t, dry=False: roofline.draw("core", POINTS, ROOF, [LINE], t, dry=dry),
        "ratios": lambda t, dry=False: ratios.draw(BARS, [LINE], t, dry=dry),
        "scaling": lambda t, dry=False: scaling.draw(PANELS, [LINE], t, dry=dry),
        "epoch": lambda t, dry=False: epoch.draw(
            [epoch.from_row(row) for row in rows()], [LINE], t, dry=dry
        ),
        "epoch of one": lambda t, dry=False: epoch.draw(
            [epoch.from_row(rows()[1])], [LINE], t, dry=dry
        ),
        "epoch near": lambda t, dry=False: epoch.draw(
            [epoch.from_row(row) for row in on_a_gpu()], [LINE], t, dry=dry
        ),
    }


def faults(figure):
    """Texts that leave the canvas, and pairs that overlap by more than half a pixel."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    extents = [(text.get_text(), text.get_window_extent(renderer)) for text in found]
    wrong = [
        f"{text!r} leaves the canvas"
        for text, box in extents
        if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1
    ]
    for (text, a), (other, b) in itertools.combinations(extents, 2):
        width = min(a.x1, b.x1) - max(a.x0, b.x0)
        height = min(a.y1, b.y1) - max(a.y0, b.y0)
        if width > 0.5 and height > 0.5:
            wrong.append(f"{text!r} overlaps {other!r}")
    return wrong


def drawn(draw, variant):
    with theme.style():
        return draw(variant)


def words(svg):
    """Glyphs are outlines; matplotlib names each text in a comment."""
    return re.findall(r"<!-- (.*?) -->", svg)


class TestEvery:
    @THEMES
    @pytest.mark.parametrize("name", draws())
    def test_nothing_overlaps_or_leaves_the_canvas(self, name, variant):
        assert faults(drawn(draws()[name], variant)) == []

    @pytest.mark.parametrize("name", draws())
    def test_the_same_data_gives_the_same_bytes(self, name):
        svg = theme.to_svg(draws()[name])
        assert svg == theme.to_svg(draws()[name])
        ElementTree.fromstring(svg)

    @pytest.mark.parametrize("name", draws())
    def test_both_variants_say_the_same_on_their_own_background(self, name, tmp_path):
        light, dark = theme.write(tmp_path, "it", draws()[name])
        assert (light.name, dark.name) == ("it.svg", "it-dark.svg")
        assert words(light.read_text("utf-8")) == words(dark.read_text("utf-8"))
        assert f"fill: {LIGHT.paper}" in light.read_text("utf-8")
        assert f"fill: {DARK.paper}" in dark.read_text("utf-8")
        assert LIGHT.paper not in dark.read_text("utf-8")
        assert DARK.paper not in light.read_text("utf-8")

    @pytest.mark.parametrize("name", draws())
    def test_a_dry_run_says_so_in_the_picture(self, name):
        draw = draws()[name]
        assert theme.DRY in words(theme.to_svg(lambda variant: draw(variant, dry=True)))
        assert theme.DRY not in words(theme.to_svg(draw))

    @pytest.mark.parametrize("name", draws())
    def test_text_is_legible_at_the_width_of_a_readme(self, name):
        from matplotlib.text import Text

        figure = drawn(draws()[name], LIGHT)
        sizes = [t.get_fontsize() for t in figure.findobj(Text) if t.get_text()]
        assert min(sizes) * figure.dpi / 72 * 830 / figure.bbox.width >= 9

    @pytest.mark.parametrize("name", draws())
    def test_what_was_measured_on_stands_in_it(self, name):
        assert LINE in words(theme.to_svg(draws()[name]))

    def test_no_data_gives_a_sentence(self):
        empty = {
            "no such problem": lambda: roofline.draw("core", [], ROOF, [], LIGHT),
            "ceilings": lambda: roofline.draw("core", POINTS, None, [], LIGHT),
            "no ratios": lambda: ratios.draw([BARS[0]._replace(series=[])], [], LIGHT),
            "no times": lambda: scaling.draw(PANELS[1:], [], LIGHT),
            "no row": lambda: epoch.draw([], [], LIGHT),
        }
        for words_, draw in empty.items():
            with theme.style(), pytest.raises(NothingToDraw, match=words_):
                draw()

    def test_importing_them_imports_neither_torch_nor_matplotlib(self):
        names = "epoch, labels, ratios, roofline, scaling, theme"
        code = (
            f"import sys; from fastvit.benchmark.pictures import {names}; "
            "print([n for n in ('torch', 'matplotlib') if n in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
        )
        assert ast.literal_eval(done.stdout) == []


class TestNumbers:
    def test_roofline_has_the_ratios_and_the_ceilings(self):
        found = words(roofline.roofline_svg("core", POINTS, ROOF, [LINE]))
        assert {"S: 2.00x flash", "B: 1.50x cudnn", "alone"} <= set(found)
        assert {"4 TB/s", "800 TFLOP/s, bfloat16"} <= set(found)

    def test_roofline_puts_points_where_they_belong(self):
        axes = drawn(draws()["roofline"], LIGHT).axes[0]
        placed = {
            (line.get_xdata()[0], round(float(line.get_ydata()[0]), 6))
            for line in axes.lines
            if line.get_marker() == "o"
        }
        # 100 FLOP a byte; 4e8 FLOP in 1 and 2 µs are 400 and 200 TFLOP/s.
        assert {(100.0, 400.0), (100.0, 200.0), (300.0, 300.0)} <= placed
        roof = max((line for line in axes.lines), key=lambda line: max(line.get_ydata()))
        assert max(roof.get_ydata()) == 800.0
        assert 200.0 in roof.get_xdata()

    def test_bars_have_their_values_and_hardware(self):
        found = words(ratios.ratios_svg(BARS, [LINE]))
        assert {"0.50 paper, a card", "0.98 fastvit, a card", "1.37 fastvit, a card"} <= set(found)
        axes = drawn(draws()["ratios"], LIGHT).axes[0]
        assert sorted(round(bar.get_width(), 3) for bar in axes.patches) == [0.5, 0.984, 1.37]

    def test_scaling_has_microseconds_and_says_what_is_missing(self):
        found = words(scaling.scaling_svg(PANELS, [LINE]))
        assert {"fastvit", "flash", "not measured", "196", "1024"} <= set(found)
        axes = drawn(draws()["scaling"], LIGHT).axes[0]
        assert [list(map(float, line.get_ydata())) for line in axes.lines[:2]] == [
            pytest.approx([0.2, 4.0]),
            pytest.approx([0.3, 4.0]),
        ]

    def test_epoch_has_the_papers_column_as_marks_and_as_text(self):
        lines = [epoch.from_row(row) for row in rows()]
        figure = drawn(draws()["epoch"], LIGHT)
        measured, papers = figure.axes
        marks = [float(line.get_xdata()[0]) for line in papers.lines if line.get_marker() == "D"]
        assert marks == [line.paper for line in lines if line.paper is not None]
        assert not [line for line in measured.lines if line.get_marker() == "D"]
        found = words(epoch.epoch_svg(lines, [LINE]))
        assert {"305 images/s", "18.6 min", "1.15x", "library only"} <= set(found)

    def test_epoch_puts_near_minutes_on_one_axis(self):
        (axes,) = drawn(draws()["epoch near"], LIGHT).axes
        assert {"D", "o"} <= {line.get_marker() for line in axes.lines}

    def test_epoch_names_what_failed(self):
        row = {**rows()[0], "status": "failed", "minutes_fastvit": None, "speedup": None}
        assert "failed" in words(epoch.epoch_svg([epoch.from_row(row)], [LINE]))


class TestRun:
    """What ``make gpu`` draws from its records."""

    def pictures(self, gpu, records, *, dry=False):
        return gpu.pictures(records, on_a_gpu(), dry=dry)

    @THEMES
    def test_nothing_overlaps(self, gpu, variant):
        from gpu import stages

        found = self.pictures(gpu, gpu_results.records())
        assert tuple(found) == stages.PICTURES
        wrong = {name: faults(drawn(draw, variant)) for name, draw in found.items()}
        assert [name for name, found in wrong.items() if found] == []

    def test_ours_and_the_strongest_peer_of_the_same_contest(self, gpu):
        found = self.pictures(gpu, gpu_results.records())
        core = words(theme.to_svg(found["roofline_gpsa_core"]))
        assert {"S N=196 B=256: 1.30x flash", "B N=1024 B=32: 0.70x flash"} <= set(core)
        stem = words(theme.to_svg(found["roofline_conv_stem"]))
        # 1.2 ÷ 0.8 of their contest, not 1.2 ÷ 1.
        assert "ViT_C-4GF B=256: 1.50x compiled channels_last" in stem
        module = words(theme.to_svg(found["roofline_gpsa_module"]))
        assert "S N=196 B=256: 2.50x timm compiled" in module
        patches = words(theme.to_svg(found["roofline_patch_embed"]))
        # A convolution alone is faster and no peer.
        assert "D=768 p=16 B=256: 1.80x timm" in patches
        assert not [text for text in patches if "alone" in text]

    def test_ratios_are_of_the_fastest_of_each_family(self, gpu):
        found = words(theme.to_svg(self.pictures(gpu, gpu_results.records())["ratios"]))
        assert "0.99 fastvit, H999" in found
        assert "0.30 timm, H999" in found
        assert "1.02 fastvit, H999" in found
        assert {"0.52 paper, Quadro GP100", "0.24 timm, RTX 4090"} <= set(found)

    def test_scaling_has_all_axes(self, gpu):
        found = words(theme.to_svg(self.pictures(gpu, gpu_results.records())["scaling"]))
        assert "not measured" not in found
        assert {"196", "576", "1024", "1", "8", "64", "256", "224", "384", "512"} <= set(found)

    def test_a_missing_stage_costs_its_pictures_only(self, gpu):
        records = gpu_results.records()
        del records["models"], records["stem"]
        found = self.pictures(gpu, records)
        for name in ("ratios", "roofline_conv_stem"):
            with theme.style(), pytest.raises(NothingToDraw):
                found[name](LIGHT)
        assert "not measured" in words(theme.to_svg(found["scaling"]))
        assert faults(drawn(found["roofline_gpsa_core"], LIGHT)) == []

    def test_a_contender_that_failed_is_no_peer(self, gpu):
        records = gpu_results.records()
        for case in records["kernels"]["cases"]:
            case["contenders"] = {
                name: times if name == "fastvit" else {"error": "RuntimeError: no"}
                for name, times in case["contenders"].items()
            }
        records["peers"]["cases"] = []
        found = words(theme.to_svg(self.pictures(gpu, records)["roofline_gpsa_core"]))
        assert "S N=196 B=256" in found

    def test_files_are_drawn_once_and_again_when_their_data_changes(self, gpu, tmp_path):
        from gpu import plot

        records = gpu_results.records()
        del records["models"]
        text = plot.write(tmp_path, records, dry=True)
        assert "- ratios: no pair of models was timed" in text
        core = tmp_path / "roofline_gpsa_core.svg"
        assert theme.DRY in words(core.read_text("utf-8"))
        assert 'srcset="roofline_gpsa_core-dark.svg"' in text
        core.write_text("kept", "utf-8")
        plot.write(tmp_path, records, dry=True)
        assert core.read_text("utf-8") == "kept"
        for case in records["kernels"]["cases"]:
            case["contenders"]["fastvit"]["median"] *= 2
        plot.write(tmp_path, records, dry=True)
        assert "S N=196 B=256: 0.65x flash" in words(core.read_text("utf-8"))
        assert not (tmp_path / "ratios.svg").exists()
        assert "ratios.svg" in plot.write(tmp_path, gpu_results.records(), dry=True)

# SPDX-License-Identifier: Apache-2.0
"""The pictures in ``docs/pictures``, from the result sets that are committed."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from fastvit.benchmark.contests import DEIT, LIBRARY
from fastvit.benchmark.files import write_text
from fastvit.benchmark.modules import Outcome
from fastvit.benchmark.pictures import epoch, ratios, theme
from fastvit.benchmark.pictures.theme import Draw, NothingToDraw, Theme
from figures import gpu, load, models
from figures.cited import paper_series, published_series
from figures.processor import layers
from figures.sources import Source, gpu_runs, results


def pictures(root: Path) -> dict[str, Draw]:
    """What draws each, by name of file without ending."""
    found: dict[str, Draw] = {
        "ratios": partial(_ratios, root),
        "epoch": partial(_epoch, results(root, "epoch.json")),
    }
    # What a GPU's run has takes the place of the processors'.
    for run in gpu_runs(root):
        rows = _rows(run)
        for name, draw in gpu.pictures(run.data, rows, dry=False).items():
            found[f"{run.path.parent.name}-{name}"] = draw
            # Epochs are found beside the processors'.
            if name == "ratios" and "models" in run.data:
                found[name] = draw
    return found


def write(root: Path) -> list[str]:
    """Draw all that there is data for; a sentence for each that there is not."""
    folder, missing = root / "docs" / "pictures", []
    for name, draw in pictures(root).items():
        try:
            made = theme.variants(name, draw)
        except NothingToDraw as reason:
            missing.append(f"{name}: {reason}")
            continue
        for file, text in made.items():
            path = folder / file
            # Another version of matplotlib draws the same in other bytes.
            if not path.is_file() or words(path.read_text("utf-8")) != words(text):
                write_text(path, text)
    return missing


def differing(root: Path) -> list[str]:
    """Files whose words and numbers are not those that the results give now."""
    found = []
    for name, draw in pictures(root).items():
        try:
            made = theme.variants(name, draw)
        except NothingToDraw:
            continue
        for file, text in made.items():
            path = root / "docs" / "pictures" / file
            if not path.is_file() or words(path.read_text("utf-8")) != words(text):
                found.append(f"docs/pictures/{file}")
    return found


def words(svg: str) -> list[str]:
    """The texts of a picture: glyphs are outlines, and matplotlib names each text in a comment."""
    return re.findall(r"<!-- (.*?) -->", svg)


def _rows(run: Source) -> list[dict[str, Any]]:
    path = run.path / "epoch.json"
    return json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []


def _epoch(sources: list[Source], theme: Theme) -> Any:
    if not sources:
        raise NothingToDraw("no row of the papers' tables was measured")
    source = sources[0]
    rows = [epoch.from_row(result.to_dict()) for result in load.results(source.data)]
    return epoch.draw(rows, [line(source, source.data["dtype"])], theme)


def line(source: Source, settings: str) -> str:
    """Machine, versions, settings and commit."""
    versions = ", ".join(f"{name} {v}" for name, v in source.data["versions"].items())
    return f"{source.processor} · {versions} · {settings} · commit {source.data['commit']}"


def _ratios(root: Path, theme: Theme) -> Any:
    panels, lines = [], []
    for source in results(root, "modules.json")[:1]:
        panels.append(_convits(source))
        lines.append("Left: " + line(source, "bfloat16, batch 8"))
    for source in results(root, "epoch.json")[:1]:
        panels.append(_vits(source))
        lines.append("Right: " + line(source, f"{source.data['dtype']}, batch 1 to 2"))
    lines.append(
        "Equal work would give 0.80 at small, whose ConViT is wider, and 1.00 elsewhere. fastvit: "
        "over the library's plain model. Not measured on a GPU."
    )
    return ratios.draw(panels, lines, theme)


def _convits(source: Source) -> ratios.Panel:
    """timm's pair, and fastvit's ConViT over timm's DeiT, in the dtype that papers train in."""
    library: dict[str, float] = {}
    ours: dict[str, float] = {}
    for o in layers(source):
        if o.entry.name.endswith(" against DeiT") and o.entry.dtype_name == "bfloat16":
            size = o.entry.name.removeprefix("ConViT-").removesuffix(" against DeiT")
            library[size], ours[size] = _over(o, LIBRARY), _over(o, "fastvit")
    series = [
        paper_series(models.CONVIT),
        *published_series(),
        ratios.Series("library", f"timm, {source.short}", library),
        ratios.Series("fastvit", f"fastvit, {source.short}", ours),
    ]
    groups = gpu.paper_groups(models.CONVIT)
    return ratios.Panel(f"{models.CONVIT}, inference", groups, series)


def _over(o: Outcome, contender: str) -> float:
    ratio = o.ratio(DEIT, contender)
    assert ratio is not None
    return ratio


def _vits(source: Source) -> ratios.Panel:
    """Training, as the paper reports it."""
    found = {result.row.name: result for result in load.results(source.data)}
    library: dict[str, float] = {}
    ours: dict[str, float] = {}
    for size in gpu.paper_groups(models.VIT_C):
        stem, plain = found.get(f"ViT_C-{size}"), found.get(f"ViT_P-{size}")
        if stem is None or plain is None:
            continue
        if stem.minutes_reference and plain.minutes_reference:
            library[size] = plain.minutes_reference / stem.minutes_reference
            if stem.minutes_fastvit:
                ours[size] = plain.minutes_reference / stem.minutes_fastvit
    series = [
        paper_series(models.VIT_C),
        ratios.Series("library", f"torchvision, {source.short}", library),
        ratios.Series("fastvit", f"fastvit, {source.short}", ours),
    ]
    return ratios.Panel(f"{models.VIT_C}, training", gpu.paper_groups(models.VIT_C), series)

# SPDX-License-Identifier: Apache-2.0
"""Pictures of the study: curves as SVG that can be read on light and on dark pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# A grey and colours that stand out from white and from black alike.
GREY = "#808890"
COLOURS = {"ViT_P": "#d9822b", "ViT_C": "#2b8fd9", "DeiT": "#d9822b", "ConViT": "#2b8fd9"}
STYLE = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": GREY,
    "axes.titlesize": "medium",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "font.size": 10,
    "grid.alpha": 0.25,
    "grid.color": GREY,
    "legend.frameon": False,
    "legend.labelcolor": GREY,
    "lines.linewidth": 1.8,
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    # Text stays text, and the same picture is the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "fastvit",
}
Result = dict[str, Any]


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    return path


def _grouped(results: Iterable[Result], *keys: str) -> dict[tuple, list[Result]]:
    """Repetitions with other seeds, by what else they are."""
    groups: dict[tuple, list[Result]] = {}
    for r in results:
        groups.setdefault(tuple(r[k] for k in keys), []).append(r)
    return groups


def _errors(runs: Sequence[Result]) -> list[float]:
    return [100 * (1 - r["val_accuracy"]) for r in runs]


def _line(axis: Axes, points: dict[float, list[float]], label: str) -> None:
    """The mean over seeds as a line, every seed as a dot."""
    xs = sorted(points)
    means = [sum(points[x]) / len(points[x]) for x in xs]
    axis.plot(xs, means, color=COLOURS[label], label=label)
    for x in xs:
        axis.plot([x] * len(points[x]), points[x], ".", color=COLOURS[label], markersize=7)


def _percent(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.set_ylim(1.5, 100)
    axis.set_yticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
    axis.minorticks_off()


def draw_rates(results: Sequence[Result], path: Path) -> Path:
    """Error against learning rate: a row for each optimiser, a column for each length."""
    optimizers = list(dict.fromkeys(r["optimizer"] for r in results))
    lengths = sorted({r["epochs"] for r in results})
    figure, axes = plt.subplots(
        len(optimizers), len(lengths), figsize=(9, 5.4), sharey=True, squeeze=False
    )
    groups = _grouped(results, "optimizer", "epochs", "model")
    for row, optimizer in zip(axes, optimizers, strict=True):
        for axis, length in zip(row, lengths, strict=True):
            for model in ("ViT_P", "ViT_C"):
                points = _grouped(groups.get((optimizer, length, model), []), "lr")
                _line(axis, {lr: _errors(runs) for (lr,), runs in points.items()}, model)
            axis.set_title(
                f"{optimizer.replace('adamw', 'AdamW').replace('sgd', 'SGD')}, {length} epochs"
            )
            axis.set_xscale("log")
            rates = sorted({r["lr"] for r in results if r["optimizer"] == optimizer})
            axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
            axis.minorticks_off()
            _percent(axis)
    for axis in axes[-1]:
        axis.set_xlabel("learning rate")
    for row in axes:
        row[0].set_ylabel("validation error, %")
    axes[0][0].legend()
    figure.tight_layout()
    return _save(figure, path)


def draw_curves(results: Sequence[Result], path: Path) -> Path:
    """Error during the longest training, at the learning rate that ends best for each."""
    longest = [r for r in results if r["epochs"] == max(x["epochs"] for x in results)]
    optimizers = list(dict.fromkeys(r["optimizer"] for r in longest))
    figure, axes = plt.subplots(1, len(optimizers), figsize=(9, 3.4), sharey=True, squeeze=False)
    for axis, optimizer in zip(axes[0], optimizers, strict=True):
        for model in ("ViT_P", "ViT_C"):
            mine = [r for r in longest if r["optimizer"] == optimizer and r["model"] == model]
            if not mine:
                continue
            by_rate = _grouped(mine, "lr")
            (rate,), runs = min(
                by_rate.items(), key=lambda item: sum(_errors(item[1])) / len(item[1])
            )
            for index, r in enumerate(runs):
                errors = [100 * (1 - e["val_accuracy"]) for e in r["evaluations"]]
                epochs = [e["epoch"] for e in r["evaluations"]]
                label = f"{model}, learning rate {rate:g}" if index == 0 else None
                axis.plot(epochs, errors, color=COLOURS[model], label=label, marker=".")
        axis.set_title(optimizer.replace("adamw", "AdamW").replace("sgd", "SGD"))
        axis.set_xlabel("epoch")
        _percent(axis)
        axis.legend()
    axes[0][0].set_ylabel("validation error, %")
    figure.tight_layout()
    return _save(figure, path)


def draw_data(results: Sequence[Result], path: Path) -> Path:
    """Error against the share of the training images."""
    figure, axis = plt.subplots(figsize=(5.4, 3.6))
    for model in ("DeiT", "ConViT"):
        points = _grouped((r for r in results if r["model"] == model), "fraction")
        _line(axis, {100 * f: _errors(runs) for (f,), runs in points.items()}, model)
    shares = sorted({100 * r["fraction"] for r in results})
    axis.set_xscale("log")
    axis.set_xticks(shares, [f"{share:g}" for share in shares])
    axis.set_xlabel("training images used, %")
    axis.set_ylabel("validation error, %")
    _percent(axis)
    axis.minorticks_off()
    axis.legend()
    figure.tight_layout()
    return _save(figure, path)


def draw_gates(results: Sequence[Result], path: Path) -> Path:
    """The gate of each head over training with all images, one panel for each GPSA layer."""
    runs = [r for r in results if r["model"] == "ConViT" and r["fraction"] == 1]
    layers = len(runs[0]["evaluations"][0]["gates"])
    figure, axes = plt.subplots(1, layers, figsize=(9, 3.2), sharey=True, squeeze=False)
    for layer, axis in enumerate(axes[0]):
        for seed, r in enumerate(runs):
            # All gates start at sigmoid(1).
            epochs = [0, *(e["epoch"] for e in r["evaluations"])]
            for head in range(len(r["evaluations"][0]["gates"][layer])):
                values = [0.7311, *(e["gates"][layer][head] for e in r["evaluations"])]
                style = ("-", "--", ":")[seed % 3]
                axis.plot(epochs, values, style, color=f"C{head}", linewidth=1.3,
                          label=f"head {head}" if seed == 0 else None)  # fmt: skip
        axis.set_title(f"GPSA layer {layer}")
        axis.set_xlabel("epoch")
    axes[0][0].set_ylabel("gate: share of position")
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return _save(figure, path)


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Every picture that the results are enough for."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = [r for r in results if r["part"] == "stem"]
    data = [r for r in results if r["part"] == "data"]
    with plt.rc_context(STYLE):
        return [
            draw_rates(stem, folder / "stem-rates.svg"),
            draw_curves(stem, folder / "stem-curves.svg"),
            draw_data(data, folder / "data.svg"),
            draw_gates(data, folder / "gates.svg"),
        ]

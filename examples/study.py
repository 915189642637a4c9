# SPDX-License-Identifier: Apache-2.0
"""The papers' claims in miniature: small models, 5000 handwritten digits, one processor core.

    pip install 'fastvit[train]'
    python examples/study.py --out runs/study --draw docs/study

Two questions. Does a convolutional stem make a vision transformer easier to optimise: ViT_P against
ViT_C with two optimisers, three learning rates and three lengths of training (arXiv 2106.14881)?
Does ConViT's soft bias help where data is short: ConViT against DeiT on 10, 30 and 100 % of the
images (arXiv 2103.10697), and what becomes of its gates?

Each finished run is kept as a JSON file, so the study can be interrupted and goes on from there;
``--draw`` writes the pictures and the summary of the runs there are. docs/study.md discusses them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Python's safe-path mode leaves the script's own folder out.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from training import checkpoint
from training.config import make
from training.loop import LOG, run

import fastvit

WIDTH = {"embed_dim": 48, "num_heads": 4, "patch_size": 8}
STEM_MODELS = {
    "ViT_P": {"model": "vit_p_1gf", "model_kwargs": {**WIDTH, "depth": 4}},
    # As in the paper, the stem takes the place of one block.
    "ViT_C": {
        "model": "vit_c_1gf",
        "model_kwargs": {
            **WIDTH,
            "depth": 3,
            "stem_channels": [12, 24, 48],
            "stem_strides": [2, 2, 2],
        },
    },
}
# Around the best of a short trial, which was of one seed.
RATES = {"adamw": (0.001, 0.004, 0.016), "sgd": (0.02, 0.1, 0.5)}
WEIGHT_DECAY = {"adamw": 0.05, "sgd": 1e-4}
LENGTHS = (3, 6, 12)

GRID = {"embed_dim": 48, "num_heads": 4, "patch_size": 7, "depth": 3}
DATA_MODELS = {
    "DeiT": {"model": "deit_tiny", "model_kwargs": GRID},
    "ConViT": {"model": "convit_tiny", "model_kwargs": {**GRID, "local_up_to_layer": 2}},
}
#: With 0.001 both were far from fitted, and 30 % of the images did worse than 10 %.
DATA_RATE = 0.004
FRACTIONS = (0.1, 0.3, 1.0)
#: Passes over all images; with a fraction, as many more passes as give the same number of steps.
PASSES = 15

COMMON = {
    "data": "mnist5k",
    "batch_size": 100,
    "label_smoothing": 0.1,
    "crop_padding": 2,
    "progress": False,
    "checkpoint_steps": 0,
}
TOY = {"data": "digits", "crop_padding": 1, "img_size": 0}


class Run(NamedTuple):
    """One training: what it shows, and the settings of ``train.py`` for it."""

    part: str
    labels: dict[str, Any]
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return "-".join([self.part, *map(str, self.labels.values())])


def stem_runs(seed: int, *, quick: bool) -> list[Run]:
    """ViT_P and ViT_C under each optimiser, learning rate and length."""
    found = []
    for length, optimizer, place, model in itertools.product(
        LENGTHS[:1] if quick else LENGTHS, RATES, range(1 if quick else 3), STEM_MODELS
    ):
        rate = RATES[optimizer][place]
        labels = {"model": model, "optimizer": optimizer, "lr": rate, "epochs": length}
        settings = {
            **COMMON,
            **STEM_MODELS[model],
            # Three strides of two need a side divisible by eight.
            "img_size": 32,
            "optimizer": optimizer,
            "lr": rate,
            "weight_decay": WEIGHT_DECAY[optimizer],
            "epochs": 1 if quick else length,
            "warmup_epochs": 0.1 * length if not quick else 0.1,
            "seed": seed,
        }
        found.append(Run("stem", {**labels, "seed": seed}, settings | (TOY if quick else {})))
    return found


def data_runs(seed: int, *, quick: bool) -> list[Run]:
    """ConViT and DeiT on a part of the images, for the same number of steps."""
    found = []
    for fraction, model in itertools.product(FRACTIONS[-1:] if quick else FRACTIONS, DATA_MODELS):
        epochs = 1 if quick else round(PASSES / fraction)
        settings = {
            **COMMON,
            **DATA_MODELS[model],
            "lr": DATA_RATE,
            "weight_decay": 0.05,
            "fraction": fraction,
            "epochs": epochs,
            "warmup_epochs": 0.1 * epochs,
            "eval_epochs": 1 if quick else epochs // PASSES,
            "seed": seed,
        }
        labels = {"model": model, "fraction": fraction, "seed": seed}
        # Twice the patch of seven.
        toy = {**TOY, "img_size": 14} if quick else {}
        found.append(Run("data", labels, settings | toy))
    return found


def all_runs(seeds: int, *, quick: bool) -> list[Run]:
    """Every run, seed by seed, so that an interrupted study has whole comparisons."""
    return [
        r
        for seed in range(seeds)
        for r in (*stem_runs(seed, quick=quick), *data_runs(seed, quick=quick))
    ]


def result(item: Run, out: Path) -> dict[str, Any]:
    """The result of a run: the one that is kept, if its settings are the same, or a new one."""
    kept = out / "results" / f"{item.name}.json"
    config = make({**item.settings, "out": str(out / "work" / item.name)})
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["settings"] == config.identity():
            return found
    # Left by a run that was interrupted, perhaps with other settings.
    shutil.rmtree(config.out, ignore_errors=True)
    summary = run(config)
    lines = [json.loads(line) for line in (Path(config.out) / LOG).open(encoding="utf-8")]
    found = {
        "part": item.part,
        **item.labels,
        "val_accuracy": summary["val_accuracy"],
        "seconds": round(summary["seconds"], 1),
        "evaluations": [line for line in lines if "val_accuracy" in line],
        "settings": config.identity(),
    }
    checkpoint.write(kept, (json.dumps(found) + "\n").encode())
    shutil.rmtree(config.out)
    return found


def processor() -> str:
    """The name of the processor, as Linux gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in text.splitlines() if "model name" in x), "?")


def summarize(results: Sequence[dict[str, Any]], folder: Path) -> None:
    """All results with where they come from, one line each."""
    head = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastvit": fastvit.__version__,
    }
    rows = ",\n".join(
        json.dumps({k: v for k, v in r.items() if k not in ("settings", "evaluations")})
        for r in results
    )
    text = f'{{"machine": {json.dumps(head)},\n"runs": [\n{rows}\n]}}\n'
    checkpoint.write(folder / "results.json", text.encode())


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="kept results")
    parser.add_argument("--draw", type=Path, help="folder for pictures and summary")
    parser.add_argument("--seeds", type=int, default=2, help="repetitions [2]")
    parser.add_argument("--part", choices=("stem", "data"), help="train for one question only")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--only-draw", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = []
    for item in all_runs(args.seeds, quick=args.quick):
        if args.part not in (None, item.part):
            continue
        if args.only_draw and not (args.out / "results" / f"{item.name}.json").exists():
            continue
        found = result(item, args.out)
        print(f"{item.name}: {found['val_accuracy']:.3f} in {found['seconds']} s", flush=True)
        results.append(found)
    if args.draw:
        from training import figures

        summarize(results, args.draw)
        figures.draw(results, args.draw)
    return results


if __name__ == "__main__":
    main()

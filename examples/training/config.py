# SPDX-License-Identifier: Apache-2.0
"""What can be set: one flat record, read from TOML or JSON and from the command line."""

# ruff: noqa: RUF009  (`option` is dataclasses.field with a help text)

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot be: ``train.py`` prints the sentence without a traceback."""


def option(default: Any, text: str, choices: Sequence[str] = (), *, runtime: bool = False) -> Any:
    """A field with its help; ``runtime`` ones may differ when a run is resumed."""
    metadata = {"help": text, "choices": tuple(choices), "runtime": runtime}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """All settings of a run, with their defaults; each is also an option of ``train.py``."""

    # What is trained on what
    model: str = option("convit_tiny", "one of fastvit.list_models()")
    model_kwargs: dict[str, Any] = option({}, "other arguments of create_model, as JSON")
    data: str = option("digits", "labelled images", ("digits", "mnist5k", "imagefolder"))
    data_dir: str = option("", "folder with train/ and perhaps val/, for imagefolder", runtime=True)
    img_size: int = option(0, "pixels of a side; 0: what the data has (imagefolder: 224)")
    fraction: float = option(1.0, "stratified share of the training images that is used")
    seed: int = option(0, "of weights, order, augmentation and the choice of a fraction")

    # Length and optimiser
    epochs: int = option(10, "passes over the training images")
    batch_size: int = option(128, "images of an optimiser step, over all ranks")
    accumulate: int = option(1, "backward passes of an optimiser step on each rank")
    optimizer: str = option("adamw", "how to descend", ("adamw", "sgd"))
    lr: float = option(1e-3, "highest learning rate")
    lr_batch: int = option(0, "scale lr by batch_size / lr_batch; 0: lr as it stands")
    weight_decay: float = option(0.05, "on weights, not on biases, norms and no_weight_decay()")
    momentum: float = option(0.9, "of sgd")
    beta2: float = option(0.999, "of adamw, whose first beta is 0.9")
    warmup_epochs: float = option(0.0, "epochs of linear warm-up")
    warmup_start: float = option(0.01, "where the warm-up starts, as a share of lr")
    min_lr: float = option(0.0, "where the cosine ends, as a share of lr")
    clip_grad: float = option(0.0, "largest norm of the gradient; 0: not clipped")
    precision: str = option("float32", "of products", ("float32", "bfloat16", "float16"))
    ema_decay: float = option(0.0, "of the moving average of the weights; 0: none is kept")
    ema_every: int = option(1, "optimiser steps between updates of the average")

    # Regularisation and augmentation
    label_smoothing: float = option(0.0, "share of the target spread over all classes")
    drop_path: float = option(0.0, "stochastic depth of the last block")
    mixup: float = option(0.0, "alpha of mixup; 0: off")
    cutmix: float = option(0.0, "alpha of CutMix; 0: off. With both, a coin decides per batch")
    flip: bool = option(False, "mirror every other image")
    crop_padding: int = option(0, "random shift by up to so many pixels (not imagefolder)")
    auto_augment: str = option("none", "imagefolder only", ("none", "autoaugment", "randaugment"))
    erasing: float = option(0.0, "probability of random erasing (imagefolder only)")

    # How it runs; these may change when a run is resumed
    out: str = option("runs/train", "folder of checkpoint, log and summary", runtime=True)
    parallel: str = option("ddp", "over ranks of torchrun", ("ddp", "fsdp"), runtime=True)
    device: str = option("auto", "cpu, cuda or auto", ("auto", "cpu", "cuda"), runtime=True)
    workers: int = option(2, "processes that read images (imagefolder only)", runtime=True)
    checkpoint_steps: int = option(200, "steps between checkpoints; 0: at the end", runtime=True)
    log_steps: int = option(20, "steps between lines of the log", runtime=True)
    eval_epochs: int = option(1, "epochs between evaluations", runtime=True)
    progress: bool = option(True, "a progress bar on rank 0", runtime=True)
    deterministic: bool = option(False, "refuse GPU operators that do not repeat", runtime=True)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.metadata["choices"] and value not in f.metadata["choices"]:
                known = ", ".join(f.metadata["choices"])
                raise ConfigError(f"{f.name}: expected one of {known}, got {value!r}")
        counts = ("epochs", "batch_size", "accumulate", "ema_every", "log_steps", "eval_epochs")
        for name in (*counts, "lr"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction: expected more than 0 and at most 1, got {self.fraction}")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs:
            raise ConfigError(
                f"warmup_epochs: expected fewer than the {self.epochs} epochs, "
                f"got {self.warmup_epochs}"
            )

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of a run: all but the runtime fields, as JSON has them."""
        kept = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if not f.metadata["runtime"]
        }
        return json.loads(json.dumps(kept))


FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def _convert(name: str, value: Any) -> Any:
    """A value of the type of the field, or a sentence that says why not."""
    f = FIELDS[name]
    default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        raise ConfigError(f"{name}: expected {type(default).__name__}, got {value!r}")
    return value


def make(settings: Mapping[str, Any]) -> Config:
    """A config of named settings.

    Raises:
        ConfigError: if a name is unknown (with the nearest one) or a value does not fit.
    """
    for name in settings:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.0)
            raise ConfigError(f"unknown setting {name!r}: did you mean {near[0]!r}?")
    return Config(**{name: _convert(name, value) for name, value in settings.items()})


def read(path: Path) -> dict[str, Any]:
    """The settings in a file: JSON if its name ends so, else TOML."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--config: {error}") from error
    try:
        if path.suffix == ".json":
            return json.loads(text)
        try:
            import tomllib
        except ModuleNotFoundError:  # Python 3.10
            import tomli as tomllib
        return tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Sentences that name the settings in which two identities differ."""
    missing = object()
    return [
        f"{name}: {theirs.get(name, 'absent')!r} there, {ours.get(name, 'absent')!r} here"
        for name in sorted({*ours, *theirs})
        if ours.get(name, missing) != theirs.get(name, missing)
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """An option of the command line for each field."""
    for name, f in FIELDS.items():
        flag = "--" + name.replace("_", "-")
        default = f.default if f.default is not dataclasses.MISSING else {}
        text = f"{f.metadata['help']} [{json.dumps(default)}]"
        if isinstance(default, bool):
            kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, dict):
            kind = {"type": json.loads, "metavar": "JSON"}
        else:
            kind = {"type": type(default), "metavar": type(default).__name__.upper()}
            if f.metadata["choices"]:
                kind |= {"choices": f.metadata["choices"], "metavar": None}
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind)

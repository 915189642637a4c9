# SPDX-License-Identifier: Apache-2.0
"""Folders of pictures, one subfolder per class, read by worker processes through torchvision."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

from training.config import Config, ConfigError
from training.data import Batch, split, subset
from training.seeds import derive

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The papers evaluate the middle 224 pixels of 256.
CROP_SHARE = 224 / 256


def _train_transform(config: Config, size: int) -> Callable:
    bicubic = InterpolationMode.BICUBIC
    policy = {
        "none": [],
        "autoaugment": [transforms.AutoAugment(interpolation=bicubic)],
        "randaugment": [transforms.RandAugment(interpolation=bicubic)],
    }[config.auto_augment]
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, interpolation=bicubic),
            *([transforms.RandomHorizontalFlip()] if config.flip else []),
            *policy,
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
            *([transforms.RandomErasing(config.erasing)] if config.erasing else []),
        ]
    )


def _val_transform(size: int) -> Callable:
    return transforms.Compose(
        [
            transforms.Resize(round(size / CROP_SHARE), interpolation=InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


class _Seeded(TorchDataset):
    """Pictures by (seed of its augmentation or None, index)."""

    def __init__(self, folder: datasets.ImageFolder, transform: Callable) -> None:
        self._folder, self._transform = folder, transform

    def __getitem__(self, key: tuple[int | None, int]) -> tuple[Tensor, int]:
        seed, index = key
        if seed is not None:
            # Whichever process reads it, the picture gets the same crop.
            random.seed(seed)
            torch.manual_seed(seed)
        path, label = self._folder.samples[index]
        return self._transform(self._folder.loader(path)), label


class Folder:
    """``data_dir/train`` and ``data_dir/val``; without the latter a fifth is held out."""

    channels = 3

    def __init__(self, config: Config) -> None:
        root = Path(config.data_dir)
        if not (root / "train").is_dir():
            raise ConfigError(f"data_dir: expected a folder with train/ in it, got {root}")
        train = datasets.ImageFolder(str(root / "train"))
        labels = torch.tensor(train.targets)
        if (root / "val").is_dir():
            val = datasets.ImageFolder(str(root / "val"))
            if val.classes != train.classes:
                odd = sorted(set(val.classes) ^ set(train.classes))
                raise ConfigError(f"data_dir: train/ and val/ differ in the classes {odd}")
            self._train_indices = subset(labels, torch.arange(len(labels)), config)
            self._val_indices = torch.arange(len(val))
        else:
            val = train
            self._train_indices, self._val_indices = split(labels, config)
        self.img_size = config.img_size or 224
        self._config = config
        self._train = _Seeded(train, _train_transform(config, self.img_size))
        self._val = _Seeded(val, _val_transform(self.img_size))
        self.num_classes = len(train.classes)
        self.num_train, self.num_val = len(self._train_indices), len(self._val_indices)

    def train_batches(self, epoch: int, batches: list[Tensor]) -> Iterator[Batch]:
        keys = [
            [(derive(self._config.seed, epoch, i), i) for i in self._train_indices[b].tolist()]
            for b in batches
        ]
        yield from self._load(self._train, keys)

    def val_batches(self, batches: list[Tensor]) -> Iterator[Batch]:
        keys = [[(None, i) for i in self._val_indices[b].tolist()] for b in batches]
        yield from self._load(self._val, keys)

    def _load(self, pictures: _Seeded, keys: list) -> Iterator[Batch]:
        loader = DataLoader(
            pictures,
            batch_sampler=keys,
            num_workers=self._config.workers,
            pin_memory=torch.cuda.is_available(),
        )
        for images, labels in loader:
            yield Batch(images, labels)

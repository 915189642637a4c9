# SPDX-License-Identifier: Apache-2.0
"""The loop: steps, evaluation, log, checkpoints, resuming."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastvit
from training import augment, checkpoint, data, optim, parallel
from training.config import Config, ConfigError, differences
from training.parallel import Ranks
from training.seeds import derive

LOG, SUMMARY = "log.jsonl", "summary.json"
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def build_model(config: Config, images: data.Dataset) -> nn.Module:
    """The model of a config for a data set, with weights from the seed."""
    torch.manual_seed(derive(config.seed, "weights"))
    return fastvit.create_model(
        config.model,
        **{
            "num_classes": images.num_classes,
            "in_chans": images.channels,
            "img_size": images.img_size,
            "drop_path_rate": config.drop_path,
            **config.model_kwargs,
        },
    )


def finite(value: float) -> float | None:
    """A number that JSON has, or None."""
    return value if math.isfinite(value) else None


class Trainer:
    """One run: ``Trainer(config, ranks).run()`` trains, or goes on where a checkpoint stands."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.folder = Path(config.out)
        self.images = data.load(config)
        self.steps_per_epoch = self.images.num_train // config.batch_size
        if not self.steps_per_epoch:
            raise ConfigError(
                f"batch_size: expected at most the {self.images.num_train} training images, "
                f"got {config.batch_size}"
            )
        self.total_steps = config.epochs * self.steps_per_epoch
        self.model = build_model(config, self.images).to(ranks.device)
        self.average = copy.deepcopy(self.model).eval() if config.ema_decay else None
        for model in filter(None, (self.model, self.average)):
            parallel.shard(model, config, ranks)
        self.replica = parallel.replicate(self.model, config, ranks)
        self.optimizer = optim.make_optimizer(config, self.model)
        half = config.precision == "float16"
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=half)
        self.step = 0
        self.lines: list[str] = []
        self.summary: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """Train to the end and return the last line of the evaluation."""
        self._resume()
        with closing(_Progress(self)) as progress:
            while self.step < self.total_steps:
                epoch, first = divmod(self.step, self.steps_per_epoch)
                for batches in self._steps(epoch, first):
                    loss, norm = self._optimize(batches)
                    self.step += 1
                    self._after_step(epoch, loss, norm, progress)
        if self.ranks.first:
            text = json.dumps(self.summary, indent=1) + "\n"
            checkpoint.write(self.folder / SUMMARY, text.encode())
        return self.summary

    def _steps(self, epoch: int, first: int) -> Iterator[list[data.Batch]]:
        """The micro-batches of each step that is left of an epoch."""
        ranks = self.ranks
        positions = data.train_positions(
            self.config, self.images.num_train, epoch, ranks.rank, ranks.world, first
        )
        batches = self.images.train_batches(epoch, positions)
        yield from zip(*[iter(batches)] * self.config.accumulate, strict=True)

    def _autocast(self) -> torch.autocast:
        dtype = PRECISIONS.get(self.config.precision)
        return torch.autocast(self.ranks.device.type, dtype, enabled=dtype is not None)

    def _optimize(self, batches: list[data.Batch]) -> tuple[Tensor, Tensor]:
        """One step of the optimiser: mean loss on this rank, norm of the gradient."""
        config = self.config
        self.replica.train()
        lr = optim.learning_rate(config, self.step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses = torch.zeros((), device=self.ranks.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with parallel.gradients_of(self.replica, last=last):
                losses += self._backward(batch, self.ranks.rank * config.accumulate + index)
        self.scaler.unscale_(self.optimizer)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, config.clip_grad or float("inf"))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average is not None and (self.step + 1) % config.ema_every == 0:
            # As long as the learning rate rises the average follows at once.
            warming = self.step < config.warmup_epochs * self.steps_per_epoch
            decay = 0.0 if warming else config.ema_decay
            optim.update_average(self.average, self.model, decay)
        return losses, norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _backward(self, batch: data.Batch, slot: int) -> Tensor:
        """Gradient of the share of one micro-batch in the loss of a step."""
        config, device = self.config, self.ranks.device
        images = batch.images.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        targets = augment.soft_targets(labels, self.images.num_classes, config.label_smoothing)
        images, targets = augment.mix(images, targets, config, self.step, slot)
        # What dropout and stochastic depth draw depends on the place in the run alone.
        torch.manual_seed(derive(config.seed, "step", self.step, slot))
        with self._autocast():
            logits = self.replica(images)
        loss = F.cross_entropy(logits.float(), targets) / config.accumulate
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _after_step(self, epoch: int, loss: Tensor, norm: Tensor, progress: _Progress) -> None:
        config, done = self.config, self.step == self.total_steps
        if self.step % config.log_steps == 0 or done:
            mean = float(self.ranks.total(loss)) / self.ranks.world
            lr = optim.learning_rate(config, self.step - 1, self.steps_per_epoch)
            self._log(step=self.step, lr=lr, loss=finite(mean), grad_norm=finite(float(norm)))
            progress.show(f"loss {mean:.3f}")
        between = self.steps_per_epoch * config.eval_epochs
        if self.step % between == 0 or done:
            scores = self.evaluate()
            self.summary = {"epoch": epoch + 1, "step": self.step, **scores}
            self._log(**self.summary)
            progress.show(f"accuracy {scores['val_accuracy']:.3f}")
        every = config.checkpoint_steps
        if done or (every and self.step % every == 0):
            self._save()
        progress.advance()

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Loss and accuracy on the validation images, and the gates of GPSA layers."""
        scores = self._score(self.model, "val_")
        if self.average is not None:
            scores |= self._score(self.average, "ema_")
        gates = self.gates()
        return {**scores, "gates": gates} if gates else scores

    def _score(self, model: nn.Module, prefix: str) -> dict[str, float | None]:
        ranks = self.ranks
        parallel.share_buffers(model, ranks)
        model.eval()
        # One image counts as much as another, so the size of a batch changes rounding only.
        size = min(self.config.batch_size, 256)
        positions, left = data.val_positions(self.images.num_val, size, ranks.rank, ranks.world)
        sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        for batch in self.images.val_batches(positions):
            with self._autocast():
                logits = model(batch.images.to(ranks.device)).float()
            labels = batch.labels.to(ranks.device)
            counted, left = min(left, len(labels)), max(left - len(labels), 0)
            losses = F.cross_entropy(logits, labels, reduction="none")[:counted]
            right = (logits.argmax(1) == labels)[:counted]
            sums += torch.stack((losses.double().sum(), right.double().sum()))
        loss, accuracy = (ranks.total(sums) / self.images.num_val).tolist()
        return {f"{prefix}loss": finite(loss), f"{prefix}accuracy": accuracy}

    def gates(self) -> list[list[float | None]]:
        """Of each GPSA layer, the share of position of each head: 1 is all position."""
        layers = [m for m in self.model.modules() if isinstance(m, fastvit.GPSA)]
        values = [layer.gating_param.detach() for layer in layers]
        whole = [v.full_tensor() if hasattr(v, "full_tensor") else v for v in values]
        return [[finite(g) for g in torch.sigmoid(v.float()).tolist()] for v in whole]

    def _log(self, **entry: Any) -> None:
        self.lines.append(json.dumps(entry))
        if self.ranks.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(self.lines[-1] + "\n")

    def _save(self) -> None:
        weights, optimizer = parallel.full_states(self.model, self.optimizer)
        average = parallel.full_weights(self.average) if self.average is not None else {}
        if not self.ranks.first:
            return
        checkpoint.save(
            self.folder,
            {
                "config": self.config.identity(),
                "world": self.ranks.world,
                "step": self.step,
                "model": weights,
                "ema": average,
                "optimizer": optimizer,
                "scaler": self.scaler.state_dict(),
                "summary": self.summary,
                "log": self.lines,
            },
        )

    def _resume(self) -> None:
        """Go on where the newest whole checkpoint of the folder stands, if there is one."""
        state, trouble, damaged = None, "", []
        if self.ranks.first:
            state, damaged = checkpoint.load(self.folder)
            odd = differences(self.config.identity(), state["config"]) if state else []
            if odd:
                trouble = f"{self.folder} holds another run: " + "; ".join(odd)
            if damaged:
                self._say(f"damaged, passed over: {', '.join(damaged)}")
        # All ranks hear of it, so that all stop.
        trouble = self.ranks.from_first(trouble)
        if trouble:
            raise ConfigError(trouble)
        state = self.ranks.from_first(state)
        if state is not None:
            parallel.restore(self.model, state["model"], self.optimizer, state["optimizer"])
            if self.average is not None:
                parallel.restore(self.average, state["ema"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.lines, self.summary = state["step"], state["log"], state["summary"]
            if state["world"] != self.ranks.world:
                self._say(
                    f"{state['world']} ranks before, {self.ranks.world} now: the same batches, "
                    "but sums in another order, so not the same bits"
                )
            self._say(f"resumed at step {self.step} of {self.total_steps}")
        if self.ranks.first:
            # Lines behind the checkpoint will be written again.
            text = "".join(line + "\n" for line in self.lines)
            checkpoint.write(self.folder / LOG, text.encode())

    def _say(self, text: str) -> None:
        if self.ranks.first:
            print(f"{self.folder}: {text}", file=sys.stderr, flush=True)


class _Progress:
    """A bar on the first rank if tqdm is there and the config wants one."""

    def __init__(self, trainer: Trainer) -> None:
        self._bar = None
        if trainer.config.progress and trainer.ranks.first:
            try:
                from tqdm import tqdm
            except ModuleNotFoundError:
                return
            self._bar = tqdm(
                total=trainer.total_steps, initial=trainer.step, unit="step", disable=None
            )

    def show(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def run(config: Config) -> dict[str, Any]:
    """Train as a config says, among the ranks of ``torchrun`` if it started this process.

    Returns:
        The last evaluation, with the seconds that this call took under ``seconds``.
    """
    started = time.perf_counter()
    ranks = parallel.start(config)
    try:
        summary = Trainer(config, ranks).run()
    finally:
        parallel.stop()
    return {**summary, "seconds": time.perf_counter() - started}

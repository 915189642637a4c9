# SPDX-License-Identifier: Apache-2.0
"""What measuring a row yields, and how minutes per epoch follow from it."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import Any

from fastvit.benchmark.rows import Complexity, Row
from fastvit.testing import Agreement

# Training images of ImageNet-1k.
IMAGES_PER_EPOCH = 1_281_167

FORMULA = "minutes = (images/b · t_fb + images/B · t_opt) / 60"


def minutes_per_epoch(
    forward_backward: float, optimizer: float, *, batch: int, batch_per_gpu: int
) -> float:
    """Minutes that one device takes for the training images of ImageNet-1k, without a loader.

    Args:
        forward_backward: seconds for forward and backward of ``batch`` images.
        optimizer: seconds for one optimiser step, which costs the same at every batch size.
        batch: images per measured step.
        batch_per_gpu: images per optimiser step and GPU in the paper: how often the optimiser
            steps in an epoch is a property of the training, not of the measurement.
    """
    per_image = forward_backward / batch + optimizer / batch_per_gpu
    return IMAGES_PER_EPOCH * per_image / 60.0


@dataclass
class Samples:
    """Seconds of every step that was timed, for one of a row's two models."""

    forward_backward: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)
    inference: list[float] = field(default_factory=list)

    def minutes(self, row: Row, batch: int) -> float | None:
        """Minutes per epoch from the medians; None if nothing was timed."""
        if not self.forward_backward:
            return None
        return minutes_per_epoch(
            statistics.median(self.forward_backward),
            statistics.median(self.optimizer),
            batch=batch,
            batch_per_gpu=row.batch_per_gpu,
        )

    def images_per_s(self, batch: int) -> float | None:
        """Inference images per second from the median; None if nothing was timed."""
        return batch / statistics.median(self.inference) if self.inference else None


@dataclass
class Result:
    """One row as measured.

    ``status`` is "ok"; "failed" if the models disagree or count otherwise than expected, and
    were not timed; "error" after an exception. ``reason`` says why in the latter two.
    """

    row: Row
    batch: int
    dtype: str
    status: str = "ok"
    reason: str | None = None
    traceback: str | None = None
    counted: Complexity | None = None
    agreements: list[Agreement] = field(default_factory=list)
    reference: Samples = field(default_factory=Samples)
    fastvit: Samples = field(default_factory=Samples)

    @property
    def steps(self) -> int:
        """Training steps timed, after warm-up."""
        return len(self.reference.forward_backward)

    @property
    def minutes_reference(self) -> float | None:
        return self.reference.minutes(self.row, self.batch)

    @property
    def minutes_fastvit(self) -> float | None:
        return self.fastvit.minutes(self.row, self.batch)

    @property
    def speedup(self) -> float | None:
        """Minutes of the library model over minutes of fastvit's."""
        return _ratio(self.minutes_reference, self.minutes_fastvit)

    @property
    def images_per_s_reference(self) -> float | None:
        return self.reference.images_per_s(self.batch)

    @property
    def images_per_s_fastvit(self) -> float | None:
        return self.fastvit.images_per_s(self.batch)

    @property
    def inference_speedup(self) -> float | None:
        """Images per second of fastvit's model over those of the library model."""
        return _ratio(self.images_per_s_fastvit, self.images_per_s_reference)

    @property
    def max_error(self) -> float | None:
        """Largest error of the fastvit model against float64, over the compared tensors.

        Each is relative to the largest element of its tensor. None if nothing was compared.
        """
        return max((a.error for a in self.agreements), default=None)

    def fail(self, reason: str) -> None:
        self.status, self.reason = "failed", reason

    def to_dict(self) -> dict[str, Any]:
        """The row of ``epoch.json``. Times are in seconds; absent figures are null."""
        row = self.row
        counted = dataclasses.asdict(self.counted) if self.counted else dict.fromkeys(_COUNTS)
        return {
            "name": row.name,
            "family": row.family,
            "table": row.table,
            "matched": row.matched,
            "source": row.source,
            "status": self.status,
            "reason": self.reason,
            **counted,
            "image_size": row.image_size,
            "batch": self.batch,
            "batch_per_gpu": row.batch_per_gpu,
            "dtype": self.dtype,
            "steps": self.steps,
            "samples_reference": self.reference.forward_backward,
            "samples_fastvit": self.fastvit.forward_backward,
            "optimizer_reference": self.reference.optimizer,
            "optimizer_fastvit": self.fastvit.optimizer,
            "inference_reference": self.reference.inference,
            "inference_fastvit": self.fastvit.inference,
            "minutes_reference": self.minutes_reference,
            "minutes_fastvit": self.minutes_fastvit,
            "speedup": self.speedup,
            "images_per_s_reference": self.images_per_s_reference,
            "images_per_s_fastvit": self.images_per_s_fastvit,
            "inference_speedup": self.inference_speedup,
            "max_error": self.max_error,
            "agreement": [{**a._asdict(), "ok": a.ok} for a in self.agreements],
            "paper": dataclasses.asdict(row.paper),
        }


_COUNTS = tuple(f.name for f in dataclasses.fields(Complexity))


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None

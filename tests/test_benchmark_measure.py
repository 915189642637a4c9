# SPDX-License-Identifier: Apache-2.0
"""One row from construction to figures, on small models of the real families."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch

from fastvit.benchmark import agreement, measure, weights
from fastvit.benchmark.agreement import compare, compared_parameters, confirm
from fastvit.benchmark.counter import count
from fastvit.benchmark.measure import Settings, measure_row
from fastvit.benchmark.rows import select_rows
from fastvit.benchmark.steps import Bench, make_optimizer, synthetic_batch
from fastvit.models import create_model
from fastvit.testing import Agreement

CPU = torch.device("cpu")
SIZE, WIDTH, HEADS, DEPTH = 32, 64, 4, 2


def small_library(row):
    from timm.models.convit import ConVit
    from timm.models.vision_transformer import VisionTransformer as TimmViT
    from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

    if row.family == "ResNet":
        from torchvision.models.resnet import BasicBlock, ResNet

        return ResNet(BasicBlock, [1, 1, 1, 1])
    if row.family == "ConViT":
        return ConVit(
            img_size=SIZE,
            embed_dim=WIDTH // HEADS,
            depth=DEPTH,
            num_heads=HEADS,
            local_up_to_layer=1,
        )
    if row.family == "DeiT":
        return TimmViT(img_size=SIZE, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS)
    stem = None
    if row.family == "ViT_C":
        stem = [ConvStemConfig(c, 3, 2) for c in (8, 16, 24, 32)]
    return VisionTransformer(SIZE, 16, DEPTH, HEADS, WIDTH, 4 * WIDTH, conv_stem_configs=stem)


def small_fastvit(row):
    kwargs = {"embed_dim": WIDTH, "num_heads": HEADS, "depth": DEPTH, "mlp_ratio": 4.0}
    if row.family == "ConViT":
        kwargs["local_up_to_layer"] = 1
    if row.family == "ViT_C":
        kwargs["stem_channels"] = (8, 16, 24, 32)
    return create_model(row.fastvit, img_size=SIZE, **kwargs)


@pytest.fixture
def small(monkeypatch):
    """Rows of the tables whose models are small."""
    monkeypatch.setattr(weights, "build_library", small_library)
    monkeypatch.setattr(weights, "build_fastvit", small_fastvit)

    def row(name):
        (published,) = select_rows([name])
        with torch.device("meta"):
            verified = count(small_library(published), SIZE)
        return dataclasses.replace(published, image_size=SIZE, verified=verified)

    return row


def pair(row, dtype=torch.float32, seed=0):
    library = weights.library_model(row, device=CPU, dtype=dtype, seed=seed)
    return library, weights.fastvit_model(row, library)


FAMILIES = ("DeiT-S", "ConViT-S", "ViT_P-1GF", "ViT_C-1GF")


class TestWeights:
    @pytest.mark.parametrize("name", [*FAMILIES, "ResNet-50"])
    def test_every_tensor_has_a_value_that_hides_nothing(self, small, name):
        model = weights.library_model(small(name), device=CPU, dtype=torch.float32)
        for key, tensor in model.named_parameters():
            assert tensor.isfinite().all(), key
            assert tensor.std() > 0, key
        for key, tensor in model.named_buffers():
            assert tensor.isfinite().all(), key
            if key.endswith(("running_mean", "running_var")):
                assert tensor.std() > 0, key

    def test_the_seed_decides(self, small):
        row = small("ConViT-S")
        first, again = pair(row)[0].state_dict(), pair(row)[0].state_dict()
        other = pair(row, seed=1)[0].state_dict()
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert not any(torch.equal(first[key], other[key]) for key in first)

    def test_a_buffer_that_nothing_fills_is_refused(self, small, monkeypatch):
        def with_buffer(row):
            model = small_library(row)
            model.register_buffer("table", torch.ones(2), persistent=False)
            return model

        monkeypatch.setattr(weights, "build_library", with_buffer)
        with pytest.raises(RuntimeError, match=r"nothing here gives the buffers \['table'\]"):
            pair(small("DeiT-S"))


class TestAgreement:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", FAMILIES)
    def test_the_same_model_passes(self, small, name, dtype):
        row = small(name)
        library, ours = pair(row, dtype)
        batches = (
            synthetic_batch(row, 2, device=CPU, dtype=dtype, seed=seed)[0] for seed in range(3)
        )
        compared = confirm(row, library, ours, batches)
        assert [a.name for a in compared] == [
            "output in eval()",
            "output in train()",
            "gradient of the images",
            *(f"gradient of {name}" for name in compared_parameters(row)),
        ]
        assert all(a.ok for a in compared), compared
        # Zero would be no measurement: the expectation is a float64 model.
        assert all(a.reference_error > 0 for a in compared)

    @pytest.mark.parametrize(
        ("name", "key"),
        [
            ("ConViT-S", "blocks.0.attn.gating_param"),
            ("ConViT-S", "blocks.0.attn.pos_proj.weight"),
            ("ConViT-S", "cls_token"),
            ("DeiT-S", "pos_embed"),
            ("DeiT-S", "head.bias"),
            ("ViT_P-1GF", "patch_embed.proj.bias"),
            ("ViT_C-1GF", "patch_embed.backbone.0.bn.running_var"),
            ("ViT_C-1GF", "patch_embed.backbone.3.bn.weight"),
        ],
    )
    def test_one_tensor_that_is_off_by_a_thousandth_fails(self, small, name, key):
        row = small(name)
        library, ours = pair(row)
        ours.state_dict()[key].mul_(1.001)
        images, _ = synthetic_batch(row, 2, device=CPU, dtype=torch.float32)
        assert not all(a.ok for a in compare(row, library, ours, images))

    def test_a_wrong_gradient_behind_a_right_output_fails(self, small):
        row = small("ConViT-S")
        library, ours = pair(row)
        ours.blocks[0].attn.gating_param.register_hook(lambda grad: 1.01 * grad)
        images, _ = synthetic_batch(row, 2, device=CPU, dtype=torch.float32)
        wrong = [a.name for a in compare(row, library, ours, images) if not a.ok]
        assert wrong == ["gradient of blocks.0.attn.gating_param"]

    def test_nan_is_a_disagreement(self, small):
        row = small("DeiT-S")
        library, ours = pair(row)
        ours.head.bias.data[0] = float("nan")
        images, _ = synthetic_batch(row, 2, device=CPU, dtype=torch.float32)
        assert not compare(row, library, ours, images)[0].ok

    def test_chance_disagrees_once_and_a_fault_every_time(self, small, monkeypatch):
        """Rounding next to the kink of a ReLU moves single elements, on one batch or another."""
        ok = Agreement("output", 1e-7, 1e-7, 2e-7)
        off = Agreement("gradient", 9e-7, 1e-7, 2e-7)
        fine = off._replace(error=1e-7)
        outcomes = {"chance": [[ok, off], [ok, fine]], "fault": [[ok, off], [ok, off], [ok, off]]}
        for kind, expected in outcomes.items():
            answers = iter(expected)
            monkeypatch.setattr(agreement, "compare", lambda *args, a=answers: next(a))
            kept = confirm(None, None, None, range(3))
            assert kept == [ok, fine if kind == "chance" else off]
            assert next(answers, None) is None


class TestMeasureRow:
    def test_times_both_models_in_turns(self, small, monkeypatch):
        calls = []
        step = Bench.train_step

        def recorded(bench):
            calls.append(bench)
            step(bench)

        monkeypatch.setattr(Bench, "train_step", recorded)
        result = measure_row(small("ConViT-S"), Settings(CPU, steps=4))
        assert (result.status, result.steps) == ("ok", 4), result.reason
        library, ours = calls[:2]
        assert calls == [library, ours] * 5  # one round of warm-up, dropped
        for samples in (result.reference, result.fastvit):
            lengths = [len(s) for s in dataclasses.astuple(samples)]
            assert lengths == [4, 4, 4]
            assert all(seconds > 0 for s in dataclasses.astuple(samples) for seconds in s)

    def test_optimisers_are_the_papers(self, small):
        model = small_library(small("DeiT-S"))
        adamw = make_optimizer(small("DeiT-S"), model)
        assert isinstance(adamw, torch.optim.AdamW)
        assert adamw.defaults["fused"]
        sgd = make_optimizer(small("ResNet-50"), model)
        assert isinstance(sgd, torch.optim.SGD)
        assert sgd.defaults["momentum"] == 0.9

    def test_a_network_without_a_fastvit_model_is_timed_alone(self, small):
        result = measure_row(small("ResNet-50"), Settings(CPU, steps=1))
        assert result.status == "ok"
        assert result.minutes_reference > 0
        assert result.minutes_fastvit is result.speedup is result.max_error is None

    def test_a_wrong_count_fails_and_is_not_timed(self, small):
        row = small("DeiT-S")
        off = dataclasses.replace(row.verified, acts=row.verified.acts + 1)
        result = measure_row(dataclasses.replace(row, verified=off), Settings(CPU))
        assert (result.status, result.steps) == ("failed", 0)
        assert f"acts={row.verified.acts})" in result.reason

    def test_an_exception_becomes_the_result(self, small, monkeypatch):
        def broken(*args):
            raise ZeroDivisionError("in the optimiser")

        monkeypatch.setattr(measure, "make_optimizer", broken)
        result = measure_row(small("DeiT-S"), Settings(CPU))
        assert (result.status, result.reason) == ("error", "ZeroDivisionError: in the optimiser")
        assert "Traceback" in result.traceback

    @pytest.mark.parametrize("fault", [None, "gate", "exception"])
    def test_both_models_are_freed(self, small, monkeypatch, fault):
        alive = []

        def watched(build):
            def wrapper(row, *args, **kwargs):
                model = build(row, *args, **kwargs)
                alive.append(weakref.ref(model))
                return model

            return wrapper

        monkeypatch.setattr(measure, "library_model", watched(weights.library_model))
        monkeypatch.setattr(measure, "fastvit_model", watched(weights.fastvit_model))
        if fault == "gate":
            monkeypatch.setattr(measure, "confirm", lambda *args: [_disagreement()])
        if fault == "exception":
            monkeypatch.setattr(Bench, "train_step", lambda bench: bench.no_such_thing)
        gc.disable()
        try:
            measure_row(small("ConViT-S"), Settings(CPU, steps=1))
        finally:
            gc.enable()
        assert len(alive) == 2
        assert [ref() for ref in alive] == [None, None]


def _disagreement():
    return Agreement("output", 1.0, 0.0, 0.1)


class TestSettings:
    @pytest.mark.parametrize(
        ("name", "device", "batch", "expected"),
        [
            ("DeiT-S", "cpu", None, 2),
            ("ResNet-200", "cpu", None, 1),
            ("ResNet-200", "cpu", 7, 7),
            ("DeiT-S", "cuda", None, 128),
            ("RegNetZ-32GF", "cuda", None, 32),
        ],
    )
    def test_batch(self, name, device, batch, expected):
        (row,) = select_rows([name])
        assert Settings(torch.device(device), batch=batch).batch_for(row) == expected

    @pytest.mark.parametrize(
        ("settings", "step_seconds", "expected"),
        [
            ({"device": "cpu"}, 0.1, 3),
            ({"device": "cuda"}, 0.1, 20),
            ({"device": "cpu", "seconds": 20.0}, 8.0, 2),
            ({"device": "cpu", "seconds": 20.0}, 500.0, 1),
            ({"device": "cpu", "steps": 9, "seconds": 20.0}, 500.0, 9),
            ({"device": "cpu", "steps": 9, "timed": False}, 0.1, 1),
        ],
        ids=["cpu", "gpu", "capped", "at-least-one", "as-asked", "smoke"],
    )
    def test_steps(self, settings, step_seconds, expected):
        settings = Settings(**{**settings, "device": torch.device(settings["device"])})
        assert settings.steps_within(step_seconds) == expected

    def test_a_batch_that_does_not_fit_is_halved(self, small, monkeypatch):
        """On a GPU the paper's batch may not fit; forced here, where no GPU is needed."""
        step = Bench.train_step

        def limited(bench):
            if len(bench._images) > 2:
                raise torch.OutOfMemoryError("too much")
            step(bench)

        monkeypatch.setattr(Bench, "train_step", limited)
        monkeypatch.setattr(Settings, "batch_for", lambda self, row: 8)
        result = measure_row(small("DeiT-S"), Settings(CPU, steps=1))
        assert (result.status, result.batch) == ("ok", 2), result.reason
        asked = measure_row(small("DeiT-S"), Settings(CPU, steps=1, batch=8))
        assert (asked.status, asked.reason) == ("error", "OutOfMemoryError: too much")

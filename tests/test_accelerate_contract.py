# SPDX-License-Identifier: Apache-2.0
"""What ``accelerate``, ``restore`` and ``report`` promise: in place, reversible, all or nothing."""

from __future__ import annotations

import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from library_models import (
    MODELS,
    build,
    images,
    output,
)
from torch import Tensor, nn

import fastvit

MODEL_NAMES = list(MODELS)


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def attributes(model: nn.Module) -> dict[str, dict[str, object]]:
    """Everything that hangs on each module, by identity; what dicts hold, one level down."""

    def identities(value: object) -> object:
        return {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)

    return {
        name: {key: identities(value) for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }


def state(model: nn.Module) -> tuple[object, ...]:
    return (
        classes(model),
        attributes(model),
        {name: id(module) for name, module in model.named_modules()},
    )


def assert_same(model: nn.Module, before: tuple[object, ...]) -> None:
    """Compare with an earlier ``state(model)`` and name what differs."""
    for now, then in zip(state(model), before, strict=True):
        differs = {path: (now.get(path), then.get(path)) for path in now if now[path] != then[path]}
        assert now.keys() == then.keys()
        assert not differs


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return output(model, images())


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_only_classes_change_and_restore_puts_them_back(name: str) -> None:
    model = build(name)
    before, own, modules = state(model)
    keys = list(model.state_dict())
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    report = fastvit.accelerate(model)
    assert Counter(e.layer for e in report.swapped) == MODELS[name].swapped
    changed = {n for n, cls in classes(model).items() if cls is not before[n]}
    assert {e.name for e in report.swapped} <= changed | {""}
    for path, module in model.named_modules():
        assert isinstance(module, before[path])
        assert id(module) == modules[path]
    assert list(model.state_dict()) == keys
    for now, then in (
        (dict(model.named_parameters()), parameters),
        (dict(model.named_buffers()), buffers),
    ):
        assert now.keys() == then.keys()
        assert all(now[key] is then[key] for key in now)
    assert fastvit.restore(model) == len(changed)
    assert_same(model, (before, own, modules))
    assert fastvit.restore(model) == 0


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_restore_after_use(name: str) -> None:
    """Nothing of ours stays after forward and backward either."""
    model = build(name)
    output(model, images()).sum().backward()
    before, expected = state(model), run(model)
    fastvit.accelerate(model)
    output(model, images()).sum().backward()
    fastvit.restore(model)
    assert classes(model) == before[0]
    names = [{n: set(own) for n, own in s[1].items()} for s in (state(model), before)]
    assert names[0] == names[1]
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_layout_of_gradients(name: str) -> None:
    """DistributedDataParallel and the optimisers' fast paths want that of the parameter."""
    model = build(name)
    fastvit.accelerate(model)
    output(model, images()).sum().backward()
    strides = {n: (p.grad.stride(), p.stride()) for n, p in model.named_parameters()}
    assert not {n: pair for n, pair in strides.items() if pair[0] != pair[1]}


def test_hooks_flags_and_optimizer_stay() -> None:
    model = build("timm-convit")
    calls = []
    attention = model.blocks[0].attn
    attention.register_forward_hook(lambda *_: calls.append("forward"))
    attention.register_full_backward_hook(lambda *_: calls.append("backward"))
    attention.my_flag = object()
    flag = attention.my_flag
    model.pos_embed.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(images()).sum().backward()
    optimizer.step()
    moments = {id(p): s["exp_avg"] for p, s in optimizer.state.items()}
    fastvit.accelerate(model)
    optimizer.zero_grad()
    before = model.blocks[0].attn.qk.weight.clone()
    model(images()).sum().backward()
    optimizer.step()
    assert calls == ["forward", "backward"] * 2
    assert attention.my_flag is flag
    assert model.pos_embed.grad is None
    assert all(s["exp_avg"] is moments[id(p)] for p, s in optimizer.state.items())
    assert not torch.equal(model.blocks[0].attn.qk.weight, before)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_idempotent(name: str) -> None:
    model = build(name)
    plain = state(model)
    fastvit.accelerate(model)
    once = classes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = fastvit.accelerate(model)
    assert again
    assert classes(model) == once
    again.undo()  # that call changed nothing
    assert classes(model) == once
    fastvit.restore(model)
    assert_same(model, plain)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_report_says_what_accelerate_said(name: str) -> None:
    model = build(name)
    made = fastvit.accelerate(model)
    assert fastvit.report(model).to_dict() == made.to_dict()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_undo_of_nested_calls(order: tuple[int, int]) -> None:
    model = build("timm-convit")
    plain, reports, after = state(model), [], []
    for layers in (("gpsa",), ("gpsa", "mhsa", "patch_embed")):
        reports.append(fastvit.accelerate(model, layers=layers))
        after.append(classes(model))
    assert after[0] != after[1]
    reports[order[0]].undo()
    if order == (1, 0):
        assert classes(model) == after[0]
    reports[order[1]].undo()
    assert_same(model, plain)
    reports[0].undo()
    reports[1].undo()
    assert_same(model, plain)


def test_context_manager() -> None:
    model = build("timm-convit")
    plain = state(model)
    with fastvit.accelerate(model, layers=["mhsa"]) as outer:
        one = state(model)
        with fastvit.accelerate(model):
            assert state(model) != one
        assert_same(model, one)
        assert outer
    assert_same(model, plain)
    with pytest.raises(KeyError), fastvit.accelerate(model):
        raise KeyError
    assert_same(model, plain)


def test_layers_where_and_strict() -> None:
    model = build("timm-convit")
    plain, asked = state(model), {}

    def first_block(name: str, module: nn.Module) -> bool:
        asked[name] = module
        return name.startswith("blocks.0.")

    report = fastvit.accelerate(model, layers=("gpsa",), where=first_block, strict=True)
    assert asked == {f"blocks.{i}.attn": model.blocks[i].attn for i in range(2)}
    assert [e.name for e in report.swapped] == ["blocks.0.attn"]
    fastvit.restore(model)
    assert_same(model, plain)
    model.blocks[1].attn.pos_proj = nn.Sequential(model.blocks[1].attn.pos_proj)
    edited = state(model)
    with pytest.raises(fastvit.NotAccelerated, match=r"blocks\.1\.attn") as error:
        fastvit.accelerate(model, strict=True)
    assert isinstance(error.value, RuntimeError)
    assert [e.name for e in error.value.report.skipped] == ["blocks.1.attn"]
    assert_same(model, edited)
    assert fastvit.accelerate(model, where=lambda name, _: "1" not in name, strict=True)
    with pytest.raises(fastvit.NotAccelerated):
        fastvit.accelerate(nn.Linear(2, 2), strict=True)


def test_where_that_raises_changes_nothing() -> None:
    model = build("timm-convit")
    plain = state(model)

    def where(name: str, module: nn.Module) -> bool:
        if name == "blocks.2.attn":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        fastvit.accelerate(model, where=where)
    assert_same(model, plain)


@pytest.mark.parametrize(
    ("options", "nearest"),
    [
        ({"layers": ["gpsaa"]}, "gpsa"),
        ({"layers": ["patchembed"]}, "patch_embed"),
        ({"mode": "inference"}, "infer"),
        ({"backend": "tritn"}, "triton"),
    ],
    ids=str,
)
def test_unknown_names(options: dict[str, object], nearest: str) -> None:
    model = build("timm-convit")
    plain = state(model)
    with pytest.raises(ValueError, match=f"\\b{nearest}\\b"):
        fastvit.accelerate(model, **options)
    assert_same(model, plain)


def test_one_layer_as_a_string() -> None:
    model = build("timm-convit")
    try:
        report = fastvit.accelerate(model, layers="gpsa")
    except (TypeError, ValueError) as error:
        assert "layers" in str(error)  # noqa: PT017
    else:
        assert {e.layer for e in report.swapped} == {"gpsa"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: "model",
        lambda: nn.Linear,
        lambda: build("timm-vit").forward,
        lambda: torch.compile(build("timm-vit")),
        lambda: torch.jit.trace(build("sequential"), images()),
    ],
    ids=["None", "str", "class", "method", "compiled", "traced"],
)
def test_not_a_module(make: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=r"model|compile|script"):
        fastvit.accelerate(make())


def test_compiled_in_place() -> None:
    model = build("timm-vit")
    model.compile(backend="eager")
    with pytest.raises(TypeError, match="compile"):
        fastvit.accelerate(model)


def test_restore_and_report_of_no_module() -> None:
    for function in (fastvit.restore, fastvit.report):
        with pytest.raises(TypeError):
            function("model")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_wrappers(tmp_path: Path) -> None:
    inner = build("timm-vit")
    with pytest.warns(UserWarning, match="DataParallel"):
        report = fastvit.accelerate(nn.DataParallel(inner))
    assert len(report.swapped) == 3
    assert fastvit.restore(inner) >= 3
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(inner)
        with pytest.warns(UserWarning, match="DistributedDataParallel"):
            assert fastvit.accelerate(wrapped)
        wrapped(images()).sum().backward()
        assert all(p.grad is not None for p in inner.parameters())
        assert fastvit.restore(wrapped) >= 3
    finally:
        torch.distributed.destroy_process_group()


def test_one_line_with_counts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="fastvit"):
        fastvit.accelerate(build("timm-convit"))
    lines = [r for r in caplog.records if r.name.split(".")[0] == "fastvit"]
    assert [r.levelname for r in lines] == ["INFO"]
    for text in ("ConVit".lower(), "2 gpsa", "1 mhsa", "1 patch_embed"):
        assert text in lines[0].getMessage().lower()


def test_one_warning_when_nothing_matched() -> None:
    with pytest.warns(UserWarning, match="nothing") as caught:
        report = fastvit.accelerate(nn.Sequential(nn.Linear(2, 2)))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert not report
    assert report.swapped == report.skipped == ()


def test_report() -> None:
    model = build("pycls-vit_p")
    assert not fastvit.report(model)
    made = fastvit.accelerate(model)
    for report in (made, fastvit.report(model)):
        (swapped,), (skipped,) = report.swapped, report.skipped
        assert swapped.layer == "patch_embed"
        assert swapped.backend in ("torch", "native", "triton")
        assert (skipped.name, skipped.layer) == ("self_attention", "mhsa")
        assert "MultiheadAttention" in skipped.reason
        assert all(text in str(report) for text in (swapped.name, skipped.name, skipped.reason))
        as_json = json.loads(json.dumps(report.to_dict()))
        assert [e["name"] for e in as_json["skipped"]] == ["self_attention"]
        assert as_json["swapped"][0] == swapped._asdict()
    model.double()
    fastvit.restore(model)
    assert not fastvit.report(model).swapped


def test_backends() -> None:
    model = build("timm-convit")
    expected = run(model)
    plain = state(model)
    report = fastvit.accelerate(model, backend="reference")
    assert {e.backend for e in report.swapped} == {"reference"}
    assert len(report.swapped) == 4
    torch.testing.assert_close(run(model), expected, rtol=2e-5, atol=2e-5)
    fastvit.restore(model)
    with pytest.raises(fastvit.NotAccelerated, match="native") as error:
        fastvit.accelerate(model, layers=("gpsa", "mhsa"), backend="native")
    assert len(error.value.report.skipped) == 3
    assert all(e.reason for e in error.value.report.skipped)
    assert_same(model, plain)


def test_backend_of_the_process_is_followed() -> None:
    model = build("timm-convit")
    fastvit.accelerate(model)
    with fastvit.backend("reference"):
        assert {e.backend for e in fastvit.report(model).swapped} == {"reference"}
    assert "torch" in {e.backend for e in fastvit.report(model).swapped}

# SPDX-License-Identifier: Apache-2.0
"""Accelerated models under failure, verification, freezing, copying and sharing."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from library_models import MODELS, build, images, output
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import fastvit

MODEL_NAMES = list(MODELS)
PACKAGE = str(Path(fastvit.__file__).parent)


def snapshot(model: nn.Module) -> dict[str, dict[str, object]]:
    """Class, attributes and training flag of every module, by identity."""

    def identities(value: object) -> object:
        return {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)

    return {
        name: {"class": type(m), **{key: identities(value) for key, value in vars(m).items()}}
        for name, m in model.named_modules()
    }


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return output(model, images())


class Fault(Exception):
    pass


@contextlib.contextmanager
def fault_at(step: int) -> Iterator[list[str]]:
    """Raise :class:`Fault` when fastvit enters its ``step``-th function; that one is yielded."""
    entered = 0
    where: list[str] = []

    def trace(frame: FrameType, event: str, argument: object) -> None:
        nonlocal entered
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and not where:
            entered += 1
            if entered > step + 1:  # the first is accelerate itself
                where.append(f"{code.co_filename}:{code.co_firstlineno} {code.co_name}")
                sys.setprofile(None)
                raise Fault(where[0])

    before = sys.getprofile()
    sys.setprofile(trace)
    try:
        yield where
    finally:
        sys.setprofile(before)


def accelerate_with_fault(model: nn.Module, step: int, **options: object) -> str:
    """Where the fault was, or "" if accelerate took fewer steps."""
    report = None
    with fault_at(step) as where, contextlib.suppress(Fault):
        report = fastvit.accelerate(model, **options)
    if report and where:  # raised where a generator was closed: Python drops that
        report.undo()
    return "".join(where)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("name", ["timm-vit_c", "torchvision-vit_p", "convit"])
def test_fault_at_every_step(name: str, mode: str) -> None:
    model = build(name)
    run(model)
    fastvit.accelerate(copy.deepcopy(model), mode=mode)  # imports and caches are done
    plain, faults, done = snapshot(model), 0, False
    while not done:
        done = not accelerate_with_fault(model, faults, mode=mode)
        if not done:
            faults += 1
            assert snapshot(model) == plain
    assert faults > 20
    fastvit.restore(model)
    assert snapshot(model) == plain


@pytest.mark.filterwarnings("ignore")
def test_fault_while_a_second_call_runs() -> None:
    """What an earlier call made stays."""
    model = build("timm-convit")
    fastvit.accelerate(model, layers=["gpsa"])
    before = snapshot(model)
    step = 0
    while where := accelerate_with_fault(model, step):
        assert snapshot(model) == before, where
        step += 5
    assert len(fastvit.report(model).swapped) == 4


def forward_that(fails: Callable[[int], bool], wrong: float) -> tuple[nn.Module, list[int]]:
    """A model of which the calls with those numbers raise, and all after the first are off."""
    model, calls = build("timm-convit"), []

    def hook(module: nn.Module, args: object, out: Tensor) -> Tensor:
        calls.append(len(calls))
        if fails(calls[-1]):
            raise Fault
        return out + wrong * calls[-1]

    model.register_forward_hook(hook)
    return model, calls


@pytest.mark.parametrize("call", [0, 1])
def test_verify_that_fails_in_the_model(call: int) -> None:
    model, _ = forward_that(lambda i: i == call, 0.0)
    plain = snapshot(model)
    with pytest.raises(Fault):
        fastvit.accelerate(model, verify=images())
    classes = {name: own["class"] for name, own in plain.items()}
    assert {name: type(m) for name, m in model.named_modules()} == classes


def test_verify_that_finds_a_difference() -> None:
    model, calls = forward_that(lambda i: False, 0.1)
    with pytest.raises(fastvit.NotAccelerated, match=r"differ|output"):
        fastvit.accelerate(model, verify=images())
    assert len(calls) == 2
    assert not fastvit.report(model).swapped


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_verify(name: str) -> None:
    """In eval mode, without gradients, and nothing of it remains."""
    model = build(name).train()
    next(model.children()).eval()
    flags = {n: m.training for n, m in model.named_modules()}
    values = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    report = fastvit.accelerate(model, verify=images())
    assert report.max_error is not None
    assert 0 <= report.max_error < 1e-5
    assert torch.equal(torch.get_rng_state(), rng)
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_forms_of_verify() -> None:
    x = images()
    for example in (x, (x,), [x], {"x": x}):
        model = build("timm-vit")
        assert fastvit.accelerate(model, verify=example).max_error is not None
    assert (
        fastvit.accelerate(
            build("transformers-vit"), verify={"pixel_values": x}, mode="infer"
        ).to_dict()["max_error"]
        < 1e-5
    )
    with pytest.raises(Exception, match=r"."):
        fastvit.accelerate(build("timm-vit"), verify="images")


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_infer_is_a_snapshot(name: str) -> None:
    model = build(name)
    expected, values = run(model), copy.deepcopy(model.state_dict())
    assert fastvit.accelerate(model, mode="infer")
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    assert model.eval() is model
    for forbidden in (
        lambda: model.train(),
        lambda: model.load_state_dict(values),
        lambda: output(model, images()).sum().backward(),
        lambda: output(model, images().requires_grad_()).sum().backward(),
    ):
        with pytest.raises(RuntimeError, match=r"fastvit\.restore"):
            forbidden()
        model.eval()
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(output(model, images()), expected, rtol=1e-4, atol=1e-4)
    if name != "convit":  # whose table of offsets stays float32
        model.double()
        with torch.no_grad():
            out = output(model, images().double())
        assert out.dtype == torch.float64
        torch.testing.assert_close(out.float(), expected, rtol=1e-4, atol=1e-4)
        model.float()
    fastvit.restore(model)
    model.load_state_dict({k: torch.zeros_like(v) for k, v in values.items()})
    model.train()
    output(model, images()).sum().backward()
    model.load_state_dict(values)
    torch.testing.assert_close(run(model.eval()), expected)


def test_train_of_a_part_of_a_frozen_model() -> None:
    model = build("timm-vit_c")
    fastvit.accelerate(model, mode="infer")
    with pytest.raises(RuntimeError, match=r"fastvit\.restore"):
        model.patch_embed.train()


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_infer_needs_eval(name: str) -> None:
    model = build(name).train()
    plain = snapshot(model)
    with pytest.raises(ValueError, match=r"eval\(\)"):
        fastvit.accelerate(model, mode="infer")
    assert snapshot(model) == plain


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_change_of_mode(mode: str) -> None:
    """A second call with another mode counts."""
    model = build("timm-vit_c")
    expected = run(model)
    fastvit.accelerate(model, mode=mode)
    fastvit.accelerate(model, mode="infer" if mode == "train" else "train")
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    if mode == "infer":
        output(model.train(), images()).sum().backward()
    else:
        with pytest.raises(RuntimeError, match=r"fastvit\.restore"):
            model.train()


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies(name: str, mode: str, how: str) -> None:
    model = build(name)
    expected = run(model)
    plain = {n: type(m) for n, m in model.named_modules()}
    fastvit.accelerate(model, mode=mode)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    torch.testing.assert_close(run(other), expected, rtol=1e-4, atol=1e-4)
    own = {id(p) for p in model.parameters()}
    assert own.isdisjoint({id(p) for p in other.parameters()})
    fastvit.restore(other)
    assert {n: type(m) for n, m in other.named_modules()} == plain
    assert fastvit.report(model).swapped
    assert torch.equal(run(other), expected)


def test_saved_model_in_a_new_process(tmp_path: Path) -> None:
    """Also where nobody imported fastvit before."""
    model = build("timm-convit")
    fastvit.accelerate(model)
    torch.save({"model": model, "x": images(), "y": run(model)}, tmp_path / "model.pt")
    code = """
        import sys, torch
        saved = torch.load(sys.argv[1], weights_only=False)
        with torch.no_grad():
            torch.testing.assert_close(saved["model"](saved["x"]), saved["y"])
        import fastvit
        assert fastvit.restore(saved["model"]) >= 4
        assert not any("fastvit" in type(m).__module__ for m in saved["model"].modules())
    """
    arguments = [sys.executable, "-P", "-c", textwrap.dedent(code), str(tmp_path / "model.pt")]
    subprocess.run(arguments, check=True, timeout=120)


def test_shared_modules() -> None:
    model = build("timm-convit")
    model.blocks[1] = model.blocks[0]
    model.twin = model.blocks[2].attn
    expected = run(model)
    report = fastvit.accelerate(model)
    assert len(report.swapped) == 3
    torch.testing.assert_close(run(model), expected, rtol=2e-5, atol=2e-5)
    report.undo()
    assert torch.equal(run(model), expected)


def test_part_of_a_model_inside_a_larger_one() -> None:
    """Per instance: the teacher of the same class is not touched, nor is the class."""
    student, teacher = build("timm-vit"), build("timm-vit")
    both = nn.ModuleDict({"student": student, "teacher": teacher})
    assert fastvit.accelerate(both["student"])
    assert {e.name.split(".")[0] for e in fastvit.report(both).swapped} == {"student"}
    assert not fastvit.report(teacher).swapped
    assert not fastvit.report(build("timm-vit")).swapped
    assert fastvit.accelerate(both, where=lambda name, _: name.startswith("student"))
    assert not fastvit.report(teacher).swapped


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A group of one process on the CPU."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_sharded_modules(mesh: DeviceMesh) -> None:
    """Sharding comes after; what is sharded already is left alone and said to be."""
    model = build("timm-vit")
    expected = run(model)
    for block in model.blocks:
        fully_shard(block.attn, mesh=mesh)
    report = fastvit.accelerate(model)
    assert [e.layer for e in report.swapped] == ["patch_embed"]
    assert all("shard" in e.reason for e in report.skipped)
    torch.testing.assert_close(run(model), expected, rtol=2e-5, atol=2e-5)

    flat = FullyShardedDataParallel(build("timm-vit"), device_id=torch.device("cpu"))
    report = fastvit.accelerate(flat)
    assert not report.swapped
    assert all("shard" in e.reason.lower() or "FSDP" in e.reason for e in report.skipped)
    torch.testing.assert_close(run(flat), expected, rtol=2e-5, atol=2e-5)


def test_sharding_after_accelerate(mesh: DeviceMesh) -> None:
    model, plain = build("timm-vit"), build("timm-vit")
    assert fastvit.accelerate(model)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = []
    for m in (model, plain):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.01)
        for _ in range(2):
            loss = m(images()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="put over it"):
        fastvit.restore(model)

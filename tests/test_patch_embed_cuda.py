# SPDX-License-Identifier: Apache-2.0
"""Backend ``native`` of the patch embedding on a GPU, where there is none: the Python side over the
emulated kernels, the Hopper kernel among them, and the check that they must pass.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import _native, reference
from fastvit.ops import patch_embed, patch_embed_cuda, patch_embed_torch, patch_embed_trust, trust
from fastvit.ops.backend import Call, choose, refusal
from fastvit.ops.patch_embed_cuda import Kernels
from fastvit.testing import assert_agreement, poisoned_allocations

MEAN, STD = (0.485, 0.1, 0.406), (0.229, 0.224, 1.0)
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
NOTHING_ADDED = {"cls_token": None, "pos_embed": None}


class Emulated:
    """The functions of ``fastvit._C`` that run on a GPU, by the emulator."""

    def __init__(self, module: Any, processor: Any) -> None:
        self.module = module
        #: Of the processor's module, which PyTorch's operators use.
        self.fold_uint8 = processor.fold_uint8
        self.hopper_has_work = module.hopper_has_work
        self.MOST_PIXEL_CHANNELS = module.MOST_PIXEL_CHANNELS
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.broken: str | None = None

    def build_info(self) -> dict[str, Any]:
        return {"sources": "emulated", "nvcc": "13.0", "cuda_archs": ["80", "90a"]}

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> None:
            # A parameter that is a leaf is read like any other tensor.
            tensors = [a for a in args if isinstance(a, Tensor)]
            outputs = {"patch_embed": 1, "fold_patch_weight": 2, "patch_weight_gradient": 2}[name]
            self.module.clear_tensors()
            for i, tensor in enumerate(tensors):
                self._allow(tensor, writes=i >= len(tensors) - outputs)
            getattr(self.module, name)(*args)
            self.calls.append((name, args))
            if self.broken == name:
                tensors[-1].view(-1)[-1] += 1

        return call

    def _allow(self, tensor: Tensor, *, writes: bool) -> None:
        span = 1 + sum(
            (n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
        )
        self.module.allow(tensor.data_ptr(), span * tensor.element_size(), writes)


@pytest.fixture
def native(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    emulated.set_device(2, 227 * 1024, 228 * 1024)
    module = Emulated(emulated, _native.load())
    monkeypatch.setattr(_native, "load", lambda: module)
    monkeypatch.setattr(patch_embed_cuda, "multiprocessors", lambda device: 2)
    with poisoned_allocations():
        yield module


def problem(
    dtype: torch.dtype, *, uint8: bool = False, layout=torch.contiguous_format,
    image=(32, 48), patch=(16, 16), width=40, batch=2, **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    torch.manual_seed(0)
    N = (image[0] // patch[0]) * (image[1] // patch[1])
    images = torch.randn(batch, 3, *image).to(dtype)
    if uint8:
        images = torch.randint(256, images.shape, dtype=torch.uint8)
    weight = torch.randn(width, 3, *patch) * (3 * patch[0] * patch[1]) ** -0.5
    return {
        "images": images.contiguous(memory_format=layout),
        "weight": weight.to(dtype),
        "bias": torch.randn(width).to(dtype),
        "pos_embed": torch.randn(1, N + 1, width).to(dtype),
        "cls_token": torch.randn(1, 1, width).to(dtype),
        "mean": MEAN if uint8 else None,
        "std": STD if uint8 else None,
        **changes,
    }


def plain(p: dict[str, Any]) -> Tensor:
    rest = {name: x for name, x in p.items() if name not in ("images", "weight", "bias")}
    return reference.patch_embed(p["images"], p["weight"], p["bias"], **rest)


def double(p: dict[str, Any]) -> dict[str, Any]:
    def widened(x: Any) -> Any:
        floating = isinstance(x, Tensor) and x.is_floating_point()
        return x.detach().double().requires_grad_(x.requires_grad) if floating else x

    return {name: widened(x) for name, x in p.items()}


def check_forward(kernels: Kernels, p: dict[str, Any]) -> None:
    assert_agreement(kernels.forward(**p), plain(p), plain(double(p)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_every_gradient(native, dtype, uint8, layout):
    p = problem(dtype, uint8=uint8, layout=layout)
    check_forward(Kernels(False), p)
    grad = torch.randn(2, 7, 40).to(dtype)
    names = ("images", "weight", "bias", "pos_embed", "cls_token")
    wanted = [not uint8, True, True, True, True]
    actual = Kernels(False).backward(grad, **p, wanted=wanted)

    def gradients(q: dict[str, Any], cotangent: Tensor) -> list[Tensor]:
        leaves = [q[name] for name, want in zip(names, wanted, strict=True) if want]
        for leaf in leaves:
            leaf.requires_grad_()
        return list(torch.autograd.grad(plain(q), leaves, cotangent))

    expected = gradients(double(p), grad.double())
    for name, a, r, e in zip(
        [n for n, w in zip(names, wanted, strict=True) if w],
        actual, gradients(p, grad), expected, strict=True,
    ):  # fmt: skip
        # A bias that follows the weight shows in float32 alone.
        assert_agreement(a, r, e, name=name)
    assert {"patch_embed", "patch_weight_gradient"} <= {name for name, _ in native.calls}


@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="one tile"),
        pytest.param({"width": 400, "image": (224, 224)}, id="tiles cross images and widths"),
        pytest.param({"patch": (8, 14), "image": (56, 70), "width": 200}, id="8x14"),
        pytest.param({"patch": (16, 8), "width": 193, "pos_embed": None}, id="16x8, odd width"),
        pytest.param({"layout": torch.channels_last, **NOTHING_ADDED}, id="nhwc"),
        pytest.param({"bias": None, "batch": 1}, id="no bias"),
        pytest.param({"patch": (14, 14), "image": (70, 56), "width": 200}, id="14x14"),
        pytest.param({"patch": (7, 7), "image": (21, 28)}, id="7x7"),
        pytest.param(
            {"patch": (14, 14), "image": (70, 56), "layout": torch.channels_last},
            id="14x14, nhwc",
        ),
    ],
)
def test_the_hopper_kernel(native, dtype, uint8, changes):
    """On one multiprocessor, so that the block goes from tile to tile."""
    native.module.set_device(1, 227 * 1024, 228 * 1024)
    p = problem(dtype, uint8=uint8, **changes)
    check_forward(Kernels(False, hopper=True), p)
    assert native.module.last_launch() == "patch_embed_hopper_kernel"


def test_the_hopper_kernel_gives_the_same_bits_however_threads_are_ordered(native):
    p = problem(torch.bfloat16, image=(224, 224), width=200)
    first = Kernels(False, hopper=True).forward(**p)
    native.module.set_shuffle(1)
    assert torch.equal(Kernels(False, hopper=True).forward(**p), first)


@pytest.mark.parametrize("kernels", [Kernels(False), Kernels(False, hopper=True)], ids=str)
def test_what_the_hopper_kernel_does_not_take(native, kernels):
    """float32, and few patches, for which rows of a weight get no gaps either."""
    check_forward(kernels, problem(torch.bfloat16, patch=(7, 7), image=(21, 28)))
    assert native.calls[-1][1][1].is_contiguous()
    check_forward(kernels, problem(torch.float32))
    check_forward(kernels, problem(torch.bfloat16))
    assert native.module.last_launch() == "patch_embed_kernel"


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_nothing_to_compute(native, direction):
    p = problem(torch.float32, batch=0)
    if direction == "forward":
        assert_agreement(Kernels(False).forward(**p), plain(p), plain(double(p)))
    else:
        grad = torch.randn(plain(p).shape)
        wanted = [True] * 5
        expected = patch_embed_torch.backward(grad, **p, wanted=wanted)
        for a, e in zip(Kernels(False).backward(grad, **p, wanted=wanted), expected, strict=True):
            assert torch.equal(a, e)
    assert not native.calls


def test_more_channels_than_a_kernel_has_room_for(native):
    torch.manual_seed(0)
    images = torch.randint(256, (1, 130, 4, 4), dtype=torch.uint8)
    weight = torch.randn(8, 130, 2, 2) / 23
    p = {"images": images, "weight": weight, "bias": None, "mean": [0.4] * 130, "std": [0.2] * 130}
    p |= {"pos_embed": None, "cls_token": None}
    check_forward(Kernels(False), p)
    [(name, args)] = native.calls
    assert name == "patch_embed"
    assert args[0].dtype == torch.float32


@pytest.fixture
def gpu(native: Emulated, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Emulated:
    """A processor that is taken for an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(patch_embed_trust, "_settled", {})
    trust.forget()
    yield native
    trust.forget()


def trusted(direction: str, dtype: torch.dtype, asked: str = "auto", *, uint8=False) -> Any:
    p = problem(dtype, uint8=uint8)
    return patch_embed_trust.trusted_kernels(direction, p["images"], p["weight"], asked)


@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_right_kernels_pass_their_check(gpu, dtype, uint8):
    assert trusted("forward", dtype, uint8=uint8) == Kernels(False, hopper=dtype in HALF)
    assert trusted("backward", dtype, uint8=uint8) == Kernels(False)
    assert set(trust.verdicts().values()) == {""}
    checked = len(gpu.calls)
    trusted("forward", dtype, uint8=uint8)
    assert len(gpu.calls) == checked


def test_where_the_hopper_kernel_fails_the_portable_one_serves(gpu, monkeypatch):
    run = patch_embed_trust._run

    def wrong(implementation: Any, *args: Any) -> Any:
        found = run(implementation, *args)
        if getattr(implementation, "hopper", False):
            found[0][0, 0, 0] += 1
        return found

    monkeypatch.setattr(patch_embed_trust, "_run", wrong)
    with pytest.warns(
        RuntimeWarning, match=r"patch_embed/forward/bfloat16/float/wgmma/.*DISAGREES"
    ):
        assert trusted("forward", torch.bfloat16) == Kernels(False)
    assert trusted("forward", torch.bfloat16, "native") == Kernels(False)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_broken_kernel_is_not_used(gpu, direction):
    gpu.broken = "patch_embed" if direction == "forward" else "patch_weight_gradient"
    with pytest.warns(
        RuntimeWarning, match=f"patch_embed/{direction}/float32/float/mma/.*DISAGREES"
    ):
        assert trusted(direction, torch.float32) is None
    with pytest.raises(RuntimeError, match="failed the check on this machine"):
        trusted(direction, torch.float32, "native")


def test_the_op_takes_what_is_trusted(gpu, monkeypatch):
    """The dispatch of the op, for a tensor that says it is on a GPU."""
    cuda = torch.device("cuda", 0)
    tensor = types.SimpleNamespace(device=cuda, dtype=torch.float32, is_cpu=False)
    monkeypatch.setattr(patch_embed, "choose_once", lambda *call: "native")
    monkeypatch.setattr(patch_embed_trust, "trusted_kernels", lambda *args: Kernels(True))
    assert patch_embed._implementation("forward", tensor, tensor, "auto") == Kernels(True)
    monkeypatch.setattr(patch_embed_trust, "trusted_kernels", lambda *args: None)
    assert patch_embed._implementation("forward", tensor, tensor, "auto") is patch_embed_torch


class TestRefusals:
    def call(self, **changes: Any) -> Call:
        return Call("patch_embed", torch.device("cuda", 0), torch.float32)._replace(**changes)

    @pytest.fixture(autouse=True)
    def built(self, native, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))

    def test_none(self):
        assert refusal(self.call(), "native") is None
        assert choose(self.call(), "auto") == "native"

    def test_dtype(self):
        said = "the native kernels take float32, float16, bfloat16, and the weight is float64"
        assert refusal(self.call(dtype=torch.float64), "native") == said

    def test_capability(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
        said = "the native kernels need compute capability 8.0 or later, got 7.5"
        assert refusal(self.call(), "native") == said

    def test_no_cuda_code(self, native, monkeypatch):
        monkeypatch.setattr(native, "build_info", lambda: {"nvcc": None}, raising=False)
        assert "fastvit._C was built without CUDA code" in refusal(self.call(), "native")

    def test_no_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert refusal(self.call(), "native") == "CUDA is not available in this process"

    def test_another_device(self):
        said = "the native kernels run on cpu and cuda, and the tensors are on meta"
        assert refusal(self.call(device=torch.device("meta")), "native") == said

# SPDX-License-Identifier: Apache-2.0
"""What a table says reaches the launch of every kernel that it may have, in the interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit.functional import attention, gpsa_attention

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import tuned as tables
from fastvit.kernels.ahead.compiler import KERNELS, launches
from fastvit.kernels.ahead.launch import Fake
from fastvit.kernels.ahead.posed import case_of
from fastvit.kernels.configs import Config
from fastvit.kernels.tuned import Attention, Kernels, Layer, Posed

from fastvit.ops import tuned

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter stands for a GPU here"
)

MEASURED = {"gpu": "a GPU", "date": "2026-01-02", "fastvit": fastvit.__version__}
GRID, TOKENS, D = (4, 5), 20, 32
Launched = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Each kernel with what it was launched with, in their order."""
    found: Launched = []

    class Seen:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            def launch(**arguments: Any) -> Any:
                found.append((self.name, arguments))
                return self.kernel[grid](**arguments)

            return launch

    for name, file in KERNELS.items():
        module = importlib.import_module(f"fastvit.kernels.{file}")
        kernel = getattr(module, f"{name}_kernel")
        monkeypatch.setattr(module, f"{name}_kernel", Seen(name, kernel))
    return found


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned, "_SHIPPED", tmp_path / "shipped.json")
    tuned.forget()

    def write(*entries: tuple[Posed, Kernels]) -> None:
        plain = [tables.plain(problem, kernels, {}) for problem, kernels in entries]
        table = tables.merged({}, "sm_90", tuned.triton_version(), MEASURED, plain)
        tables.write(tuned.own_file(), table)
        tuned.forget()

    yield write
    tuned.forget()


def constants(arguments: dict[str, Any]) -> dict[str, Any]:
    """But for tensors and how they lie."""
    return {
        name: x
        for name, x in arguments.items()
        if not isinstance(x, Tensor | Fake) and "stride" not in name and name != "UNIT"
    }


#: Others than those that are built in for these problems.
UNUSUAL = {
    "kronecker": Config(channels=(4,), warps=2, stages=2),
    "forward_tile": Config(rows=16, keys=(16, 16), channels=(16, 16), warps=8, stages=3),
    "backward_tile": Config(rows=16, keys=32, channels=(16, 16), warps=2, stages=3),
    "factor_gradient": Config(channels=(16,), warps=2, stages=2, groups=1),
    "parameter_gradient": Config(warps=2),
}
STREAM = Config(rows=16, keys=16, channels=(16, 16), warps=2, stages=3)

PATHS = [(op, direction, path) for (direction, op), paths in tables.PATHS.items() for path in paths]


@pytest.mark.parametrize(("op", "direction", "path"), PATHS, ids=lambda x: str(x)[:40])
def test_attention_launches_what_the_table_says(
    write: Any, launched: Launched, op: str, direction: str, path: tuple[str, ...]
) -> None:
    problem = Attention(op, direction, "half", 2, 2, TOKENS, D, None if op == "mhsa" else GRID)
    own = dict(problem.built_in("sm_90"))
    kernels = tuple(
        (name, UNUSUAL.get(name, Config() if "position" in name else STREAM)) for name in path
    )
    assert not any(config == own.get(name) for name, config in kernels if config != Config())
    write((problem, kernels))
    fitted = problem.fitted("sm_90", kernels)
    assert fitted is not None
    expected = launches("sm_90", case_of(problem, fitted))
    inputs = [torch.randn(2, 2, TOKENS, D).bfloat16().requires_grad_() for _ in range(3)]
    position = [torch.randn(2, 3).bfloat16().requires_grad_(), torch.randn(2).bfloat16()]
    if op == "mhsa":
        out = attention(*inputs, backend="triton")
    else:
        p = 0.1 if op == "gpsa_dropout" else 0.0
        out = gpsa_attention(*inputs, *position, GRID, dropout_p=p, backend="triton")
    if direction == "backward":
        launched.clear()
        out.sum().backward()
    assert [name for name, _ in launched] == list(expected)
    for name, arguments in launched:
        made = constants(expected[name].arguments)
        made = {k: v for k, v in made.items() if k != "dropout_p"}
        assert {k: constants(arguments).get(k) for k in made} == made, name
    assert {choice.how for choice in tuned.choices() if choice.problem == problem.name} == {"exact"}


SIZE, IMAGES, CHANNELS, DIM, STRIDES = (17, 13), 2, (8, 16, 24), 40, (2, 1, 2)


def layers(training: bool, pixels: bool) -> list[tuple[Layer, Kernels]]:
    """Every kernel of a stem's call with a configuration like none that is built in."""
    product = Config(rows=32, keys=(16,), channels=(16,), warps=2, stages=1)
    paired = Config(rows=16, keys=(16, 16), channels=(16,), warps=2, stages=1)
    # What each reads, from the images on.
    sides = (SIZE, (9, 7), (9, 7), (5, 4))
    widths = (3, *CHANNELS, DIM)

    def layer(op: str, direction: str, level: int, count: int = 1) -> Layer:
        return Layer(
            op, direction, "half", IMAGES, sides[level], widths[level : level + count + 1],
            STRIDES[level : level + count], training, pixels and level == 0,
        )  # fmt: skip

    found: list[tuple[Layer, Config]] = []
    if training:
        found.append((layer("stem_first", "forward", 0), product._replace(channels=())))
        found.append((layer("stem_conv", "forward", 1), product))
    else:
        found.append((layer("stem_pair", "forward", 0, 2), paired))
    found.append((layer("stem_conv", "forward", 2), product._replace(rows=64)))
    found.append((layer("stem_tokens", "forward", 3), product._replace(stages=3)))
    if training:
        summed = product._replace(groups=1)
        found += [(layer("stem_input_gradient", "backward", i), summed) for i in (3, 2, 1)]
        weights = summed._replace(taps=1, rows=16)
        found += [(layer("stem_weight_gradient", "backward", i), weights) for i in (3, 2, 1)]
        image = summed._replace(channels=(), rows=16)
        found.append((layer("stem_image_gradient", "backward", 0), image))
    return [(problem, ((problem.op, config),)) for problem, config in found]


@pytest.mark.parametrize("pixels", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_stem_launches_what_the_table_says(
    write: Any, launched: Launched, training: bool, pixels: bool
) -> None:
    given = layers(training, pixels)
    write(*given)
    expected: list[tuple[str, dict[str, Any]]] = []
    for problem, kernels in given:
        fitted = problem.fitted("sm_90", kernels)
        assert fitted is not None, problem.name
        (launch,) = launches("sm_90", case_of(problem, fitted)).values()
        expected.append((launch.kernel, constants(launch.arguments)))
    stem = fastvit.ConvStem(3, CHANNELS, STRIDES, DIM, backend="triton").bfloat16()
    stem.train(training)
    x = torch.randint(256, (IMAGES, 3, *SIZE), dtype=torch.uint8)
    with torch.set_grad_enabled(training):
        out = stem(x if pixels else x.bfloat16() / 256)
    if training:
        out.sum().backward()
    names = {op for ops in tables.LAYERS.values() for op in ops}
    seen = [(name, constants(arguments)) for name, arguments in launched if name in names]
    assert {name for name, _ in seen} == {name for name, _ in expected}
    assert len(seen) == len(expected)
    for name, arguments in seen:
        # Of several convolutions by its channels.
        (made,) = (
            e for n, e in expected
            if n == name and all(e.get(k) == arguments.get(k) for k in ("C", "OUT", "OH", "OW"))
        )  # fmt: skip
        for values in (made, arguments):
            # Of the pixels and tokens of a call.
            for other in ("PLACED", "shifts", "factors", "centers", "eps"):
                values.pop(other, None)
        shared = made.keys() & arguments.keys()
        assert {"ROWS", "num_warps", "num_stages"} <= shared
        assert {k: arguments[k] for k in shared} == {k: made[k] for k in shared}, name
    assert {choice.how for choice in tuned.choices()} == {"exact"}

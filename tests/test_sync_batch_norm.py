# SPDX-License-Identifier: Apache-2.0
"""Batch norms of the stem synchronised over two processes, which run this file as a script: what
they compute of their shares of a batch against one process with all of it.
"""

from __future__ import annotations

import copy
import datetime
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastvit
from fastvit.functional import ConvStage, conv_stem

Tensors = dict[str, Tensor]

CHANNELS, STRIDES, WIDTH = (8, 16), (2, 1), 8
BATCH, IMAGE, TOKENS = 5, (9, 12), 30
#: Of a broken collective, and of all that the processes do.
PATIENCE, LIMIT_S = datetime.timedelta(seconds=60), 300


def stem(dtype: torch.dtype, seed: int = 0, momentum: float | None = 0.1) -> fastvit.ConvStem:
    """A stem whose activations are far from zero, so that rounding switches none."""
    generator = torch.Generator().manual_seed(seed)
    module = fastvit.ConvStem(3, CHANNELS, STRIDES, WIDTH, norm_momentum=momentum)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * p[0].numel() ** -0.5)
        for stage in module.stages:
            stage.bn.weight.add_(1)
            stage.bn.bias[::2], stage.bn.bias[1::2] = 8, -8
    return module.to(dtype)


def batch(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images, and the cotangent of their tokens, which bfloat16 holds."""
    generator = torch.Generator().manual_seed(100 + seed)
    images = torch.randn(BATCH, 3, *IMAGE, generator=generator)
    # Of another mean in every image, so that statistics of a share are not those of all.
    images += torch.arange(BATCH)[:, None, None, None]
    cotangent = torch.randn(BATCH, TOKENS, WIDTH, generator=generator)
    return tuple(t.bfloat16().to(dtype) for t in (images, cotangent))


def step(module: nn.Module, images: Tensor, cotangent: Tensor, call: Any = None) -> Tensors:
    """The output, all gradients and the buffers after a training step."""
    images = images.clone().requires_grad_()
    out = (call or module)(images)
    (out * cotangent).sum().backward()
    grads = {f"grad of {n}": p.grad for n, p in module.named_parameters()}
    results = {"output": out.detach(), "grad of input": images.grad, **grads}
    return results | {n: b.clone() for n, b in module.named_buffers()}


# What follows runs in the two processes.


def share(rank: int, cut: int, *tensors: Tensor) -> list[Tensor]:
    return [t[:cut] if rank == 0 else t[cut:] for t in tensors]


def synced(module: nn.Module, backend: str = "torch", group: Any = None) -> Any:
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module, group)
    module.backend = backend
    return module


def steps(backends: tuple[str, str], dtype: torch.dtype, cut: int, draws: int) -> Any:
    def run(rank: int) -> list[Tensors]:
        return [
            step(synced(stem(dtype, i), backends[rank]), *share(rank, cut, *batch(dtype, i)))
            for i in range(draws)
        ]

    return run


def compiled(rank: int) -> list[Tensors]:
    module = synced(stem(torch.float64))
    call = torch.compile(module, fullgraph=True, backend="aot_eager")
    return [step(module, *share(rank, 2, *batch(torch.float64)), call)]


def checkpointed(rank: int) -> list[Tensors]:
    # Statistics that move twice end where they do in one step with momentum 1.
    module = synced(stem(torch.float64, momentum=1.0))

    def call(x: Tensor) -> Tensor:
        return checkpoint(lambda x: module(x).exp(), x, use_reentrant=False).log()

    results = step(module, *share(rank, 2, *batch(torch.float64)), call)
    return [{n: x for n, x in results.items() if "num_batches" not in n}]


def by_function(module: fastvit.ConvStem, backend: str) -> Callable[[Tensor], Tensor]:
    conv = module.projection.conv

    def call(x: Tensor) -> Tensor:
        stages = [
            ConvStage(s.conv.weight, s.bn.weight, s.bn.bias, s.bn.running_mean, s.bn.running_var,
                      s.conv.stride[0])
            for s in module.stages
        ]  # fmt: skip
        return conv_stem(
            x, stages, conv.weight, conv.bias, training=True, backend=backend,
            process_group=dist.group.WORLD,
        )  # fmt: skip

    return call


def functions(rank: int) -> list[Tensors]:
    """Without layers, on the reference backend too, which synchronises in its own way."""
    results = []
    for backend in ("reference", "torch"):
        module = stem(torch.float64)
        call = by_function(module, backend)
        results.append(step(module, *share(rank, 2, *batch(torch.float64)), call))
    return [{n: x for n, x in r.items() if "num_batches" not in n} for r in results]


def func_grad(rank: int) -> list[Tensors]:
    call = by_function(stem(torch.float64), "torch")
    images, cotangent = share(rank, 2, *batch(torch.float64))
    grad = torch.func.grad(lambda x: (call(x) * cotangent).sum())(images)
    return [{"grad of input": grad}]


def averaged(rank: int) -> list[Tensors]:
    """Two batches with momentum=None, the second when one norm has seen a batch more."""
    module = synced(stem(torch.float64, momentum=None))
    module(share(rank, 2, batch(torch.float64)[0])[0])
    module.stages[1].bn.num_batches_tracked += 1
    return [step(module, *share(rank, 2, *batch(torch.float64, 1)))]


def some_gradients(rank: int) -> list[Tensors]:
    """Of the second batch norm alone, so that fewer stages send theirs."""
    module = synced(stem(torch.float64)).requires_grad_(False)
    module.stages[1].bn.requires_grad_(True)
    images, cotangent = share(rank, 2, *batch(torch.float64))
    (module(images) * cotangent).sum().backward()
    assert all(p.grad is None for n, p in module.named_parameters() if not n.startswith("1.bn"))
    return [{f"grad of {n}": p.grad for n, p in module[1].bn.named_parameters(prefix="1.bn")}]


def distributed_data_parallel(rank: int) -> list[Tensors]:
    """A step of SGD, whose gradients are averaged. Converted after it is wrapped, since PyTorch
    refuses to wrap a SyncBatchNorm on a processor.
    """
    module = stem(torch.float64)
    parallel = nn.parallel.DistributedDataParallel(module)
    module = synced(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    images, cotangent = share(rank, 2, *batch(torch.float64))
    (parallel(images) * cotangent).sum().backward()
    optimizer.step()
    return [module.state_dict()]


def local(rank: int) -> list[Tensors]:
    """What sends nothing, as only one of the processes calls it, and gives what BatchNorm2d does:
    evaluation, frozen norms, and a group of one.
    """
    alone = [dist.new_group([i]) for i in range(2)][rank]
    if rank == 1:
        return []
    images, cotangent = batch(torch.float64)
    untracked = stem(torch.float64)
    for stage in untracked.stages:
        stage.bn.running_mean = stage.bn.running_var = stage.bn.num_batches_tracked = None
        stage.bn.track_running_stats = False
    modules: list[tuple[nn.Module, Any, Callable[[nn.Module], Any]]] = [
        (stem(torch.float64), None, nn.Module.eval),
        (untracked, None, nn.Module.eval),
        (stem(torch.float64), None, lambda m: [s.bn.eval() for s in m.stages]),
        (stem(torch.float64), alone, nn.Module.train),
    ]
    for plain, group, prepare in modules:
        other = synced(copy.deepcopy(plain), group=group)
        for module in (plain, other):
            prepare(module)
        expected, actual = (step(m, images, cotangent) for m in (plain, other))
        assert all(torch.equal(actual[n], x) for n, x in expected.items())
    return []


def refusals(rank: int) -> list[Tensors]:
    """One value per channel is too few for a process alone; here the other one has more."""
    module = synced(stem(torch.float64))
    images = torch.randn(1 + 2 * rank, 3, 2, 1, dtype=torch.float64)
    module(images)
    with pytest.raises(ValueError, match="one value per channel"):
        stem(torch.float64)(images[:1])
    with pytest.raises(TypeError, match="process_group: expected a ProcessGroup"):
        conv_stem(images, [], images, process_group="world")
    return []


def opchecks(rank: int) -> list[Tensors]:
    """In a group of one, whose name the bare ops take."""
    group = [dist.new_group([i]) for i in range(2)][rank].group_name
    module, images = stem(torch.float32), batch(torch.float32)[0]
    lists = [
        [s.conv.weight.detach() for s in module.stages],
        *([getattr(s.bn, n).detach() for s in module.stages] for n in ("weight", "bias")),
    ]
    weight, bias = (p.detach() for p in module.projection.parameters())
    first, options = (images, weight, bias, None, None), (list(STRIDES), True, 1e-5, None, None)
    arguments = (*first, *lists, [], [], *options, True, group, "torch")
    ops = torch.ops.fastvit
    torch.library.opcheck(ops._conv_stem_forward.default, arguments)
    tokens, raw, means, variances, counts = ops._conv_stem_forward(*arguments)
    arguments = (
        torch.ones_like(tokens), *first, raw, *lists, means, variances, *options,
        [t is not None for t in first] + [True] * 6, group, counts, "torch",
    )  # fmt: skip
    torch.library.opcheck(ops._conv_stem_backward.default, arguments)
    return []


#: Backends of the two processes, dtype, how many of the images are the first process's, and draws:
#: half precision needs some, and the interpreter takes seconds for each.
ROWS = [
    ("torch", "torch", torch.float64, (2, 0), 1),
    ("torch", "torch", torch.float32, (2, 0), 4),
    ("torch", "torch", torch.bfloat16, (2, 0), 4),
    ("triton", "triton", torch.float32, (2, 0), 2),
    ("triton", "triton", torch.bfloat16, (2,), 4),
    ("torch", "triton", torch.float32, (2, 0), 2),
]
NUMBERS = {
    f"{one}-{other}-{str(dtype).removeprefix('torch.')}-{cut}": ((one, other), dtype, cut, draws)
    for one, other, dtype, cuts, draws in ROWS
    for cut in cuts
}
#: Those in float64 that are compared with an ordinary step.
ALIKE = [compiled, checkpointed, functions, some_gradients, func_grad]
OTHERS = [averaged, distributed_data_parallel, local, refusals, opchecks]


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=PATIENCE)
    results = {name: steps(*case)(rank) for name, case in NUMBERS.items()}
    results |= {function.__name__: function(rank) for function in (*ALIKE, *OTHERS)}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


# What follows runs in the tests.


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensors]]]:
    """What the two processes computed."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    logs = [folder / f"{rank}.log" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-P", __file__, str(rank), str(folder)]
        with log.open("w") as file:
            processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
    try:
        codes = [process.wait(LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def joined(found: list[dict[str, list[Tensors]]], name: str) -> list[Tensors]:
    """The results of both processes as one process would have them. What they learned of the whole
    batch they must have to the bit.
    """
    results = []
    for one, other in zip(*(f[name] for f in found), strict=True):
        results.append({})
        for key, x in one.items():
            y = other[key]
            if key in ("output", "grad of input"):
                x = torch.cat((x, y))
            elif key.startswith("grad"):
                x = x + y
            else:
                assert torch.equal(x, y), key
            results[-1][key] = x
    return results


def floating(results: Tensors) -> Tensors:
    return {n: x for n, x in results.items() if x.is_floating_point()}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str, found, check_agreement) -> None:
    """Shares of unequal size, one of them empty; each process on a backend of its own."""
    _, dtype, _, draws = NUMBERS[name]
    plain, exact = (
        [
            floating(step(reference(stem(dtype, i)).to(to), *(t.to(to) for t in batch(dtype, i))))
            for i in range(draws)
        ]
        for to in (dtype, torch.float64)
    )
    actual = [floating(r) for r in joined(found, name)]
    # Of some there are few, and a sum over two processes is rounded once more.
    few = [n for n in actual[0] if n.startswith("grad") or "running" in n]
    check_agreement(actual, plain, exact, rms=few)


def reference(module: fastvit.ConvStem) -> fastvit.ConvStem:
    module.backend = "reference"
    return module


@pytest.mark.parametrize("name", [function.__name__ for function in ALIKE])
def test_one_step(name: str, found) -> None:
    momentum = 1.0 if name == "checkpointed" else 0.1
    expected = step(reference(stem(torch.float64, momentum=momentum)), *batch(torch.float64))
    for results in joined(found, name):
        for key, x in results.items():
            torch.testing.assert_close(x, expected[key], msg=lambda m, key=key: f"{key}: {m}")


def test_cumulative_average(found) -> None:
    module = reference(stem(torch.float64, momentum=None))
    module(batch(torch.float64)[0])
    module.stages[1].bn.num_batches_tracked += 1
    expected = step(module, *batch(torch.float64, 1))
    (actual,) = joined(found, "averaged")
    for key, x in expected.items():
        torch.testing.assert_close(actual[key], x, msg=lambda m, key=key: f"{key}: {m}")


def test_distributed_data_parallel(found) -> None:
    module = reference(stem(torch.float64))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    images, cotangent = batch(torch.float64)
    ((module(images) * cotangent).sum() / 2).backward()
    optimizer.step()
    (actual,) = joined(found, "distributed_data_parallel")
    torch.testing.assert_close(actual, dict(module.state_dict()))


@pytest.mark.parametrize("name", ["local", "refusals", "opchecks"])
def test_in_the_processes(name: str, found) -> None:
    """Asserted there, where a failure ends them both."""
    assert all(f[name] == [] for f in found)


def test_without_processes(differentiate_module, check_agreement) -> None:
    """A converted stem is an ordinary one then, also where it is trained."""
    module = stem(torch.float64)
    twin = synced(copy.deepcopy(module))
    assert twin._fusible()
    images = batch(torch.float64)[0]
    expected, actual = (differentiate_module(m, images) for m in (module, twin))
    check_agreement([actual], [expected], [expected])


def test_from_module_stays_synchronised() -> None:
    module = synced(stem(torch.float64), group="a group")
    taken = fastvit.ConvStem.from_module(module)
    for stage, source in zip(taken.stages, module.stages, strict=True):
        assert type(stage.bn) is nn.SyncBatchNorm
        assert stage.bn.process_group == "a group"
        assert stage.bn.running_var is source.bn.running_var
        assert stage.bn.weight is source.bn.weight


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

# SPDX-License-Identifier: Apache-2.0
"""Run as one of two processes: what distributed training does to layers and models.

``python citizenship_ranks.py RANK FOLDER`` meets the other rank in FOLDER, makes every check and
writes of each, as a line of FOLDER/results.RANK, its name and what it raised. The tests are in
test_citizenship_distributed.py.
"""

from __future__ import annotations

import copy
import datetime
import functools
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from citizenship_cases import LAYERS, MODELS, Case, assert_same, batch_of
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastvit.models.blocks import Block

WORLD = 2
#: Seconds that a rank waits for the other in a collective operation.
PATIENCE = 30

Check = Callable[[], None]


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's samples, and those of all."""
    joint = batch_of(x, 2 * WORLD)
    return joint.chunk(WORLD)[dist.get_rank()], joint


def mean_step(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients of a loss that is a mean over the batch, as those that ranks average."""
    module.zero_grad()
    out = module(x)
    out.square().flatten(1).sum(1).mean().backward()
    return [p.grad for p in module.parameters() if p.requires_grad]


def full(gradients: list[Tensor]) -> list[Tensor]:
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]


def ddp(case: Case, training: bool, **options: object) -> None:
    """The ranks' gradients are those of the joint batch, or in training, where each normalises its
    own samples, the mean of what each has alone. Twice, since a parameter that nothing reads
    is noticed at the second step.
    """
    module, x = case.make(training)
    twin = copy.deepcopy(module)
    mine, joint = halves(x)
    wrapped = DistributedDataParallel(module, **options)
    for _ in range(2):
        actual = mean_step(wrapped, mine)
        if training:
            parts = [mean_step(copy.deepcopy(twin), half) for half in joint.chunk(WORLD)]
            expected = [torch.stack(g).mean(0) for g in zip(*parts, strict=True)]
        else:
            expected = mean_step(twin, joint)
        assert_same(actual, expected)


def compiled_ddp(case: Case) -> None:
    module, x = case.make()
    mine, joint = halves(x)
    expected = mean_step(copy.deepcopy(module), joint)
    wrapped = torch.compile(DistributedDataParallel(module), backend="aot_eager")
    for _ in range(2):
        assert_same(mean_step(wrapped, mine), expected)


def checkpointed_ddp(case: Case) -> None:
    module, x = case.make()
    mine, joint = halves(x)
    expected = mean_step(copy.deepcopy(module), joint)
    apply_activation_checkpointing(module, check_fn=lambda part: isinstance(part, Block))
    wrapped = DistributedDataParallel(module, gradient_as_bucket_view=True)
    for _ in range(2):
        assert_same(mean_step(wrapped, mine), expected)


def shard(module: nn.Module, **options: object) -> nn.Module:
    for block in getattr(module, "blocks", []):
        fully_shard(block, **options)
    return fully_shard(module, **options)


def fsdp(case: Case) -> None:
    module, x = case.make()
    twin = copy.deepcopy(module)
    mine, joint = halves(x)
    shard(module)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (module, twin)]
    for _ in range(2):
        actual, expected = mean_step(module, mine), mean_step(twin, joint)
        assert_same(full(actual), expected)
        for optimizer in optimizers:
            optimizer.step()
    state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
    assert list(state) == list(twin.state_dict())
    assert_same(list(state.values()), list(twin.state_dict().values()))


def fsdp_in_bfloat16(case: Case) -> None:
    """Parameters and activations in bfloat16, gradients and parameters kept in float32."""
    module, x = case.make()
    mine, joint = halves(x)
    twin = copy.deepcopy(module)
    exact = mean_step(twin, joint)
    shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert module(mine).dtype == torch.bfloat16
    actual = mean_step(module, mine)
    assert {g.dtype for g in actual} == {torch.float32}
    assert_same(full(actual), exact, rtol=0.1)
    module.train()
    assert module(mine).dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in mean_step(module, mine))


def fsdp_with_checkpoints(case: Case) -> None:
    module, x = case.make()
    mine, joint = halves(x)
    expected = mean_step(copy.deepcopy(module), joint)
    apply_activation_checkpointing(module, check_fn=lambda part: isinstance(part, Block))
    shard(module)
    assert_same(full(mean_step(module, mine)), expected)


def compiled_fsdp(case: Case) -> None:
    module, x = case.make()
    mine, joint = halves(x)
    expected = mean_step(copy.deepcopy(module), joint)
    for block in module.blocks:
        block.compile(backend="aot_eager")
    shard(module)
    for _ in range(2):
        assert_same(full(mean_step(module, mine)), expected)


def fsdp_from_meta(case: Case) -> None:
    """Built without memory, sharded, initialised in place, and loaded from a whole state dict."""
    source, x = case.make()
    mine, _ = halves(x)
    with torch.device("meta"):
        module, _ = case.build()
    shard(module)
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
    module.init_weights()
    plain, _ = case.build()
    whole = StateDictOptions(full_state_dict=True)
    for name, tensor in get_model_state_dict(module, options=whole).items():
        assert tensor.isfinite().all(), name
        like = plain.state_dict()[name]
        assert tensor.shape == like.shape
        # Where the initialisation draws nothing, as the gates and the heads' offsets.
        if name.endswith(("gating_param", "attn.v.weight", "running_mean", "running_var")):
            assert torch.equal(tensor, like), name
        if name.endswith("pos_proj.weight"):
            # All heads but those beyond a square.
            assert torch.equal(tensor[:1], like[:1]), name
    set_model_state_dict(module, source.state_dict(), options=whole)
    assert_same([module.eval()(mine)], [source(mine)])


def checks() -> dict[str, Check]:
    found: dict[str, Check] = {}
    for case in (*LAYERS, *MODELS):
        for training in (False, True):
            mode = "train" if training else "eval"
            found[f"ddp-{mode}-{case.name}"] = functools.partial(ddp, case, training)
        found[f"fsdp-{case.name}"] = functools.partial(fsdp, case)
        found[f"fsdp-bfloat16-{case.name}"] = functools.partial(fsdp_in_bfloat16, case)
    for case in MODELS:
        found[f"fsdp-meta-{case.name}"] = functools.partial(fsdp_from_meta, case)
    # Of the others the blocks are those of one of these.
    for case in (MODELS[0], MODELS[-1]):
        found[f"ddp-static-{case.name}"] = functools.partial(
            ddp, case, False, static_graph=True, gradient_as_bucket_view=True
        )
        found[f"ddp-compiled-{case.name}"] = functools.partial(compiled_ddp, case)
        found[f"ddp-checkpointed-{case.name}"] = functools.partial(checkpointed_ddp, case)
        found[f"fsdp-checkpointed-{case.name}"] = functools.partial(fsdp_with_checkpoints, case)
        found[f"fsdp-compiled-{case.name}"] = functools.partial(compiled_fsdp, case)
    return found


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), WORLD),
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    with (folder / f"results.{rank}").open("w") as results:
        for name, check in checks().items():
            torch.manual_seed(0)
            try:
                check()
                error = None
            # Written down for the test of this check, which fails by it; the others still run.
            except Exception:
                error = traceback.format_exc()
            results.write(json.dumps([name, error]) + "\n")
            results.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

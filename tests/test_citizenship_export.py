# SPDX-License-Identifier: Apache-2.0
"""Exported programs, for any batch size: run, saved, decomposed, compiled ahead of time."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from citizenship_cases import LAYERS, MODELS, OPS, Case, assert_same, batch_of, each, step

BATCH = torch.export.Dim("batch", min=1, max=64)


@each(OPS, LAYERS, MODELS)
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_an_exported_program_takes_any_batch(case: Case, strict: bool) -> None:
    module, x = case.make()
    torch._dynamo.reset()
    program = torch.export.export(module, (x,), dynamic_shapes=({0: BATCH},), strict=strict)
    decomposed = program.run_decompositions()
    for size in (1, 2, 5):
        sample = batch_of(x, size)
        expected = module(sample)
        assert_same([program.module()(sample)], [expected])
        assert_same([decomposed.module()(sample)], [expected])


@each(OPS, LAYERS, MODELS)
def test_a_program_exported_for_training_trains_for_any_batch(case: Case) -> None:
    """Also its running statistics move."""
    module, x = case.make(training=True)
    twin = copy.deepcopy(module)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: BATCH},)).module()
    for size in (2, 5):
        sample = batch_of(x, size)
        assert_same(step(program, sample), step(twin, sample))
    buffers = dict(program.named_buffers())
    for name, expected in twin.named_buffers():
        torch.testing.assert_close(buffers[name], expected, msg=name)


@each(OPS, MODELS)
def test_a_saved_program_is_read_again(case: Case, tmp_path: Path) -> None:
    """The layers' stand in test_transforms.py."""
    module, x = case.make()
    program = torch.export.export(module, (x,), dynamic_shapes=({0: BATCH},))
    torch.export.save(program, tmp_path / "module.pt2")
    loaded = torch.export.load(tmp_path / "module.pt2").module()
    sample = batch_of(x, 3)
    assert_same([loaded(sample)], [module(sample)])


@each(LAYERS)
def test_aot_inductor(case: Case, tmp_path: Path) -> None:
    """Compiled to a library, which calls our ops in a process that has them."""
    module, x = case.make()
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes=({0: BATCH},))
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "module.pt2")
        )
        loaded = torch._inductor.aoti_load_package(package)
        for size in (2, 5):
            sample = batch_of(x, size)
            assert_same([loaded(sample)], [module(sample)])

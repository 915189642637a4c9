# SPDX-License-Identifier: Apache-2.0
"""Data parallel and sharded training of two processes on gloo, and the conversion of batch norms
for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from citizenship_cases import LAYERS, MODELS, Case, assert_same, each
from citizenship_ranks import WORLD, checks
from torch import nn

#: Seconds for all checks. They take a minute on two cores.
PATIENCE = 300

Results = list[dict[str, str | None]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each check raised on each rank. The processes are started once, since they take longer
    to start than the checks; what they have not come to is missing.
    """
    folder = tmp_path_factory.mktemp("ranks")
    here = Path(__file__).parent
    found = [str(here), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, found))}
    processes = []
    for rank in range(WORLD):
        command = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
        command += [str(here / "citizenship_ranks.py"), str(rank), str(folder)]
        with (folder / f"output.{rank}").open("w") as output:
            processes.append(
                subprocess.Popen(
                    command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT
                )
            )
    try:
        for process in processes:
            process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank in range(WORLD):
        # Shown by pytest where a test fails.
        sys.stderr.write((folder / f"output.{rank}").read_text())
    return [_read(folder / f"results.{rank}") for rank in range(WORLD)]


def _read(path: Path) -> dict[str, str | None]:
    return dict(json.loads(line) for line in path.read_text().splitlines()) if path.exists() else {}


@pytest.mark.parametrize("name", checks())
def test_two_ranks(name: str, results: Results) -> None:
    for rank, found in enumerate(results):
        assert name in found, f"rank {rank} did not come to it"
        assert found[name] is None, f"rank {rank}: {found[name]}"


@each([*LAYERS[2:3], *MODELS])
def test_conversion_to_synchronised_batch_norms(case: Case) -> None:
    """In evaluation they are batch norms; their names stay."""
    module, x = case.make()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(case.make()[0])
    norms = sum(isinstance(part, nn.SyncBatchNorm) for part in converted.modules())
    assert norms == sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())
    assert list(converted.state_dict()) == list(module.state_dict())
    assert_same([converted.eval()(x)], [module(x)])
    fresh, _ = case.build()
    fresh.load_state_dict(converted.state_dict(), strict=True)
    assert_same([fresh.eval()(x)], [module(x)], rtol=0)
    with torch.no_grad():
        assert_same([converted(x)], [module(x)])

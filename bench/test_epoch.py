# SPDX-License-Identifier: Apache-2.0
"""Minutes per ImageNet epoch of every row of the papers' tables.

``pytest bench/ --benchmark`` times all rows and prints the tables; ``pytest bench/`` runs a few
once. A round of the benchmark is one training step of the fastvit model, with one step of the
library model as its set-up; what both took lies in ``extra_info`` and so in ``--benchmark-json``.
"""

from __future__ import annotations

import pytest


# A row that disagrees is not timed, on purpose.
@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")
def test_row(row, benchmark, benched):
    """The two models count as published and agree; then their steps are timed in turns."""
    result = benched.row(row, benchmark)
    if result.status != "ok":
        pytest.fail(result.traceback or f"{row.name}: {result.reason}", pytrace=False)

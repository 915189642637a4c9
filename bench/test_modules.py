# SPDX-License-Identifier: Apache-2.0
"""Layers and whole models against the libraries', ``torch.compile`` and their own products.

``pytest bench/test_modules.py --benchmark`` times all contests and prints the table;
``pytest bench/`` compares the numbers of a few. A round of the benchmark is fastvit's run, with
those of the others as its set-up; what all took lies in ``extra_info`` and in ``modules.json``.
"""

from __future__ import annotations

import pytest


# A contest that disagrees is not timed, on purpose.
@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")
def test_contest(entry, benchmark, benched):
    """The contenders agree; then they are timed in turns."""
    outcome = benched.contest(entry, benchmark)
    assert outcome.agrees, f"error {outcome.error:.2e}, limit {outcome.limit:.2e}"

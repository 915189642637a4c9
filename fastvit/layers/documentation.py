# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect


def with_backend(reference: type) -> str:
    """The docstring of a reference module for the layer that adds ``backend`` to it."""
    return f"""{inspect.cleandoc(reference.__doc__ or "")}

The keyword ``backend`` chooses the implementation, see :mod:`fastvit.functional`; None follows
:func:`fastvit.set_backend`.
"""

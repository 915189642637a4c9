# SPDX-License-Identifier: Apache-2.0
"""What is tried for a problem: the neighbourhood of the configurations that are built in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from fastvit.kernels import configs
from fastvit.kernels.ahead.compiler import launches
from fastvit.kernels.ahead.posed import case_of
from fastvit.kernels.configs import TILE_TOKENS, Config, pieces
from fastvit.kernels.tuned import Attention, Kernels, Layer, Posed

#: Kernels whose launch has nothing to choose.
FIXED = ("position_table", "position_factors", "parameter_gradient")
#: Fields in which a neighbour may differ at once.
_STEPS = 2

_BLOCKS = ((32,), (64,), (64, 32), (128,), (128, 64), (256,))


def built_in(problem: Posed, arch: str) -> Kernels:
    """The kernels that serve without a table."""
    if isinstance(problem, Attention):
        return problem.built_in(arch)
    return ((problem.op, launches(arch, case_of(problem))[problem.op].config),)


def paths(problem: Posed, arch: str) -> list[Kernels]:
    """Kernels to begin with: those that are built in, and where a row of scores may be a tile or
    pass by in blocks, those of the other way.
    """
    first = built_in(problem, arch)
    if not isinstance(problem, Attention) or problem.op == "gpsa_dropout":
        return [first]
    if problem.arithmetic != "half" or problem.tokens > TILE_TOKENS:
        return [first]
    if any(name.endswith("_tile") for name, _ in first):
        return [first, _streamed(problem, arch)]
    other = _tiled(problem, arch)
    return [first] if other is None else [first, other]


def _streamed(problem: Attention, arch: str) -> Kernels:
    # As for more tokens than a tile has; what follows from the number is the same for both.
    long = problem._replace(tokens=TILE_TOKENS + problem.tokens)
    return long.built_in(arch)


def _tiled(problem: Attention, arch: str) -> Kernels | None:
    """Of architectures that have the way for some problem."""
    narrow = problem._replace(channels=min(problem.channels, 64), images=2**12)
    kernels = narrow.built_in(arch)
    if not any(name.endswith("_tile") for name, _ in kernels):
        return None
    wide = pieces(problem.channels)
    found = tuple(
        (name, config._replace(channels=wide) if name.endswith("_tile") else config)
        for name, config in kernels
    )
    return problem.fitted(arch, found)


def variants(problem: Posed, arch: str, kernels: Kernels, name: str) -> Iterator[Kernels]:
    """The kernels with another configuration of one of them, those that can do the problem."""
    config = dict(kernels)[name]
    options = _options(problem, name, config)
    seen = {config}
    for count in range(1, _STEPS + 1):
        for fields in itertools.combinations(options, count):
            for values in itertools.product(*(options[field] for field in fields)):
                changed = config._replace(**dict(zip(fields, values, strict=True)))
                if changed in seen:
                    continue
                seen.add(changed)
                found = tuple((n, changed if n == name else c) for n, c in kernels)
                fitted = problem.fitted(arch, found)
                if fitted is not None:
                    yield fitted


def _options(problem: Posed, name: str, config: Config) -> dict[str, list[Any]]:
    """Other values for each field."""
    if isinstance(problem, Layer):
        options = _layer_options(problem, config)
    else:
        options = _attention_options(problem, name, config)
    options["warps"] = [4, 8]
    options["stages"] = [1, 2, 3, 4] if isinstance(problem, Layer) else [1, 2, 3]
    return {
        field: [value for value in values if value != getattr(config, field)]
        for field, values in options.items()
    }


def _attention_options(problem: Attention, name: str, config: Config) -> dict[str, list[Any]]:
    d = problem.channels
    if name in ("kronecker", "factor_gradient"):
        return {"channels": [(size,) for size in (2, 4, 8, 16, 32) if size < 2 * d]}
    options: dict[str, list[Any]] = {
        "rows": [16, 32, 64, 128],
        "channels": [pieces(d), (configs._power(d),)],
    }
    if problem.arithmetic == "ieee":
        options["channels"] = [(16,) * -(-d // 16), pieces(d)]
    if name == "forward_tile":
        whole = (configs._power(problem.tokens),)
        options["keys"] = [*(pieces(problem.tokens, most) for most in (64, 128, 256)), whole]
        options["resident"] = [False, True]
    elif name != "backward_tile":
        options["keys"] = [16, 32, 64, 128]
    return options


def _layer_options(problem: Layer, config: Config) -> dict[str, list[Any]]:
    single = [(16,), (32,), (64,), (128,)]
    before, after = problem.channels[-2:]
    outs = before if problem.op == "stem_input_gradient" else after
    fitting = [keys for keys in _BLOCKS if sum(keys) < 2 * outs]
    options: dict[str, list[Any]] = {"rows": [32, 64, 128], "keys": fitting or [(16,)]}
    if problem.op == "stem_pair":
        options["channels"] = [pieces(before), (configs._power(before),), (32, 32)]
    elif problem.op == "stem_input_gradient":
        options["channels"] = single
    elif problem.op == "stem_weight_gradient":
        options |= {"keys": single, "channels": single, "rows": [16, 32, 64]}
        options["taps"] = [1, 3] if problem.strides else [config.taps]
    elif problem.op == "stem_image_gradient":
        options |= {"keys": single, "rows": [16, 32, 64]}
    elif problem.op != "stem_first":
        options["channels"] = [c for c in (*single, (64, 32)) if sum(c) < 2 * before]
    return options


def tunable(kernels: Kernels) -> list[str]:
    """Names of the kernels of a call that have something to choose."""
    return [name for name, _ in kernels if name not in FIXED]

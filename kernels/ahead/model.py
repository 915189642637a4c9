# SPDX-License-Identifier: Apache-2.0
"""What a compiled kernel may take of a multiprocessor, and a prediction of its time.

Predicted, not measured: the model says what the hardware would allow, so that choices can be
compared and a measurement be held against it. For the whole call, at the case's batch and heads,

- **bytes**: every input read once and every output written once. What several blocks read again is
  taken to come from the cache. bytes / bandwidth is the *floor*.
- **flops**: what is executed, 2 for a multiply and an add, with the padding of tiles. The rate is
  the nominal one of the matrix units for half precision, half of it for tf32; float32 in ieee runs
  on the FMA units, 2 flops * lanes * clock * multiprocessors. ``mma.sync`` in place of ``wgmma`` on
  sm_90 gets 0.62 of the rate, and by assumption the same in place of ``tcgen05.mma`` on sm_100.
- **exponentials**: of the scores, with the padding, 16 per clock and multiprocessor.

time = the largest of the three times if at least two blocks fit on a multiprocessor, else their
sum: the phases of a single block do not overlap. Launches, latencies, idle multiprocessors of small
calls and the arithmetic between the products are left out, so small kernels come out too fast.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Limits(NamedTuple):
    """Of a compute capability, and the nominal rates of one card with it."""

    # NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities", table "Technical Specifications
    # per Compute Capability". Registers are 65536 per multiprocessor on all.
    warps: int
    blocks: int
    #: Shared memory of a multiprocessor and the most that a block may opt in to, KiB.
    shared_sm: int
    shared_block: int
    #: Columns of tensor memory.
    tensor_columns: int
    # The card.
    card: str
    #: TB/s; TFLOP/s in half precision with float32 sums; GHz.
    bandwidth: float
    half: float
    multiprocessors: int
    clock: float
    #: FMA lanes of a multiprocessor.
    lanes: int


LIMITS = {
    "sm_80": Limits(64, 32, 164, 163, 0, "A100", 2.0, 312, 108, 1.41, 64),
    "sm_89": Limits(48, 24, 100, 99, 0, "RTX 4090", 1.0, 165, 128, 2.5, 128),
    "sm_90": Limits(64, 32, 228, 227, 0, "H200, reachable", 4.3, 790, 132, 1.98, 128),
    "sm_100": Limits(64, 32, 228, 227, 512, "B200", 7.7, 2250, 148, 1.9, 128),
    "sm_120": Limits(48, 24, 100, 99, 0, "RTX 5090", 1.79, 210, 170, 2.4, 128),
}

REGISTERS = 65536
#: Registers are handed to a warp in units of this many, and to warps by fours.
REGISTER_UNIT = 256
WARP_UNIT = 4
#: Shared memory that the system keeps of each block, bytes, from compute capability 8.0.
RESERVED_SHARED = 1024
EXPONENTIALS_PER_CLOCK = 16
SYNCHRONOUS_SHARE = 0.62

_SIZES = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "int64": 8}


class Work(NamedTuple):
    """Of one launch."""

    bytes: int
    flops: int
    exponentials: int


def blocks_per_multiprocessor(
    arch: str, registers: int, shared: int, warps: int, tensor_columns: int = 0
) -> int:
    """How many blocks of ``warps`` fit with ``registers`` per thread and ``shared`` bytes; 0 if
    none does.
    """
    limits = LIMITS[arch]
    if shared > limits.shared_block * 1024:
        return 0
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // per_warp // WARP_UNIT * WARP_UNIT // warps
    by_shared = limits.shared_sm * 1024 // (shared + RESERVED_SHARED)
    found = min(by_registers, by_shared, limits.warps // warps, limits.blocks)
    if tensor_columns:
        found = min(found, limits.tensor_columns // tensor_columns)
    return found


def work(kernel: str, arguments: dict[str, Any]) -> Work:
    """Of a launch, from what the kernel was given; tensors have ``shape`` and ``dtype``."""
    if kernel.startswith("stem_") and kernel.endswith(("_gradient", "_sum")):
        return _stem_gradient(kernel, arguments)
    if kernel.startswith("stem_"):
        return _stem(kernel, arguments)
    if kernel in ("position_table", "position_factors", "parameter_gradient"):
        return _small(kernel, arguments)
    if kernel in ("kronecker", "factor_gradient"):
        return _factored(kernel, arguments)
    return _attention(kernel, arguments)


def _size(x: Any) -> int:
    """Bytes of a tensor or of nothing."""
    count = 1 if x is not None else 0
    for side in () if x is None else x.shape:
        count *= side
    return count * (_SIZES[x.dtype] if x is not None else 0)


# Products of [rows, keys] by channels, and exponentials of a score.
_PRODUCTS = {
    "forward_tile": (2, 1),
    "forward_stream": (2, 1),
    "backward_tile": (5, 1),
    "backward_query": (5, 2),
    "backward_key": (4, 1),
    "dropout_forward": (3, 2),
    "dropout_query": (5, 2),
    "dropout_key": (4, 1),
}

_TENSORS = (
    "grad", "q", "k", "v", "table", "py", "px", "out", "dq", "dk", "dv", "statistics", "content",
    "parts",
)  # fmt: skip


def _attention(kernel: str, arguments: dict[str, Any]) -> Work:
    moved = sum(_size(arguments.get(name)) for name in _TENSORS)
    # What holds the position term beforehand is read, too.
    if kernel == "forward_stream" and arguments["GATED"]:
        moved += _size(arguments["out"])
    if kernel == "backward_key" and arguments["GATED"]:
        moved += _size(arguments["dv"])
    heads = arguments["q"].shape[0] * arguments["q"].shape[1]
    tokens, keys = arguments["N"], arguments["KEYS"]
    rows = -(-tokens // arguments["ROWS"]) * arguments["ROWS"]
    columns = sum(keys) if isinstance(keys, tuple) else -(-tokens // keys) * keys
    products, exponentials = _PRODUCTS[kernel]
    scores = heads * rows * columns
    return Work(moved, 2 * products * scores * sum(arguments["D_CHUNKS"]), exponentials * scores)


def _stem_gradient(kernel: str, arguments: dict[str, Any]) -> Work:
    moved = sum(_size(x) for x in arguments.values() if hasattr(x, "shape"))
    if kernel == "stem_raw_gradient":
        # In place.
        moved += _size(arguments["dz"])
    if kernel in ("stem_raw_gradient", "stem_weight_sum", "stem_norm_gradient"):
        return Work(moved, 0, 0)

    def padded(size: int, tile: int) -> int:
        return -(-size // tile) * tile

    rows, C, OUT = (arguments[name] for name in ("ROWS", "C", "OUT"))
    positions = padded(arguments["B"] * arguments["OH"] * arguments["OW"], rows)
    if kernel == "stem_image_gradient":
        # The taps inside uint8 images are columns, too.
        columns = arguments["K"] + (16 if arguments["x"].dtype == "uint8" else 0)
        return Work(moved, 2 * positions * columns * padded(OUT, arguments["OUTS"]), 0)
    if kernel == "stem_weight_gradient":
        products = padded(C, arguments["INS"]) * padded(OUT, arguments["OUTS"])
        return Work(moved, 2 * positions * arguments["TAPS"] * products, 0)
    # Pixels of four kinds with stride 2, of which nine taps in all are summed.
    stride = arguments["STRIDE"]
    sides = [-(-arguments[side] // stride) for side in ("H", "W")]
    positions = padded(arguments["B"] * sides[0] * sides[1], rows)
    products = padded(C, arguments["WIDTH"]) * padded(OUT, arguments["DEPTH"])
    return Work(moved, 2 * positions * arguments["TAPS"] * products, 0)


def _factored(kernel: str, arguments: dict[str, Any]) -> Work:
    names = ("x", "out", "grad", "v", "py", "px", "dpy", "dpx")
    moved = sum(_size(arguments.get(name)) for name in names)
    block, channels = arguments["BLOCK"], arguments["CHANNELS"]
    x = arguments["x"] if kernel == "kronecker" else arguments["v"]
    tiles = x.shape[0] * x.shape[1] * -(-arguments["D"] // channels)
    tiles *= -(-arguments["GH"] // block) * -(-arguments["GW"] // block)
    # One product with each factor, and two for the gradient of each.
    products = (1 if kernel == "kronecker" else 2) * (arguments["TILE_Y"] + arguments["TILE_X"])
    return Work(moved, tiles * products * 2 * block * block * channels, 0)


def _stem(kernel: str, arguments: dict[str, Any]) -> Work:
    moved = sum(_size(x) for x in arguments.values() if hasattr(x, "shape"))
    if kernel in ("stem_statistics", "stem_affine"):
        return Work(moved, 0, 0)
    tokens = kernel == "stem_tokens"
    positions = arguments["B"] * (arguments["N"] if tokens else arguments["OH"] * arguments["OW"])
    positions = -(-positions // arguments["ROWS"]) * arguments["ROWS"]
    block = sum(arguments["OUT_CHUNKS"])
    out = -(-arguments["OUT"] // block) * block
    if kernel == "stem_first":
        products = arguments["K"] * out
    elif kernel == "stem_pair":
        # The first layer again at every tap of the second.
        between = sum(arguments["C1_CHUNKS"])
        products = 9 * between * (arguments["K"] + out)
    else:
        step = arguments["C_BLOCK"]
        products = (1 if tokens else 9) * -(-arguments["C"] // step) * step * out
    return Work(moved, 2 * positions * products, 0)


def _small(kernel: str, arguments: dict[str, Any]) -> Work:
    moved = sum(_size(x) for x in arguments.values() if hasattr(x, "shape"))
    if kernel == "parameter_gradient":
        return Work(moved, 0, 0)
    if kernel == "position_table":
        heads, tokens, pitch = arguments["table"].shape
        queries = pitch if arguments["TRANSPOSED"] else tokens
        rows = -(-queries // arguments["ROWS"]) * arguments["ROWS"]
        return Work(moved, 0, heads * rows * arguments["COLUMNS"])
    heads = arguments["py"].shape[0]
    return Work(moved, 0, heads * (arguments["TILE_Y"] ** 2 + arguments["TILE_X"] ** 2))


def rate(arch: str, arithmetic: str, instruction: str) -> float:
    """TFLOP/s of products in "half", "tf32" or "ieee" by a matrix instruction."""
    limits = LIMITS[arch]
    if arithmetic == "ieee":
        return 2 * limits.lanes * limits.clock * limits.multiprocessors / 1000
    found = limits.half / (2 if arithmetic == "tf32" else 1)
    if arch in ("sm_90", "sm_100") and instruction == "mma.sync":
        found *= SYNCHRONOUS_SHARE
    return found


def floor(arch: str, done: Work) -> float:
    """Microseconds that the bytes alone take; predicted, not measured."""
    return done.bytes / LIMITS[arch].bandwidth / 1e6


def predict(arch: str, arithmetic: str, instruction: str, blocks: int, done: Work) -> float:
    """Microseconds, predicted, not measured."""
    limits = LIMITS[arch]
    exponentials = EXPONENTIALS_PER_CLOCK * limits.clock * limits.multiprocessors * 1e3
    times = (
        floor(arch, done),
        done.flops / rate(arch, arithmetic, instruction) / 1e6,
        done.exponentials / exponentials,
    )
    return max(times) if blocks >= 2 else sum(times)

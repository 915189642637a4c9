# SPDX-License-Identifier: Apache-2.0
"""The emulator of CUDA that tests/test_cuda_forward.py relies on: that it refuses kernels with
faults which a GPU may not show, and that its warp instructions follow NVIDIA's PTX ISA.
"""

from __future__ import annotations

import importlib.util
import math
import struct
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="csrc/ is not beside tests/"),
    pytest.mark.skipif(sys.platform != "linux", reason="macOS has given up ucontext"),
]


@pytest.fixture(scope="session")
def broken(tmp_path_factory):
    path = ROOT / "tests" / "emulator" / "build.py"
    spec = importlib.util.spec_from_file_location("emulator_build", path)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build.build_broken(tmp_path_factory.mktemp("broken-kernels"))


VALUES = [float(i) for i in range(64)]
# Some have two messages: which of two threads comes first is chance.
FAULTS = {
    "no_barrier": "read of shared memory that (nobody wrote|thread [0-9]+ wrote without a barrier)",
    "no_barrier_before_write": (
        "write to shared memory that others read without a barrier|"
        "read of shared memory that thread [0-9]+ wrote without a barrier"
    ),
    "two_writers": "write to shared memory that thread [0-9]+ wrote without a barrier",
    "no_wait": "read of shared memory before the copy to it was waited for",
    "too_few_groups": "read of shared memory before the copy to it was waited for",
    "copy_over_read": (
        "write to shared memory that others read without a barrier|"
        "read of shared memory before the copy to it was waited for"
    ),
    "store_over_copy": "write to shared memory to which a copy is under way",
    "misaligned_copy": "misaligned access of 16 bytes to global memory",
    "unwritten_shared": "read of shared memory that nobody wrote",
    "shared_beyond": "access beyond shared memory at [0-9]+",
    "shared_wraps_around": "access beyond shared memory at 4294967280",
    "misaligned_shared": "misaligned access to shared memory at [0-9]+",
    "read_beyond": "read of global memory outside the tensors",
    "misaligned_read": "misaligned access of 4 bytes to global memory",
    "write_beyond": "write to global memory outside the outputs",
    "write_to_input": "write to global memory outside the outputs",
    "second_write": "second write to a byte of the output",
    "read_of_output": "read of an output that no earlier launch wrote",
    "skipped_barrier": "some threads wait for others that never come",
    "two_barriers": "threads wait at different barriers",
    "skipped_instruction": "some threads wait for others that never come",
    "different_instructions": "lanes of a warp execute different instructions",
    "unrounded": "operand of the tensor cores that was not rounded to tf32",
    "too_many_blocks": "launched with 65536 rows of blocks",
    "too_many_threads": "launched with 1056 threads",
    "too_much_shared": "launched with 232464 bytes of shared memory",
}


def test_every_fault_is_tried(broken):
    assert set(broken.faults()) == {"none", "none_of_product", *FAULTS}


def test_right_kernels_pass(broken):
    neighbours = VALUES[1:] + VALUES[:1]
    assert broken.run("none", VALUES) == [2 * x for x in neighbours]
    # Rounded to 10 bits behind the point.
    assert broken.run("none_of_product", [1 + 2**-12, *VALUES[1:]]) == [16.0] * 64


@pytest.mark.parametrize(("fault", "message"), FAULTS.items(), ids=FAULTS)
def test_a_fault_is_refused(broken, fault, message):
    for seed in range(10):
        with pytest.raises(RuntimeError, match=message) as refusal:
            broken.run(fault, [1.1, *VALUES[1:]], seed)
        assert str(refusal.value).startswith(("copy_kernel", "multiply_kernel"))


def test_a_refusal_leaves_nothing_behind(broken):
    with pytest.raises(RuntimeError):
        broken.run("no_wait", VALUES)
    assert broken.run("none", VALUES)[:2] == [2.0, 4.0]


# The formulas of the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", with
# its names; i counts elements, of which a register of 32 bits holds two.


def a_of_k16(lane, i):
    group, member = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, member * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_of_k16(lane, i):
    group, member = lane >> 2, lane % 4
    return member * 2 + (i & 1) + (8 if i >= 2 else 0), group


# And of "Matrix Fragments for mma.m16n8k8" with .tf32.


def a_of_k8(lane, i):
    group, member = lane >> 2, lane % 4
    return (group if i in (0, 2) else group + 8), (member if i in (0, 1) else member + 4)


def b_of_k8(lane, i):
    group, member = lane >> 2, lane % 4
    return (member if i == 0 else member + 4), group


def c_of_both(lane, i):
    group, member = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), member * 2 + (i & 1)


def half(x):
    return struct.unpack("<H", struct.pack("<e", x))[0]


def single(x):
    return struct.unpack("<I", struct.pack("<f", x))[0]


def matrices(depth):
    # Small integers without symmetries: exact in either type.
    a = [[(7 * r + 3 * k * k + r * k) % 11 - 5 for k in range(depth)] for r in range(16)]
    b = [[(5 * k + 2 * n * n + 3 * k * n) % 13 - 6 for n in range(8)] for k in range(depth)]
    return a, b


def expect_product(sums, a, b):
    for lane in range(32):
        for i in range(4):
            row, column = c_of_both(lane, i)
            expected = sum(a[row][k] * b[k][column] for k in range(len(b)))
            assert sums[lane][i] == expected, (lane, i)


def test_half_products_follow_the_fragments_of_the_isa(broken):
    a, b = matrices(16)

    def pack(matrix, place, lane, register):
        low, high = (place(lane, 2 * register + e) for e in range(2))
        return half(matrix[low[0]][low[1]]) | half(matrix[high[0]][high[1]]) << 16

    left = [[pack(a, a_of_k16, lane, r) for r in range(4)] for lane in range(32)]
    right = [[pack(b, b_of_k16, lane, r) for r in range(2)] for lane in range(32)]
    expect_product(broken.multiply_half(left, right), a, b)


def test_tf32_products_follow_the_fragments_of_the_isa(broken):
    a, b = matrices(8)

    def pack(matrix, place, lane, register):
        row, column = place(lane, register)
        return single(matrix[row][column])

    left = [[pack(a, a_of_k8, lane, r) for r in range(4)] for lane in range(32)]
    right = [[pack(b, b_of_k8, lane, r) for r in range(2)] for lane in range(32)]
    expect_product(broken.multiply_tf32(left, right), a, b)


def test_matrix_loads_follow_the_isa(broken):
    """Lane l passes row l % 8 of matrix l / 8 and receives elements 2 (l % 4) and the next of row
    l / 4 of each; transposed, of column l / 4.
    """
    rows = [[64 * (lane // 8) + 8 * (lane % 8) + c for c in range(8)] for lane in range(32)]
    plain, transposed = broken.load_matrices(rows), broken.load_matrices_transposed(rows)
    for lane in range(32):
        for matrix in range(4):
            along, across = 2 * (lane % 4), lane // 4
            low = 64 * matrix + 8 * across + along
            assert plain[lane][matrix] == low | (low + 1) << 16
            low = 64 * matrix + 8 * along + across
            assert transposed[lane][matrix] == low | (low + 8) << 16


@pytest.mark.parametrize(
    ("x", "rounded"),
    [
        (1.0, 1.0),
        (1 + 2**-11, 1 + 2**-10),  # halves away from zero
        (-1 - 2**-11, -1 - 2**-10),
        (1 + 3 * 2**-11, 1 + 2**-9),
        (1 + 2**-11 - 2**-23, 1.0),
        (2 - 2**-11, 2.0),
        (3.4028234663852886e38, math.inf),
        (-math.inf, -math.inf),
        (2.0**-140, 2.0**-136 * 0),
        (2.0**-137, 2.0**-136),
    ],
)
def test_rounding_to_tf32(broken, x, rounded):
    assert broken.round_to_tf32(single(x)) == single(rounded)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0xFFFFFFFF])
def test_a_nan_stays_one_in_tf32(broken, bits):
    assert broken.round_to_tf32(bits) & 0x7FFFE000 > 0x7F800000

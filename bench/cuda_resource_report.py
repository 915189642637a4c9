# SPDX-License-Identifier: Apache-2.0
"""What ``nvcc -Xptxas -v`` and its PTX say about kernels, and the tables of it for reading."""

from __future__ import annotations

import re
from typing import Any

from resource_model import REGISTERS, blocks_per_multiprocessor

Row = dict[str, Any]

#: The instructions that matter, as PTX has them in every version.
INSTRUCTIONS = {
    "mma.sync": r"(?<![\w.])mma\.sync\b",
    "wgmma": r"\bwgmma\.mma_async\b",
    "tcgen05.mma": r"\btcgen05\.mma\b",
    "ldmatrix": r"\bldmatrix\b",
    "cp.async": r"\bcp\.async\.c[ag]\b",
    "TMA": r"\bcp\.async\.bulk\.tensor\b",
}

#: In place of the instructions of a kernel that is not meant for an architecture.
EMPTY = "empty"

# The capability in kernels/ahead/model.py with the same registers and warps.
_SAME_LIMITS = {"86": "89"}

_HEAD = """# What the CUDA kernels take

Written by `python bench/cuda_resources.py --write` (`make resources`) from the report of the
compiler; no GPU was involved. The same with barriers, shared and constant memory, for programs:
`nvcc-*.json`. Shared memory is chosen at launch (`csrc/launch.cuh`) and has no column.

- **kernel**: with its arithmetic, the type of its pixels and its tile, rows x columns or columns.
- **threads** of a block; **most**: registers that a thread may have, by launch bounds and hardware.
- A column for each architecture: registers of a thread, and in brackets how many blocks they and
  the threads allow on a multiprocessor. Where a kernel spills, which the check refuses, it says so;
  where it is empty, because it is for other architectures, there is nothing.
- **instructions** for products and copies; "none" are FMA and plain loads. TMA is
  `cp.async.bulk.tensor`.
"""


def parse_log(text: str) -> dict[str, Row]:
    """What ptxas says of each kernel, by mangled name."""
    rows: dict[str, Row] = {}
    for part in text.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]
        # Functions that were not inlined have stacks too, and spills.
        frames = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        used = re.search(r"Used (\d+) registers.*", part)
        if used is None or not frames:
            raise ValueError(f"ptxas reports no registers or no stack of {name}")
        constant = re.findall(r"(\d+) bytes cmem", used[0])
        rows[name] = {
            "registers": int(used[1]),
            "stack": sum(int(frame[0]) for frame in frames),
            "spill_stores": sum(int(frame[1]) for frame in frames),
            "spill_loads": sum(int(frame[2]) for frame in frames),
            "barriers": _number(r"used (\d+) barriers", used[0]),
            "shared": _number(r"(\d+) bytes smem", used[0]),
            # Of newer architectures ptxas does not say it.
            "constant": sum(map(int, constant)) if constant else None,
        }
    return rows


def parse_remarks(text: str) -> list[str]:
    """Warnings of ptxas and what it numbers, such as products that it made wait for each other."""
    lines = re.findall(r"^ptxas (?:warning *:|info *: \(C\d+\)).*", text, re.MULTILINE)
    return [line.strip() for line in lines]


def parse_ptx(text: str) -> dict[str, Row]:
    """Threads, launch bounds and instructions of each kernel, by mangled name."""
    rows: dict[str, Row] = {}
    for part in re.split(r"^(?:\.visible |\.weak )*\.entry ", text, flags=re.MULTILINE)[1:]:
        head, _, rest = part.partition("\n{")
        # Inline assembly has braces of its own, so the end is where something else begins.
        body = re.split(r"^[.\w ]*\.func ", rest, maxsplit=1, flags=re.MULTILINE)[0]
        found = [name for name, pattern in INSTRUCTIONS.items() if re.search(pattern, body)]
        # A kernel for one architecture only has nothing but its return or a trap on the others.
        nothing = "none" if re.sub(r"//.*|ret;|trap;|[\s}]", "", body) else EMPTY
        sides = re.search(r"\.(?:max|req)ntid (\d+)(?:, (\d+))?(?:, (\d+))?", head)
        if sides is None:
            raise ValueError(f"no launch bounds: {head.splitlines()[0]}")
        threads = 1
        for side in sides.groups("1"):
            threads *= int(side)
        rows[re.split(r"\W", head, maxsplit=1)[0]] = {
            "threads": threads,
            "least_blocks": _number(r"\.minnctapersm (\d+)", head) or 1,
            "instructions": " + ".join(found) or nothing,
        }
    return rows


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def enumerators(text: str) -> dict[str, list[str]]:
    """The names of each ``enum class`` of sources, without the k."""
    found = re.findall(r"enum class (\w+)[^{;]*\{([^}]*)\}", text)
    return {name: re.findall(r"\bk(\w+)", body) for name, body in found}


def short_name(demangled: str, enums: dict[str, list[str]]) -> str:
    """The name with the arguments of its template as the tables of Triton's kernels have them:
    ``patch_embed_kernel<bfloat16, uint8, 128x128>``.
    """
    name = re.sub(r"fastvit::|\(anonymous namespace\)::|^void ", "", demangled)
    # Behind the name stand the types of the kernel's arguments, none of them a template's.
    name = re.sub(r"\([^()<>]*\)$", "", name)
    for enum, values in enums.items():
        name = re.sub(rf"\({enum}\)(\d+)", lambda found, v=values: v[int(found[1])], name)
    name = re.sub(r"\w*Tile<(\d+)>", r"\1", name)
    name = re.sub(r"\w*Tile<(\d+), (\d+)[^<>]*>", r"\1x\2", name).replace(" >", ">")
    kernel, bracket, arguments = name.partition("<")
    words = {"unsigned char": "uint8", "Half": "float16"}
    for old, new in words.items():
        arguments = re.sub(rf"\b{old}\b", new, arguments)
    return kernel + bracket + arguments.lower()


def occupancy(arch: str, row: Row) -> Row:
    """The most registers that a thread may have, and the blocks of a multiprocessor."""
    threads, digits = row["threads"], arch.rstrip("af")
    share = REGISTERS // (threads * row["least_blocks"]) // 8 * 8
    limits = f"sm_{_SAME_LIMITS.get(digits, digits)}"
    blocks = blocks_per_multiprocessor(limits, row["registers"], 0, -(-threads // 32))
    return {"most_registers": min(255, share), "blocks": blocks}


def markdown(tables: dict[str, list[Row]]) -> str:
    """A table for each version of nvcc, from its rows."""
    parts = [_HEAD]
    for version, rows in tables.items():
        archs = list(dict.fromkeys(row["arch"] for row in rows))
        kernels = list(dict.fromkeys(row["kernel"] for row in rows))
        titles = ["kernel", "threads", "most", *archs, "instructions"]
        parts.append(f"\n## nvcc {version}\n\n| " + " | ".join(titles) + " |\n")
        parts.append("| --- |" + " ---: |" * (len(archs) + 2) + " --- |\n")
        for kernel in kernels:
            here = {row["arch"]: row for row in rows if row["kernel"] == kernel}
            parts.append("| " + " | ".join(_cells(kernel, here, archs)) + " |\n")
    return "".join(parts)


def _cells(kernel: str, rows: dict[str, Row], archs: list[str]) -> list[str]:
    full = {arch: row for arch, row in rows.items() if row["instructions"] != EMPTY}

    def united(column: str) -> str:
        return ", ".join(dict.fromkeys(str(row[column]) for row in full.values()))

    taken = [_taken(full[arch]) if arch in full else "" for arch in archs]
    first = [f"`{kernel}`", united("threads"), united("most_registers")]
    return [*first, *taken, united("instructions")]


def _taken(row: Row) -> str:
    spills = ", spills" if spilled(row) else ""
    return f"{row['registers']} ({row['blocks']}){spills}"


def spilled(row: Row) -> bool:
    return bool(row["stack"] or row["spill_stores"] or row["spill_loads"])

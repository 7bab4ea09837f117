# SPDX-License-Identifier: BSD-3-Clause
"""Counts the instructions of the CUDA kernels per element, in the machine code for a GPU. Needs nvcc, but no GPU.

    python benchmarks/sass.py

The kernels for 16-bit types are bound by instructions and not by memory. An H100 that moves data at its copy speed has
time for 43 issued instructions per element, 21 of them for the integer and compare units. The count is that of the
longest path through sass.cu, without the code for the edges of a matrix. The settings of a call are constants there;
the library's kernels test them once per thread, which takes up to one instruction per element more.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ELEMENTS = {"prune": 16, "pack": 32}  # of a thread
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.+?) ;")
# Blocks with these instructions run only at an edge: single elements are loaded, or a slow division is called.
_RARE = ("LDG.E.U16", "CALL.REL")
# What runs in the integer and compare units. They take half as many instructions per cycle as a multiprocessor issues.
_ALU = re.compile(
    r"^(?:@!?P\d )?(?:IADD3|LOP3|SHF|LEA|ISETP|FSETP|SEL|FSEL|PRMT|PLOP3|FMNMX|V?IMNMX|VIADD|VIADDMNMX|IABS|P2R|R2P)\b"
)


def machine_code(architecture: str) -> str:
    """Compiles sass.cu and returns its disassembly."""
    nvcc, disassembler = _tool("nvcc"), _tool("cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "sass.cubin"
        flags = ["-std=c++20", "-O3", "-fmad=false", "--expt-relaxed-constexpr"]  # those of cmake/SdgpCuda.cmake
        subprocess.run([nvcc, "-cubin", f"-arch={architecture}", *flags, "-o", cubin, HERE / "sass.cu"], check=True)
        return subprocess.run([disassembler, "-sass", cubin], check=True, capture_output=True, text=True).stdout


def _tool(name: str) -> str:
    """Finds a tool of the CUDA toolkit, or the copy in triton."""
    found = shutil.which(name)
    if found is None:
        for folder in sys.path:
            copy = Path(folder) / "triton" / "backends" / "nvidia" / "bin" / name
            if copy.exists():
                return str(copy)
        sys.exit(f"sass: expected {name} of the CUDA toolkit on PATH, found none")
    return found


def functions(text: str) -> dict[str, list[tuple[int, str]]]:
    """Returns (address, instruction) for each function of a disassembly."""
    found: dict[str, list[tuple[int, str]]] = {}
    for line in text.splitlines():
        if "Function : " in line:
            found[line.split()[-1]] = code = []
        elif match := _INSTRUCTION.search(line):
            code.append((int(match[1], 16), match[2]))
    return found


def longest_path(code: list[tuple[int, str]]) -> tuple[int, int]:
    """Returns the instructions on the longest path from the entry to an exit, and those for the integer and compare
    units.

    Raises:
        ValueError: if there is a loop.
    """
    targets = {at: _target(text) for at, text in code}
    starts = {code[0][0], *(target for target in targets.values() if target is not None)}
    starts |= {code[i + 1][0] for i, (at, text) in enumerate(code[:-1]) if targets[at] is not None or _ends(text)}
    blocks: dict[int, list[tuple[int, str]]] = {}
    for at, text in code:
        if at in starts:
            blocks[at] = block = []
        block.append((at, text))
    follower = dict(itertools.pairwise(blocks))
    paths: dict[int, tuple[int, int] | None] = {}  # from a block's start to an exit; None: no such path
    open_blocks: set[int] = set()

    def path_from(start: int) -> tuple[int, int] | None:
        if start in open_blocks:
            raise ValueError(f"a loop at {start:#x}")
        if start not in paths:
            open_blocks.add(start)
            block = blocks[start]
            last, text = block[-1]
            following = [targets[last]] if targets[last] is not None else []
            following += [follower[start]] if start in follower and not _ends(text) else []
            known = [path for at in following if at is not None and (path := path_from(at)) is not None]
            if any(rare in line for _, line in block for rare in _RARE) or (following and not known):
                paths[start] = None
            else:
                issued, units = max(known, default=(0, 0))
                paths[start] = issued + len(block), units + sum(bool(_ALU.match(line)) for _, line in block)
            open_blocks.remove(start)
        return paths[start]

    path = path_from(code[0][0])
    assert path is not None
    return path


def _target(text: str) -> int | None:
    match = re.search(r"\bBRA(?:\.\w+)* (?:!?U?P\d, )?(0x[0-9a-f]+)", text)
    return int(match[1], 16) if match else None


def _ends(text: str) -> bool:
    """Whether the next instruction is not reached from this one."""
    operation, *operands = text.split()
    if operation.partition(".")[0] == "BRA":
        return not re.match(r"!?U?P\d", operands[0])  # else it has a condition
    return operation.partition(".")[0] in ("EXIT", "RET")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=("sm_80", "sm_90"), default="sm_90")
    args = parser.parse_args()
    print(f"| {args.arch}, 2:4, bfloat16 | instructions per element | integer and compare |\n|---|---|---|")
    for name, code in sorted(functions(machine_code(args.arch)).items()):
        issued, units = longest_path(code)
        elements = ELEMENTS[name.partition("_")[0]]
        print(f"| {name.replace('_', ', ')} | {issued / elements:.1f} | {units / elements:.1f} |")


if __name__ == "__main__":
    main()

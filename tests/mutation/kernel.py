# SPDX-License-Identifier: BSD-3-Clause
"""Mutation testing of the selection kernel: `make mutants` runs it, pytest does not.

Each mutant is one changed operator, number or statement of one line; the C++ tests are compiled with it, without
optimization and for the baseline alone, first those that take seconds. It is killed where one fails or hangs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from results import Mutant, Outcome, main

ROOT = Path(__file__).parents[2]
FILES = ("select_nm-inl.h", "sorting_network.h", "prune_nm-inl.h")
COMPILER = os.environ.get("CXX", "c++")
FLAGS = (
    *("-std=c++20", "-O0", "-w", "-ffp-contract=off", "-Wno-psabi", "-Icpp", "-Itests/cpp"),
    "-fconstexpr-ops-limit=4000000",  # an endless loop at compile time
)
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SECONDS = 120

_TAILS = "prune_nm-inl.h: if (tails && done > tail_row && (done - tail_row == kL || unit + 1 == end)) {"
_STAGED = "prune_nm-inl.h: static constexpr int kStaged = (kM <= 16 ? 8 : 4) * kL;  // lanes staged at a time"
_PADDED = (
    "select_nm-inl.h: for (int j = 0; j < kM; ++j) key[j] &= (Key<C>)(group.length > static_cast<typename C::U>(j));"
)
EQUIVALENT = {
    "prune_nm-inl.h: const int64_t length = args.size - first < args.m ? args.size - first : args.m; -> "
    "const int64_t length = args.size - first <= args.m": "where the two are equal, either is the length",
    "prune_nm-inl.h: for (int64_t at = plan.inner * chunk / plan.chunks; at < stop; at += kL) { -> "
    "for (int64_t at = plan.inner * chunk / plan.chunks; at <= stop": "steps back, and prunes the last tile again",
    "prune_nm-inl.h: for (int64_t at = plan.full * chunk / plan.chunks; at < stop; at += kL) { -> "
    "for (int64_t at = plan.full * chunk / plan.chunks; at <= stop": "steps back, and prunes the last tile again",
    f"{_TAILS} -> if (tails && done >= tail_row": "where the two are equal, there is no tail to prune",
    f"{_TAILS} -> if (tails && done > tail_row && (done + tail_row": "how many tails make a tile: any number",
    f"{_TAILS} -> if (tails && done > tail_row && (done - tail_row !=": "how many tails make a tile: any number",
    "prune_nm-inl.h: if (args.size % args.m != 0) std::memset(in, 0, sizeof in); -> if (args.size / args.m != 0)": (
        "where a row is shorter than a group, all tails are as long, and what pads them stays zero"
    ),
    "prune_nm-inl.h: tail_row = done; -> ;": "tails pruned before are pruned again",
    **{
        f"{_STAGED} -> static constexpr int kStaged = (kM {size}": "how many tiles are staged at a time: any number"
        for size in ("< 16", "<= 17", "<= 16 ? 9", "<= 16 ? 8 : 5")
    },
    "prune_nm-inl.h: args.ndim ? static_cast<uint64_t>(args.dims[args.ndim - 1].row_step * plan.row_groups) : 0; -> "
    "args.ndim ? static_cast<uint64_t>(args.dims[args.ndim - 1].row_step * plan.row_groups) : 1": (
        "without other dimensions there is one row"
    ),
    "prune_nm-inl.h: prune_tile<C, kMethod, kM>(x, args, offsets.from(index, kM, false)); -> "
    "prune_tile<C, kMethod, kM>(x, args, offsets.from(index, kM, true": "a group as long as kM has no padding to mask",
    "prune_nm-inl.h: static constexpr int group_of_lane(int lane) { return kM <= kL ? (lane % kM) * (kL / kM) + "
    "lane / kM : lane; } -> static constexpr int group_of_lane(int lane) { return kM < kL": (
        "the same where they are equal"
    ),
    "prune_nm-inl.h: if (kM > kL) return at; -> if (kM >= kL)": "the same where they are equal",
    "prune_nm-inl.h: constexpr int kMost = 64;  // pieces at a time -> constexpr int kMost = 65;": (
        "how many pieces a tile may have: any number"
    ),
    "prune_nm-inl.h: if constexpr (kM <= kL) { -> if constexpr (kM < kL)": "where they are equal, both are one block",
    "prune_nm-inl.h: args, plan, p, kStaged, kM, inner ? inner->out_stride : 0, args.out_stride, -> "
    "args, plan, p, kStaged, kM, inner ? inner->out_stride : 1": "without other dimensions there is one row",
    "prune_nm-inl.h: args, plan, p, kStaged, kM, inner ? inner->in_stride : 0, args.in_stride, -> "
    "args, plan, p, kStaged, kM, inner ? inner->in_stride : 1": "without other dimensions there is one row",
    "prune_nm-inl.h: const int64_t p = at + kL <= stop ? at : stop - kL; -> const int64_t p = at + kL < stop": (
        "where the sum is `stop`, both are the same"
    ),
    "prune_nm-inl.h: const int64_t g = at + kL <= stop ? at : stop - kL;  // steps back as in run_rows -> "
    "const int64_t g = at + kL < stop": "as for p",
    "sorting_network.h: for (int j = k % p; j + k < kM; j += 2 * k) { -> for (int j = k % p; j + k <= kM;": (
        "what it adds would cross into another block, and is never emitted"
    ),
    "select_nm-inl.h: if constexpr (kM <= 8) { ->": "which of two algorithms that select the same",
    "select_nm-inl.h: out[j] = keep_if(keep, magnitude[j] >= step ? splat<E>(1) : C::round(step / magnitude[j])); -> "
    "out[j] = keep_if(keep, magnitude[j] > step": "where the two are equal, their quotient is 1",
    "select_nm-inl.h: for (int i = 0; i < kM; ++i) { -> for (int i = 0; i <= kM;": "beyond the last there is no pair",
    "select_nm-inl.h: if constexpr (sizeof(typename C::U) > 4) return x & 0xffffffffu; -> "
    "if constexpr (sizeof(typename C::U) >= 4)": "of 32 bits the mask takes nothing",
    "select_nm-inl.h: if constexpr (sizeof(typename C::U) > 4) return x & 0xffffffffu; -> "
    "if constexpr (sizeof(typename C::U) > 5)": "there are words of 4 and of 8 bytes",
    f"{_PADDED} -> for (int j = 1;": "a group has at least one element",
}

# Layout puts spaces around what is binary, and none inside of a template's brackets.
_SWAPS = {
    "<": "<=", ">": ">=", "<=": "<", ">=": ">", "==": "!=", "!=": "==",
    "+": "-", "-": "+", "*": "/", "/": "*", "%": "/", "+=": "-=", "-=": "+=", "*=": "+=",
    "&": "|", "|": "&", "^": "|", "^=": "|=", "&=": "|=", ">>": "<<", "<<": ">>", "&&": "||", "||": "&&",
}  # fmt: skip
_NAMES = {
    "vmin": "vmax", "vmax": "vmin", "add_if": "add_unless", "add_unless": "add_if", "true": "false", "false": "true",
}  # fmt: skip
_TOKEN = re.compile(
    r"(?<= )(?P<operator>[<>]=?|[=!]=|[-+*]=|[&^]=|<<|>>|&&|\|\||[-+*/%&|^])(?= )"
    r"|\b(?P<name>vmin|vmax|add_if|add_unless|true|false)\b"
    r"|(?P<not>!)(?=\w)"
    r"|(?<![\w.])(?P<number>0x[0-9a-f]+|\d+)(?P<suffix>u?)(?![\w.])"
)
_STATEMENT = re.compile(
    r"^(\s+)((?:[\w.\[\]]+ [-+*^&|]?= |transpose<|std::mem|select_largest|apply_mask|prune_tile).*;)$"
)


def _changes(line: str) -> Iterator[str]:
    code = line.split("//")[0].rstrip()
    if code.lstrip().startswith(("#", "template", "using", "namespace", "static_assert")):
        return
    for found in _TOKEN.finditer(code):
        if found["operator"]:
            new = _SWAPS[found["operator"]]
        elif found["name"]:
            new = _NAMES[found["name"]]
        elif found["not"]:
            new = ""
        else:
            new = f"{int(found['number'], 0) + 1}{found['suffix']}"
        yield code[: found.start()] + new + code[found.end() :]
    if _STATEMENT.match(code):
        yield _STATEMENT.sub(r"\1;", code)


def mutants() -> Iterator[Mutant]:
    for file in FILES:
        lines = (ROOT / "cpp/kernels" / file).read_text().splitlines()
        for number, line in enumerate(lines):
            for changed in _changes(line):
                source = "\n".join([*lines[:number], changed, *lines[number + 1 :], ""])
                yield Mutant(file, number + 1, f"{line.strip()} -> {changed.strip()}", source)


def judge(mutant: Mutant) -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("cpp", "tests/cpp", "tests/mutation"):
            shutil.copytree(ROOT / part, folder / part)
        if mutant.source:
            (folder / "cpp/kernels" / mutant.file).write_text(mutant.source)
        for test in _tests(mutant.file):
            if subprocess.run([COMPILER, *FLAGS, *test, "-o", "test"], cwd=folder, capture_output=True).returncode:
                return "invalid"
            if not _passes(folder):
                return "killed"
    return "survived"


def _tests(file: str) -> Iterator[tuple[str, ...]]:
    if file != "prune_nm-inl.h":
        yield ("-DSDGP_FEW", "tests/cpp/select_test.cpp")
        yield ("-DSDGP_FEW", *SANITIZED, "tests/cpp/select_test.cpp")
        yield ("tests/cpp/select_test.cpp",)
    kernels = ("tests/mutation/baseline.cpp", "tests/cpp/kernels_test.cpp")
    yield ("-DSDGP_FEW", *kernels)
    yield ("-DSDGP_FEW", *SANITIZED, *kernels)
    if not os.environ.get("QUICK"):
        yield kernels


def _passes(folder: Path) -> bool:
    """Ends the test at its first failure, or where it hangs."""
    with subprocess.Popen([folder / "test"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as test:
        timer = threading.Timer(SECONDS, test.kill)
        timer.start()
        assert test.stdout is not None
        failed = any(line.startswith("FAILED") for line in test.stdout)
        timer.cancel()
        test.kill() if failed else test.wait()
    return not failed and test.returncode == 0


if __name__ == "__main__":
    main("kernel", mutants(), judge, EQUIVALENT)

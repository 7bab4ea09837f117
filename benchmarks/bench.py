# SPDX-License-Identifier: BSD-3-Clause
"""Code that all benchmarks share: arguments, timing (from ``sdgp._timing``), and printing and storing rows."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from sdgp._machine import changes, machine
from sdgp._timing import interleaved as interleaved
from sdgp._timing import interval
from sdgp._timing import rounds_of as rounds_of
from sdgp_cli import count as count

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = ("CMakeLists.txt", "cpp", "cuda", "python", "benchmarks/*.py")

#: One measurement, as it is stored.
Row: TypeAlias = dict[str, Any]


def arguments(description: str | None, rounds: str | None = None) -> argparse.ArgumentParser:
    """Returns a parser with the common arguments --rounds (with the help text ``rounds``), --threads and --store."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--rounds", type=count, default=15, help=rounds)
    result.add_argument("--threads", type=count, default=1)
    result.add_argument("--store", metavar="NAME", help="write benchmarks/results/NAME.json")
    return result


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line, and sets the number of threads and the seed.

    Returns the arguments, with the machine for ``finish`` as ``machine``. Exits if results must not be stored.
    """
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.machine = _committed_machine(args.rounds) if args.store else {}
    return args


def finish(args: argparse.Namespace, subject: str, rows: Iterable[Row], line: Callable[[Row], str]) -> list[Row]:
    """Prints the line of each row as soon as it is measured. Stores the rows if ``--store`` asks for it."""
    measured = []
    for row in rows:
        print(line(row), flush=True)
        measured.append(row)
    if args.store:
        store(subject, args.machine, measured, args.store)
    return measured


def median_and_interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Returns the median and the ends of its 95 % interval, from order statistics."""
    ordered = sorted(values)
    low, high = interval(len(ordered))
    return statistics.median(ordered), ordered[low], ordered[high]


def _committed_machine(rounds: int) -> Row:
    """Returns the machine. Exits before the benchmark runs if its rows must not be stored."""
    if rounds < 10:
        raise SystemExit(f"--store: expected at least 10 rounds, got {rounds}")
    if changed := changes(ROOT, *MEASURED):
        raise SystemExit(f"--store: expected what is measured to be committed, got changes in\n{changed}")
    where = machine(ROOT, *MEASURED)
    if where["commit"] == "unknown":
        raise SystemExit("--store: expected a git checkout, got none")
    return where


def subject_here(subject: str) -> str:
    """Adds to ``subject`` the environment settings that affect results.

    These are huge pages, and the instruction set to which the exact product is limited.
    """
    if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1":
        subject += ", huge pages"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return subject if limit is None else f"{subject}, exact limited to {limit}"


def store(subject: str, machine: Row, rows: list[Row], name: str) -> None:
    """Writes results/<name>.json and keeps the results of other subjects in it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results[subject] = {"machine": machine, "rows": rows}
    path.write_text(_readable(results), encoding="utf-8")
    print(f"stored in {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}", file=sys.stderr)


def _readable(results: dict[str, Any]) -> str:
    """Formats results as JSON with one row per line, so that a diff shows which measurements changed."""
    subjects = []
    for subject, result in results.items():
        rows = ",\n  ".join(json.dumps(row) for row in result["rows"])
        machine = json.dumps(result["machine"])
        subjects.append(f'"{subject}": {{\n "machine": {machine},\n "rows": [\n  {rows}\n ]\n}}')
    return "{" + ",\n".join(subjects) + "}\n"

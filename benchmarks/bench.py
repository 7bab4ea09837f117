# SPDX-License-Identifier: BSD-3-Clause
"""Code that all benchmarks share: arguments, timing (from ``sdgp._timing``) and storing results."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from sdgp._machine import changes, machine
from sdgp._timing import interleaved as interleaved
from sdgp._timing import interval as interval
from sdgp._timing import rounds_of as rounds_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = ("CMakeLists.txt", "cpp", "cuda", "python", "benchmarks/*.py")


def arguments(description: str | None, rounds: str | None = None) -> argparse.ArgumentParser:
    """Returns a parser with the common arguments --rounds (with the help text ``rounds``), --threads and --store."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--rounds", type=int, default=15, help=rounds)
    result.add_argument("--threads", type=int, default=1)
    result.add_argument("--store", metavar="NAME", help="write benchmarks/results/NAME.json")
    return result


def begin(args: argparse.Namespace) -> dict[str, Any] | None:
    """Sets the number of threads and the seed. Returns the machine for ``store``, or None if nothing is stored."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return _committed_machine(args.rounds) if args.store else None


def _committed_machine(rounds: int) -> dict[str, Any]:
    """Returns the machine for ``store``. Exits before the benchmark runs if its rows must not be stored."""
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


def store(subject: str, machine: dict[str, Any], rows: list[dict[str, Any]], name: str) -> Path:
    """Writes results/<name>.json and keeps the results of other subjects in it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results[subject] = {"machine": machine, "rows": rows}
    path.write_text(_readable(results), encoding="utf-8")
    print(f"stored in {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}", file=sys.stderr)
    return path


def _readable(results: dict[str, Any]) -> str:
    """Formats results as JSON with one row per line, so that a diff shows which measurements changed."""
    subjects = []
    for subject, result in results.items():
        rows = ",\n  ".join(json.dumps(row) for row in result["rows"])
        machine = json.dumps(result["machine"])
        subjects.append(f'"{subject}": {{\n "machine": {machine},\n "rows": [\n  {rows}\n ]\n}}')
    return "{" + ",\n".join(subjects) + "}\n"

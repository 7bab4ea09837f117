# SPDX-License-Identifier: BSD-3-Clause
"""How every benchmark here measures: all candidates in turn, round after round, in one process; medians and ratios."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdgp._machine import changes, machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = ("CMakeLists.txt", "cpp", "python", "benchmarks/*.py")


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int = 15) -> dict[str, float]:
    """Median seconds of each candidate; each gets its turn in every round, so that a slow moment hits all alike.

    An untimed call comes right before the timed one: each finds caches and allocator as it leaves them itself, whatever
    ran before.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            call()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def committed_machine(rounds: int) -> dict[str, Any]:
    """What :func:`store` wants: where a benchmark runs, if its rows may be kept. Asked before it runs."""
    if rounds < 10:
        raise SystemExit(f"--store: expected at least 10 rounds, got {rounds}")
    if changed := changes(ROOT, *MEASURED):
        raise SystemExit(f"--store: expected what is measured to be committed, got changes in\n{changed}")
    where = machine(ROOT, *MEASURED)
    if where["commit"] == "unknown":
        raise SystemExit("--store: expected a git checkout, got none")
    return where


def store(subject: str, machine: dict[str, Any], rows: list[dict[str, Any]], name: str) -> Path:
    """Writes results/<name>.json, other subjects' results in it kept."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[subject] = {"machine": machine, "rows": rows}
    path.write_text(_readable(results))
    print(f"stored in {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}", file=sys.stderr)
    return path


def _readable(results: dict[str, Any]) -> str:
    """JSON with one row a line, so that a diff shows which measurements changed."""
    subjects = []
    for subject, result in results.items():
        rows = ",\n  ".join(json.dumps(row) for row in result["rows"])
        machine = json.dumps(result["machine"])
        subjects.append(f'"{subject}": {{\n "machine": {machine},\n "rows": [\n  {rows}\n ]\n}}')
    return "{" + ",\n".join(subjects) + "}\n"

# SPDX-License-Identifier: BSD-3-Clause
"""How every benchmark here measures: all candidates in turn, round after round, in one process; medians and ratios."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

import sdgp

RESULTS = Path(__file__).parent / "results"


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int = 15, warm_up: int = 3) -> dict[str, float]:
    """Median seconds of each candidate; one call of each per round, so that a slow moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round in range(warm_up + rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            if round >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> dict[str, Any]:
    """Where and with what a result was measured."""
    return {
        "cpu": _cpu(),
        "isa": sdgp._load.C.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sdgp": sdgp.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def store(subject: str, rows: list[dict[str, Any]], name: str) -> Path:
    """Writes results/<name>.json, other subjects' results in it kept."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[subject] = {"machine": machine(), "rows": rows}
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


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines[: lines.index("")] if ":" in line)
    except OSError:
        return platform.processor()
    stripped = {key.strip(): value.strip() for key, value in fields.items()}
    return f"{stripped.get('model name', '?')} (family {stripped.get('cpu family')}, model {stripped.get('model')})"


def _commit() -> str:
    """The commit, marked where what is measured differs from it."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "cpp", "python"], capture_output=True, check=False)
    return (found.stdout.strip() or "unknown") + ("-dirty" if changed.returncode else "")

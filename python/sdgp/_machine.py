# SPDX-License-Identifier: BSD-3-Clause
"""Describes the machine and the versions with which a result was measured.

Benchmarks, examples and the command line use it. It is not public API.
"""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

from ._load import C, version


def machine(repository: Path, *measured: str) -> dict[str, str | int]:
    """Returns CPU, threads, versions and commit. The commit gets a mark if a path of ``measured`` differs from it."""
    commit = _git(repository, "rev-parse", "--short", "HEAD") or "unknown"
    return environment() | {"commit": commit + ("-dirty" if changes(repository, *measured) else "")}


def environment() -> dict[str, str | int]:
    """Returns CPU, threads, versions and date."""
    return {
        "cpu": cpu_name(),
        "isa": C.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sdgp": version,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def changes(repository: Path, *measured: str) -> str:
    """Returns the paths among ``measured`` that differ from the last commit, one per line."""
    return _git(repository, "status", "--porcelain", "--", *measured)


def _git(repository: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repository), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.rstrip()
    except OSError:  # git is not installed
        return ""


def cpu_fields() -> dict[str, str]:
    """Returns what Linux reports about the first CPU. The result is empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    first = lines[: lines.index("")] if "" in lines else lines
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}


def cpu_name() -> str:
    fields = cpu_fields()
    if "model name" not in fields:  # as on aarch64
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"

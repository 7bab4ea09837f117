# SPDX-License-Identifier: BSD-3-Clause
"""Where and with what a result was measured: what benchmarks and examples store beside their numbers. Not API."""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

from ._load import C, version


def machine(repository: Path, *measured: str) -> dict[str, str | int]:
    """CPU, threads, versions and commit; the commit is marked where one of the ``measured`` paths differs from it."""
    commit = _git(repository, "rev-parse", "--short", "HEAD") or "unknown"
    return {
        "cpu": _cpu(),
        "isa": C.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sdgp": version,
        "python": platform.python_version(),
        "commit": commit + ("-dirty" if changes(repository, *measured) else ""),
        "date": date.today().isoformat(),
    }


def changes(repository: Path, *measured: str) -> str:
    """What of ``measured`` is not as the last commit has it, a path a line."""
    return _git(repository, "status", "--porcelain", "--", *measured)


def _git(repository: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repository), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.rstrip()
    except OSError:  # no git
        return ""


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines[: lines.index("")])
    }
    return f"{fields.get('model name', '?')} (family {fields.get('cpu family')}, model {fields.get('model')})"

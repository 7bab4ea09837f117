# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of the command line share; the fixture that runs it is in conftest.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

# Arguments of `sdgp` to its exit status, stdout and stderr.
Command = Callable[..., tuple[int, str, str]]


def report(command: Command, *arguments: str) -> dict[str, Any]:
    """What a command prints with --json, and that it is nothing else."""
    status, out, err = command(*arguments, "--json")
    assert status == 0, err
    found: dict[str, Any] = json.loads(out)
    return found

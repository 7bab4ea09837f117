# SPDX-License-Identifier: BSD-3-Clause
"""Shared code of the command line tests. The fixture that runs a command is in conftest.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

# Takes the arguments of `sdgp` and returns its exit status, stdout and stderr.
Command = Callable[..., tuple[int, str, str]]


def report(command: Command, *arguments: str) -> dict[str, Any]:
    """Returns what a command prints with --json, which must be all that it prints."""
    status, out, err = command(*arguments, "--json")
    assert status == 0, err
    found: dict[str, Any] = json.loads(out)
    return found

# SPDX-License-Identifier: BSD-3-Clause
"""Arguments and methods that have a new name. The old name works for one release, with a warning."""

from __future__ import annotations

import warnings
from typing import TypeVar

_T = TypeVar("_T")


def renamed(op: str, old: str, value: _T | None, new: str, default: _T, stacklevel: int = 4) -> _T:
    """Returns ``value``, given under the old name, or ``default``, given under the new name, if ``value`` is None."""
    if value is None:
        return default
    warn_renamed(op, old, new, stacklevel)
    return value


def warn_renamed(op: str, old: str, new: str, stacklevel: int = 3) -> None:
    warnings.warn(
        f"{op}: {old} is now called {new}; the old name goes away with the next release",
        FutureWarning,
        stacklevel=stacklevel,
    )

# SPDX-License-Identifier: BSD-3-Clause
"""The one error that a recipe shows without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """What the caller can mend: ``subject: requirement, got actual``, then what to do."""

# SPDX-License-Identifier: BSD-3-Clause
"""The only error that a recipe reports without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """An error that the caller can fix. The message reads ``subject: requirement, got actual``, then what to do."""

# SPDX-License-Identifier: BSD-3-Clause
"""The errors that a recipe reports without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """An error that the caller can fix. The message reads ``subject: requirement, got actual``, then what to do."""


class Diverged(UserError):
    """The loss or a gradient is not finite."""

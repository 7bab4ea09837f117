# SPDX-License-Identifier: BSD-3-Clause
"""The errors that a recipe reports without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """An error that the caller can fix. The message reads ``subject: requirement, got actual``, then what to do."""


class Diverged(UserError):
    """The loss, a gradient or a result is not finite."""


class Stopped(Exception):
    """A signal stopped the run, which has saved a checkpoint.

    Attributes:
        signal: the number of the signal.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal

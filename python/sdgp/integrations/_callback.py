# SPDX-License-Identifier: BSD-3-Clause
"""What the callbacks share: the settings, converting and scheduling at the start, and what a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from .. import backends
from ..convert import convert
from ..pattern import Pattern, PatternLike, Pruning
from ..schedule import Schedule


class ScheduleCallback:
    """Converts a model, if told how, and keeps its ``sdgp.Schedule`` at the trainer's own step."""

    schedule: Schedule

    def __init__(
        self,
        pattern: PatternLike | None = None,
        method: str = "mvue",
        *,
        filter: Callable[[nn.Module, str], bool] | None = None,
        backend: str = "auto",
        dense_first: float = 0,
        dense_last: float = 0,
        patterns: Mapping[float, PatternLike] | Iterable[tuple[float, PatternLike]] = (),
    ) -> None:
        super().__init__()
        Pruning.parse("SdgpCallback", pattern or "2:4", method, backend)
        if pattern is None and (method, filter, backend) != ("mvue", None, "auto"):
            raise ValueError("SdgpCallback: expected a pattern with method, filter and backend, got none")
        self.pattern = None if pattern is None else str(Pattern.parse(pattern))
        self.method, self.filter, self.backend = method, filter, backend
        self.dense_first, self.dense_last = dense_first, dense_last
        self.patterns = {at: str(Pattern.parse(pattern)) for at, pattern in dict(patterns).items()}

    def start(self, model: nn.Module, total: int | None, step: int) -> None:
        """``step`` of ``total`` steps are over; None: nobody knows how many there will be."""
        if self.pattern is not None:
            convert(model, self.pattern, self.method, filter=self.filter, backend=self.backend)
        self.schedule = Schedule(
            model, total=total, dense_first=self.dense_first, dense_last=self.dense_last, patterns=self.patterns
        )
        self.schedule.seek(step)

    @property
    def measured(self) -> dict[str, list[bool | float]]:
        """What ``auto`` and ``pruned`` measured, in plain types: with it a run that goes on takes the same products."""
        return {key: list(choice) for key, choice in backends.choices().items()}

    @measured.setter
    def measured(self, measured: Mapping[str, list[bool | float]]) -> None:
        backends.remember(measured)

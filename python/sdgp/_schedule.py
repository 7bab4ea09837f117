# SPDX-License-Identifier: BSD-3-Clause
"""When a converted model prunes: exact gradients at the start and at the end of training, patterns in between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ._layer import PruningLayer
from ._models import pruning_layers
from ._pattern import Pattern, PatternLike
from ._renamed import renamed

_EXACT = Pattern(1, 1)


class Schedule:
    """Exact gradients first and last, and patterns in between, in the manner of a learning-rate scheduler.

    The unit is whatever one call of ``step`` ends: an epoch, or a step of the optimizer. Which layers are
    converted, by which method and with which backend stays as ``sdgp.convert`` left it, and so does ``weight_grad``:
    weight gradients are exact where data gradients are scheduled to be, first and last, and ``patterns`` are not
    theirs. While a pattern's m is larger than a layer has output channels per group, that layer's data gradient is
    exact; a layer with a ``weight_grad`` has the pattern 1:1 meanwhile. ``sdgp.paused`` is independent of it: a layer
    prunes where neither holds it back. ``sdgp.report`` tells.

    Args:
        model: a model that ``sdgp.convert`` went over.
        total: how many units the training has; needed for ``exact_last`` and for shares.
        exact_first: the number of units with exact gradients at the start, or, below 1, their share of ``total``
            (rounded down).
        exact_last: the same at the end.
        patterns: of the data gradients, ``{first unit, or share of total: pattern}``. Before the first one a layer
            keeps its own pattern.
        dense_first, dense_last: the old names of ``exact_first`` and ``exact_last``; they warn.

    Attributes:
        count: how many units are over.

    Raises:
        ValueError: ``Schedule: requirement, got actual``.

    Examples:
        >>> model = sdgp.convert(torch.nn.Linear(64, 64), "2:4", backend="pruned")
        >>> schedule = sdgp.Schedule(model, total=90, exact_first=5, exact_last=10, patterns={30: "1:4"})
        >>> for epoch in range(90):
        ...     pass  # train
        ...     schedule.step()
    """

    count: int

    def __init__(
        self,
        model: nn.Module,
        *,
        total: int | None = None,
        exact_first: float = 0,
        exact_last: float = 0,
        patterns: Mapping[float, PatternLike] | Iterable[tuple[float, PatternLike]] = (),
        dense_first: float | None = None,
        dense_last: float | None = None,
    ) -> None:
        exact_first = renamed("Schedule", "dense_first", dense_first, "exact_first", exact_first)
        exact_last = renamed("Schedule", "dense_last", dense_last, "exact_last", exact_last)
        # Each with the pattern that it has until the first of ``patterns``.
        self._layers: dict[nn.Module, Pattern] = {
            layer: layer.pruning.pattern for layer in pruning_layers("Schedule", model)
        }
        if total is not None and total < 1:
            raise ValueError(f"Schedule: expected total >= 1, got {total}")
        self._total = total
        self._first = self._units("exact_first", exact_first)
        self._last = self._units("exact_last", exact_last)
        if self._last and total is None:
            raise ValueError(f"Schedule: expected total with exact_last, got exact_last={exact_last} alone")
        if total is not None and self._first + self._last > total:
            raise ValueError(
                f"Schedule: expected exact_first + exact_last <= total, got {self._first} + {self._last} > {total}"
            )
        starts = ((self._units("patterns' keys", at), Pattern.parse(pattern)) for at, pattern in dict(patterns).items())
        self._patterns = dict(sorted(starts, key=lambda start: start[0]))
        if total is not None and any(at >= total for at in self._patterns):
            raise ValueError(
                f"Schedule: expected every pattern to begin before total, got {max(self._patterns)} >= {total}"
            )
        self.seek(0)

    def step(self) -> None:
        """One unit is over: the next forward is the next one's."""
        self.seek(self.count + 1)

    def seek(self, count: int) -> None:
        """Goes to where ``count`` calls of ``step`` lead: for loops that know their own place."""
        if count < 0:
            raise ValueError(f"Schedule: expected count >= 0, got {count}")
        self.count = count
        why, pattern = self._why_exact(), self.pattern
        for layer, own in self._layers.items():
            if not isinstance(layer, PruningLayer):
                continue  # reverted since
            now = pattern or own
            narrow = pattern and layer.too_narrow(layer, pattern)
            if narrow and layer.pruning.weight_grad is not None:  # a hold would make that exact too
                now, narrow = _EXACT, None
            if self._patterns:
                layer.use(replace(layer.pruning, pattern=now))
            layer.hold("schedule", why or narrow or "")

    @property
    def exact(self) -> bool:
        """Whether all gradients are exact now."""
        return bool(self._why_exact())

    @property
    def pattern(self) -> Pattern | None:
        """The one of ``patterns`` that holds now; None: each layer's own."""
        return next((pattern for at, pattern in reversed(self._patterns.items()) if at <= self.count), None)

    def state_dict(self) -> dict[str, Any]:
        """The place in the schedule. What was scheduled is not in it: that is the program's to say."""
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state_dict`` was taken."""
        if set(state) != {"count"}:
            raise ValueError(f'Schedule: expected a state_dict with "count", got {sorted(state)}')
        self.seek(state["count"])

    def __repr__(self) -> str:
        patterns = {at: str(pattern) for at, pattern in self._patterns.items()}
        return (
            f"Schedule(count={self.count}, total={self._total}, exact_first={self._first}, exact_last={self._last}, "
            f"patterns={patterns})"
        )

    def _units(self, name: str, value: float) -> int:
        """A number of units as it is, a share of the total rounded down, rounding errors aside."""
        is_share = isinstance(value, float)
        if value < 0 or (is_share and value >= 1):
            raise ValueError(f"Schedule: expected {name} as a number of units or as a share below 1.0, got {value}")
        if not is_share or value == 0:
            return int(value)
        if self._total is None:
            raise ValueError(f"Schedule: expected total with a share, got {name}={value} alone")
        return int(value * self._total + 1e-9)

    def _why_exact(self) -> str | None:
        if self.count < self._first:
            return f"scheduled, exact_first={self._first}"
        if self._last and self._total is not None and self.count >= self._total - self._last:
            return f"scheduled, exact_last={self._last} of {self._total}"
        return None

# SPDX-License-Identifier: BSD-3-Clause
"""Schedules when a converted model prunes: exact gradients at the start and at the end of training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import nn

from ._layer import PruningLayer
from ._models import layers_of, pruning_layers
from ._pattern import Pattern, PatternLike
from ._renamed import renamed

_EXACT = Pattern(1, 1)

# The schedule of each layer, plain layers included: they may be converted later.
_schedules: WeakKeyDictionary[nn.Module, ReferenceType[Schedule]] = WeakKeyDictionary()


class Schedule:
    """Schedules exact gradients at the start and end of training, and patterns in between.

    It is used like a learning-rate scheduler.
    Its unit is the time between two calls of ``step``: an epoch, or a step of the optimizer. The schedule does not
    change which layers are converted, nor their method, backend and ``weight_grad``. In the exact units at the start
    and the end, weight gradients are exact too; ``patterns`` apply to data gradients only.

    Layers that are converted later, or again, follow the schedule too. If a model has several schedules, it follows the
    newest one.

    If a layer has fewer output channels per group than a pattern's m, its data gradient is exact under that pattern; a
    layer with a ``weight_grad`` then has the pattern 1:1. ``sdgp.paused`` works independently: a layer prunes only if
    neither the schedule nor a pause forbids it. ``sdgp.report`` shows the current state.

    Args:
        model: a model that ``sdgp.convert`` has converted.
        total: the number of units in the training. ``exact_last`` and shares need it.
        exact_first: the number of units with exact gradients at the start. A float below 1 is a share of ``total``,
            rounded down. A warning says if that leaves none.
        exact_last: the number or share of units with exact gradients at the end.
        patterns: the patterns of the data gradients, ``{first unit or share of total: pattern}``. Before the first
            entry each layer keeps its own pattern.
        dense_first, dense_last: deprecated names of ``exact_first`` and ``exact_last``. They raise a warning.

    Attributes:
        count: the number of units that are over.

    Raises:
        ValueError: If an argument is invalid. The message reads ``Schedule: requirement, got actual``.

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
        # Each layer with its own pattern, which it keeps until the first entry of ``patterns``.
        self._layers: dict[nn.Module, Pattern] = {
            layer: layer.unscheduled or layer.pruning.pattern for layer in pruning_layers("Schedule", model)
        }
        if total is not None and (not hasattr(total, "__index__") or total < 1):
            raise ValueError(f"Schedule: expected total to be an integer >= 1, got {total!r}")
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
        for _, layer in layers_of(model):
            _schedules[layer] = ref(self)
        self.seek(0)

    def step(self) -> None:
        """Ends the current unit. The next forward belongs to the next unit."""
        self.seek(self.count + 1)

    def seek(self, count: int) -> None:
        """Moves the schedule to the state after ``count`` calls of ``step``, for loops that keep their own count.

        Raises:
            ValueError: If ``count`` is negative or no integer.
        """
        if not hasattr(count, "__index__") or count < 0:
            raise ValueError(f"Schedule: expected count to be an integer >= 0, got {count!r}")
        self.count = count
        for layer, own in self._layers.items():
            if _schedule_of(layer) is None:  # this schedule is a copy, or the newer one is gone
                _schedules[layer] = ref(self)
            if isinstance(layer, PruningLayer) and _schedule_of(layer) is self:
                self._apply(layer, own)

    def _apply(self, layer: PruningLayer, own: Pattern) -> None:
        """Puts a layer into the state of the current unit."""
        why, pattern = self._why_exact(), self.pattern
        now = pattern or own
        narrow = pattern and layer.too_narrow(layer, pattern)
        if narrow and layer.pruning.weight_grad is not None:  # a hold would make the weight gradient exact too
            now, narrow = _EXACT, None
        if self._patterns or layer.unscheduled is not None:  # by another schedule
            layer.use(replace(layer.pruning, pattern=now))
            layer.unscheduled = None if now == own else own
        layer.hold("schedule", why or narrow or "")

    def _adopt(self, layer: PruningLayer) -> None:
        """Schedules a layer that was converted just now, to a pattern of its own."""
        self._layers[layer] = layer.pruning.pattern
        self._apply(layer, layer.pruning.pattern)

    @property
    def exact(self) -> bool:
        """Whether the schedule makes all gradients exact in the current unit."""
        return bool(self._why_exact())

    @property
    def pattern(self) -> Pattern | None:
        """The entry of ``patterns`` for the current unit; None if each layer keeps its own pattern."""
        return next((pattern for at, pattern in reversed(self._patterns.items()) if at <= self.count), None)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the schedule. It does not contain the arguments of the schedule."""
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the position that ``state_dict`` returned.

        Raises:
            ValueError: If ``state`` is not the state of a schedule.
        """
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
        """Returns a number of units unchanged, and converts a share of the total to units, rounded down."""
        is_share = isinstance(value, float)
        if value < 0 or (is_share and value >= 1):
            raise ValueError(f"Schedule: expected {name} as a number of units or as a share below 1.0, got {value}")
        if not is_share or value == 0:
            return int(value)
        if self._total is None:
            raise ValueError(f"Schedule: expected total with a share, got {name}={value} alone")
        units = int(value * self._total + 1e-9)
        if units == 0 and name.startswith("exact"):
            warnings.warn(
                f"Schedule: {name}={value} of total={self._total} is less than one unit, so it has no effect; count in "
                "smaller units, such as steps",
                stacklevel=3,
            )
        return units

    def _why_exact(self) -> str | None:
        if self.count < self._first:
            return f"scheduled, exact_first={self._first}"
        if self._last and self._total is not None and self.count >= self._total - self._last:
            return f"scheduled, exact_last={self._last} of {self._total}"
        return None


def _schedule_of(layer: nn.Module) -> Schedule | None:
    found = _schedules.get(layer)
    return None if found is None else found()


def keep_scheduled(layer: nn.Module) -> None:
    """Puts a layer that was converted just now into the state that its schedule requires, if it has one."""
    schedule = _schedule_of(layer)
    if not isinstance(layer, PruningLayer):
        return
    if schedule is not None:
        schedule._adopt(layer)
    else:
        layer.hold("schedule", "")  # a schedule that is gone may have left it

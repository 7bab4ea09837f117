# SPDX-License-Identifier: BSD-3-Clause
"""The base class of the callbacks: their settings, the start of training, and the contents of a checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from os import PathLike, fspath
from typing import Any

from torch import Tensor, nn

from .._budget import Budget
from .._choose import current_chooser
from .._convert import convert
from .._pattern import Pattern, PatternLike, Pruning, WeightGradLike
from .._renamed import renamed
from .._schedule import Schedule
from .._step import Loss

_BUDGET_SETTINGS = set(inspect.signature(Budget).parameters) - {"model", "loss", "optimizer"}


def scaled(loss: Tensor, scaler: Any) -> Tensor:
    """Returns the loss as the trainer scales it: without the scale, gradients in float16 underflow."""
    return loss if scaler is None else loss * scaler.get_scale()


class ScheduleCallback:
    """Converts a model if a pattern is given, and keeps its ``sdgp.Schedule`` at the trainer's step.

    If a budget is given, a ``sdgp.Budget`` does both instead.
    """

    # The arguments that a checkpoint stores. Each is in the attribute of its name, in a form that JSON can store.
    stored = ("pattern", "method", "backend", "weight_grad", "exact_first", "exact_last")

    schedule: Schedule | None = None
    budget: Budget | None = None
    budget_state: Mapping[str, Any] | None = None  # from a checkpoint

    def __init__(
        self,
        pattern: PatternLike | None = None,
        method: str = "mvue",
        *,
        filter: Callable[[nn.Module, str], bool] | None = None,
        backend: str = "auto",
        weight_grad: WeightGradLike | None = None,
        exact_first: float = 0,
        exact_last: float = 0,
        patterns: Mapping[float, PatternLike] | Iterable[tuple[float, PatternLike]] = (),
        dense_first: float | None = None,
        dense_last: float | None = None,
        budget: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        exact_first = renamed("SdgpCallback", "dense_first", dense_first, "exact_first", exact_first)
        exact_last = renamed("SdgpCallback", "dense_last", dense_last, "exact_last", exact_last)
        if budget is not None and (pattern is not None or exact_first or exact_last or patterns):
            raise ValueError(
                "SdgpCallback: expected budget without pattern, exact_first, exact_last and patterns, got both"
            )
        if isinstance(pattern, Mapping):
            raise ValueError(
                "SdgpCallback: expected a pattern, got a plan: call sdgp.convert(model, plan), and pass no pattern"
            )
        if unknown := sorted(set(budget or ()) - _BUDGET_SETTINGS):
            raise ValueError(f"SdgpCallback: expected arguments of sdgp.Budget in budget, got {', '.join(unknown)}")
        self.budget_settings = None if budget is None else dict(budget)
        if self.budget_settings is not None and isinstance(self.budget_settings.get("to"), PathLike):
            self.budget_settings["to"] = fspath(self.budget_settings["to"])  # which a checkpoint can store
        pruning = Pruning.parse("SdgpCallback", pattern or "2:4", method, backend, weight_grad)
        if pattern is None and (method, filter, backend, weight_grad) != ("mvue", None, "auto", None):
            raise ValueError("SdgpCallback: expected a pattern with method, filter, backend and weight_grad, got none")
        self.pattern = None if pattern is None else str(Pattern.parse(pattern))
        self.method, self.filter, self.backend = method, filter, backend
        weight = pruning.weight_grad
        self.weight_grad = None if weight is None else (str(weight.pattern), weight.method)
        self.exact_first, self.exact_last = exact_first, exact_last
        self.patterns = {at: str(Pattern.parse(pattern)) for at, pattern in dict(patterns).items()}

    def start(self, model: nn.Module, total: int | None, step: int) -> None:
        """Converts the model and starts the schedule.

        Args:
            total: the number of steps in the training; None if it is unknown.
            step: the number of steps that are already over.
        """
        if self.pattern is not None:
            convert(
                model,
                self.pattern,
                self.method,
                filter=self.filter,
                backend=self.backend,
                weight_grad=self.weight_grad,
            )
        self.schedule = Schedule(
            model, total=total, exact_first=self.exact_first, exact_last=self.exact_last, patterns=self.patterns
        )
        self.schedule.seek(step)

    def start_budget(self, model: nn.Module, loss: Loss | None, optimizer: Any) -> None:
        """Starts the budget. Callbacks with a budget call this method instead of ``start``."""
        self.budget = Budget(model, loss, optimizer, **(self.budget_settings or {}))
        if self.budget_state is not None:
            self.budget.load_state_dict(self.budget_state)
            self.budget_state = None  # the next training begins anew

    @property
    def measured(self) -> dict[str, Any]:
        """The measurements of ``auto`` and ``pruned`` in plain types. They let a resumed run take the same products."""
        return current_chooser().state_dict()

    @measured.setter
    def measured(self, measured: Mapping[str, Any]) -> None:
        current_chooser().load_state_dict(measured)

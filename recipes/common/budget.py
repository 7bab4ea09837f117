# SPDX-License-Identifier: BSD-3-Clause
"""``sdgp.Budget`` in a recipe: what it advised, and how much time the advice took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import sdgp
from sdgp._clock import synchronize

from .errors import UserError

_Batch = tuple[Tensor, Tensor]


class CountedBudget:
    """The ``sdgp.Budget`` of a run, with the time that its advice took. The run's checkpoint contains its state.

    Args:
        every: the number of steps from one advice to the next. The first one comes after as many exact steps.
        steps: the number of steps of the run. There is no advice after the last one.
        loss: the loss of a micro-batch, with the run's autocast.
        saved: what ``state_dict`` returned, if the run resumes.
    """

    def __init__(
        self,
        every: int,
        steps: int,
        model: nn.Module,
        loss: Callable[[nn.Module, _Batch], Tensor],
        optimizer: torch.optim.Optimizer,
        saved: Mapping[str, Any] | None,
    ) -> None:
        if every >= steps:
            raise UserError(f"config: expected budget < {steps}, the steps of the run, got {every}")
        self._every, self._steps = every, steps
        self._state: dict[str, Any] = {"exact_seconds": 0.0, "asking_seconds": 0.0, "advice": []}
        try:
            self._budget = sdgp.Budget(model, loss, optimizer, every=every, to=self._note)
            if saved is not None:
                self._budget.load_state_dict(saved["budget"])
                self._state = {key: saved[key] for key in self._state}
        except (KeyError, ValueError) as error:
            raise UserError(f"config: budget = {every}: {error}") from None

    def _note(self, line: Mapping[str, Any]) -> None:
        said = {key: line[key] for key in ("step", "saved", "noise", "net")}
        self._state["advice"].append(said | {"used": bool(line["plan"])})

    def step(self, batch: _Batch, start: float) -> None:
        """Counts a step, which began at ``start`` on ``time.perf_counter()``, and asks for advice if it is due."""
        synchronize(batch[0].device)
        now = time.perf_counter()
        if self._budget.step_count < self._every:
            self._state["exact_seconds"] += now - start
        if self._budget.step_count + 1 < self._steps:
            self._budget.step(batch)
            synchronize(batch[0].device)
        self._state["asking_seconds"] += time.perf_counter() - now

    def state_dict(self) -> dict[str, Any]:
        return {"budget": self._budget.state_dict(), **self._state}

    def result(self) -> dict[str, Any]:
        """Returns what each advice said, and how many exact steps would take as long as all calls for advice."""
        per_step = self._state["exact_seconds"] / max(1, min(self._every, self._budget.step_count))
        asking = self._state["asking_seconds"] / per_step if per_step else 0.0
        return {"advice": self._state["advice"], "asking_steps": round(asking, 1)}

# SPDX-License-Identifier: BSD-3-Clause
"""A run with ``sdgp.Budget``: it asks for advice at intervals, and counts how much time that takes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sdgp

from .errors import UserError

_Batch = tuple[Tensor, Tensor]


class CountedBudget:
    """The budget of a run, in a checkpoint with the rest of the run.

    Args:
        every: the number of steps from one advice to the next; the first one comes after as many exact steps.
        loss: the loss of a micro-batch, with the run's autocast.
        path: the file that gets a line for each advice. None: another process writes it.
        saved: what ``state_dict`` returned, if the run resumes.
    """

    def __init__(
        self,
        every: int,
        model: nn.Module,
        loss: Callable[[nn.Module, _Batch], Tensor],
        optimizer: torch.optim.Optimizer,
        path: Path | None,
        saved: Mapping[str, Any] | None,
    ) -> None:
        self._every, self._path = every, path
        self._exact_seconds = self._asking_seconds = 0.0
        try:
            self._budget = sdgp.Budget(model, loss, optimizer, every=every, to=path)
        except ValueError as error:
            raise UserError(f"config: {error}") from None
        lines = []
        if saved is not None:
            self._budget.load_state_dict(saved["budget"])
            self._exact_seconds, self._asking_seconds = saved["exact_seconds"], saved["asking_seconds"]
            lines = [line for line in self._lines() if line["step"] <= self._budget.step_count]
        if path is not None:
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def step(self, batch: _Batch, seconds: float) -> None:
        """Counts a step, which took ``seconds``, and asks for advice if it is due."""
        if self._budget.step_count < self._every:
            self._exact_seconds += seconds
        start = time.perf_counter()
        self._budget.step(batch)
        self._asking_seconds += time.perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        seconds = {"exact_seconds": self._exact_seconds, "asking_seconds": self._asking_seconds}
        return {"budget": self._budget.state_dict(), **seconds}

    def result(self) -> dict[str, Any]:
        """Returns what each advice said, and how many exact steps all of them took the time of."""
        numbers = ("step", "saved", "noise", "net")
        said = [{key: line[key] for key in numbers} | {"used": bool(line["plan"])} for line in self._lines()]
        exact_steps = min(self._every, self._budget.step_count)
        return {"advice": said, "asking_steps": round(self._asking_seconds / self._exact_seconds * exact_steps, 1)}

    def _lines(self) -> list[dict[str, Any]]:
        text = "" if self._path is None else self._path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

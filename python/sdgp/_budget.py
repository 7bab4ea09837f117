# SPDX-License-Identifier: BSD-3-Clause
"""Asks for advice again and again during training, so that a model prunes only while that pays."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._advise import advised, prepared
from ._convert import convert
from ._decision import Decision
from ._models import check_eager, check_module, is_sharded
from ._pattern import PatternLike
from ._plan import Interval
from ._step import Loss, check_loss
from ._steps import Memory, UnusableBatch
from ._watch import check_writable

# The keys of `state_dict`.
_KEYS = {"step", "next", "plan", "verdict", "step_ms", "realized", "decisions", "values"}


class Budget:
    """Prunes a model during training wherever pruning pays.

    ``sdgp.advise`` weighs the time that pruning saves against the extra steps that its noise costs. Both change during
    training, and an untrained model tolerates pruning worst. A budget therefore keeps the first steps exact. After
    that, at every ``every``-th step, it asks for advice on the batch of that step and converts the model to the plan.
    An empty plan makes the model plain again.

    Each call for advice takes as long as five to ten steps. The first one takes twenty to thirty steps, because it
    times the products. A batch with one sample, or with a loss that is not finite, gives no advice; the budget then
    asks again after ``max(every // 50, 1)`` steps.

    Under ``torch.distributed`` only the first process computes the advice, and all processes receive its plan. The
    other processes wait meanwhile, so neither the forward nor the loss may communicate.

    Args:
        model: the original model, not the wrapper that DistributedDataParallel or torch.compile made of it. A converted
            model becomes plain until the first plan.
        loss: ``loss(model, batch)`` runs the forward and returns a scalar. Default: the default of ``sdgp.profile``.
        optimizer: the optimizer that trains the model, as ``sdgp.advise`` takes it.
        every: the number of steps from one call for advice to the next.
        first: the number of exact steps before the first call for advice. Default: ``every``.
        net: the smallest net saving that counts, as a share. Plans that save less are not used.
        patterns, methods, filter: as ``sdgp.advise`` takes them.
        to: the path of a file, to which every advice appends one JSON line. Or a function that is called with the
            content of the line, a dictionary.

    Attributes:
        step_count: the number of steps so far.
        plan: the plan that the model is converted to now, in the form that ``sdgp.convert`` takes.
        verdict: the last verdict, one sentence; ``""`` before the first one.

    Raises:
        ValueError: If an argument is invalid. The message reads ``Budget: requirement, got actual``. ``step`` also
            raises the errors of ``advise``.

    Examples:
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> def loss(model, batch):
        ...     return (model(batch) - batch).square().mean()
        >>> budget = sdgp.Budget(model, loss, optimizer, every=2)
        >>> for batch in torch.randn(4, 32, 64):
        ...     optimizer.zero_grad()
        ...     loss(model, batch).backward()
        ...     optimizer.step()
        ...     budget.step(batch)
        >>> budget.verdict
        'nothing pays here: every layer is too small at this batch size'
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        every: int = 1000,
        first: int | None = None,
        net: float = 0.01,
        patterns: Iterable[PatternLike] | None = None,
        methods: Iterable[str] | None = None,
        filter: Callable[[nn.Module, str], bool] | None = None,
        to: str | PathLike[str] | Callable[[Mapping[str, Any]], object] | None = None,
    ) -> None:
        check_module("Budget", model)
        check_eager("Budget", model)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError("Budget: expected the model itself, got a DistributedDataParallel: pass what it wraps")
        first = every if first is None else first
        if every < 1 or first < 1:
            raise ValueError(f"Budget: expected every >= 1 and first >= 1, got {every} and {first}")
        if not 0 <= net < 1:
            raise ValueError(f"Budget: expected net as a share, 0 <= net < 1, got {net}")
        check_loss("Budget", loss)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            _check_alone(model)
        if to is not None and not callable(to):
            check_writable("Budget", to)
        self._model, self._loss, self._optimizer = model, loss, optimizer
        self._every, self._next, self._net, self._to = every, first, net, to
        self._patterns = patterns if patterns is None or isinstance(patterns, str) else list(patterns)
        self._methods = methods if methods is None or isinstance(methods, str) else tuple(methods)
        self._filter = filter
        prepared("Budget", model, optimizer, self._patterns, self._methods, filter)
        self._memory = Memory()
        self.step_count, self.plan, self.verdict = 0, dict[str, tuple[Any, ...]](), ""
        convert(model, {})

    def step(self, batch: Any) -> None:
        """Counts one step of the optimizer, and asks for advice on its ``batch`` when advice is due.

        Call this method after each step of the optimizer.
        """
        self.step_count += 1
        if self.step_count < self._next:
            return
        found: list[Any] = [None]
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        failed: Exception | None = None
        if not distributed or torch.distributed.get_rank() == 0:
            try:
                found = [self._ask(batch)]
            except Exception as error:
                found, failed = [str(error)], error
        if distributed:
            torch.distributed.broadcast_object_list(found)
        if failed is not None:
            raise failed
        if isinstance(found[0], str):
            raise ValueError(f"Budget: expected advice from the first process, got: {found[0]}")
        plan, self.verdict = found[0]
        if plan is None:
            self._next = self.step_count + max(self._every // 50, 1)
            return
        self._next = self.step_count + self._every
        self.plan = plan
        convert(self._model, plan)

    def _ask(self, batch: Any) -> tuple[dict[str, tuple[Any, ...]] | None, str]:
        """Returns a plan and its verdict. The plan is None if this batch gives no advice, e.g. its loss overflowed."""
        asked = self._loss, self._optimizer, self._patterns, self._methods, self._filter
        try:
            plan = advised(self._model, [batch], *asked, 3, lambda stage: None, self._memory)
        except UnusableBatch as error:
            return None, f"no advice at step {self.step_count}: {str(error).partition(': ')[2]}"
        taken = dict(plan) if plan.net >= self._net else {}
        numbers = {"pays": plan.pays, "saved": plan.saved, "noise": plan.noise, "net": plan.net, "norm": plan.norm}
        self._write({"step": self.step_count, **numbers, "plan": taken})
        unused = f"; not used, because it is less than net={self._net:.0%}" if plan and not taken else ""
        return taken, plan.verdict + unused

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._to is None:
            return
        if callable(self._to):
            self._to(line)
            return
        try:
            with Path(self._to).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # a full disk must not end the training
            warnings.warn(f"Budget: {self._to} cannot be written any more: {error}", stacklevel=4)
            self._to = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the step, the plan and the measurements, in types that JSON can store.

        A run that restores this state and the state of ``sdgp.chooser`` from a checkpoint continues exactly as it would
        have without the interruption.
        """
        memory = self._memory
        decisions = {key: asdict(decision) for key, decision in memory.decisions.items()}
        realized = None if memory.realized is None else list(memory.realized)
        step_ms = memory.step_ms if math.isfinite(memory.step_ms) else None
        measured = {"step_ms": step_ms, "realized": realized, "decisions": decisions, "values": memory.values}
        taken = {"plan": dict(self.plan), "verdict": self.verdict}
        return {"step": self.step_count, "next": self._next, **taken, **measured}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that ``state_dict`` returned, and converts the model to its plan.

        Raises:
            ValueError: If ``state`` is not the state of a budget, or belongs to another model.
        """
        if set(state) != _KEYS:
            raise ValueError(f"Budget: expected a state_dict with {', '.join(sorted(_KEYS))}, got {sorted(state)}")
        try:
            decisions = {key: Decision(**values) for key, values in state["decisions"].items()}
        except TypeError as error:
            raise ValueError(f"Budget: expected decisions of this version, got one that differs: {error}") from error
        convert(self._model, state["plan"])
        self.plan = {name: tuple(setting) for name, setting in state["plan"].items()}
        self.step_count, self._next, self.verdict = state["step"], state["next"], state["verdict"]
        step_ms = math.nan if state["step_ms"] is None else state["step_ms"]
        realized = None if state["realized"] is None else Interval(*state["realized"])
        self._memory = Memory(step_ms, realized, decisions, state["values"])


def _check_alone(model: nn.Module) -> None:
    """Raises ValueError if one process cannot run the model without the others."""
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) or is_sharded(module):
            kind = type(module).__name__
            raise ValueError(f"Budget: expected a model that one process can run alone, got {kind} {name}")
    if sharded := [name for name, parameter in model.named_parameters() if hasattr(parameter, "placements")]:
        raise ValueError(f"Budget: expected a model that one process can run alone, got shards of {sharded[0]}")

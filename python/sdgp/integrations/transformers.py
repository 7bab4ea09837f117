# SPDX-License-Identifier: BSD-3-Clause
"""A callback for the Trainer of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .._layer import PruningLayer
from ._callback import ScheduleCallback


class SdgpCallback(ScheduleCallback, TrainerCallback, ExportableState):  # type: ignore[misc]
    """Converts the Trainer's model when training begins, and schedules where its gradients are exact.

    A number of steps is the optimizer's, as in ``TrainingArguments``: a whole number, or below 1 a share of all. The
    place in the schedule is the Trainer's ``global_step``, so that a resumed run goes on where it was; what was
    measured for ``backend="auto"`` or ``"pruned"`` goes with the Trainer's checkpoints.

    Args:
        pattern, method, filter, backend, weight_grad: as ``sdgp.convert`` takes them; no pattern: you converted the
            model.
        exact_first, exact_last, patterns: as ``sdgp.Schedule`` takes them.

    Raises:
        ValueError: ``SdgpCallback: requirement, got actual``, or, as training begins, what ``convert`` and ``Schedule``
            raise.

    Examples:
        >>> callback = SdgpCallback("2:4", backend="pruned", exact_first=0.05, exact_last=0.1)
        >>> Trainer(model, arguments, train_dataset=dataset, callbacks=[callback]).train()  # doctest: +SKIP
    """

    layers: Collection[str] | None = None  # what a filter chose, from a checkpoint, which cannot hold the filter
    _converted: Collection[str] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        # A checkpoint of a run without this callback lacks the entry, which the Trainer takes for granted.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.measured = (saved[-1] if isinstance(saved, list) else saved)["attributes"]["measured"]
        if (layers := self.layers) is not None:
            self.filter = lambda module, name: name in layers
        self.start(model, state.max_steps, state.global_step)
        self._converted = [name for name, module in model.named_modules() if isinstance(module, PruningLayer)]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule.seek(state.global_step)

    def state(self) -> dict[str, Any]:
        """For the Trainer's checkpoint: in types that JSON holds."""
        arguments = ("pattern", "method", "backend", "weight_grad", "exact_first", "exact_last")
        return {
            "args": {name: getattr(self, name) for name in arguments} | {"patterns": list(self.patterns.items())},
            "attributes": {"measured": self.measured, "layers": self._converted},
        }

# SPDX-License-Identifier: BSD-3-Clause
"""A callback for the Trainer of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .._layer import PruningLayer
from .._models import layers_of
from .._step import Handles, Hook
from .._twins import twin_of
from ._callback import ScheduleCallback, scaled


class SdgpCallback(ScheduleCallback, TrainerCallback, ExportableState):  # type: ignore[misc]
    """Converts the Trainer's model when training begins, and schedules when its gradients are exact.

    Steps are steps of the optimizer, as in ``TrainingArguments``: a whole number, or a float below 1 for a share of all
    steps. The callback takes the position in the schedule from the Trainer's ``global_step``, so a resumed run
    continues where it stopped. The Trainer's checkpoints store the measurements for ``backend="auto"`` and
    ``"pruned"``.

    Args:
        pattern, method, filter, backend, weight_grad: as ``sdgp.convert`` takes them. Without a pattern, the callback
            expects a model that is already converted.
        exact_first, exact_last, patterns: as ``sdgp.Schedule`` takes them.
        budget: the keyword arguments of a ``sdgp.Budget``, ``{}`` for its defaults. It replaces all other arguments and
            chooses what to prune and when. The model must return its loss, and batches must have at least two samples.
            ``to`` must be a path, because checkpoints store the arguments.

    Raises:
        ValueError: If an argument is invalid. The message reads ``SdgpCallback: requirement, got actual``. The start of
            training also raises the errors of ``convert`` and ``Schedule``.

    Examples:
        >>> callback = SdgpCallback("2:4", backend="pruned", exact_first=0.05, exact_last=0.1)
        >>> callback = SdgpCallback(budget={"every": 500})
        >>> Trainer(model, arguments, train_dataset=dataset, callbacks=[callback]).train()  # doctest: +SKIP
    """

    layers: Collection[str] | None = None  # from a checkpoint, which cannot store a filter: the layers it chose
    _converted: Collection[str] | None = None
    _batch: Mapping[str, Any] | None = None  # the batch of the last training forward
    _hooks = Handles()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        # A checkpoint of a run without this callback lacks this entry, but the Trainer requires it.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        attributes = (saved[-1] if isinstance(saved, list) else saved)["attributes"]
        self.measured = attributes["measured"]
        if self.budget_settings is not None:
            if callable(self.budget_settings.get("to")):
                raise ValueError(
                    "SdgpCallback: expected budget's to as a path, got a function: no checkpoint stores it"
                )
            # The Trainer also calls ``state`` when a new training begins, and finds the end of the last one there.
            self.budget_state = attributes.get("budget_state") if state.global_step else None
            if (layers := self.layers) is not None:
                self.budget_settings["filter"] = lambda module, name: name in layers
            scaler = getattr(kwargs["optimizer"], "scaler", None)  # of accelerate's optimizer
            self.start_budget(model, lambda *asked: scaled(_loss(*asked), scaler), kwargs["optimizer"])
            self._converted = self._chosen(model)
            self._hooks.remove()  # an interrupted training may have left one
            self._hooks = Handles([model.register_forward_pre_hook(Hook(self._note_batch), with_kwargs=True)])
            return
        if (layers := self.layers) is not None:
            self.filter = lambda module, name: name in layers
        self.start(model, state.max_steps, state.global_step)
        self._converted = [name for name, module in model.named_modules() if isinstance(module, PruningLayer)]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.schedule is not None:
            self.schedule.seek(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.budget is not None and self._batch is not None:
            self.budget.step(self._batch)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.budget is not None:
            self._hooks.remove()
            self._batch = None

    def _chosen(self, model: nn.Module) -> list[str] | None:
        """Returns the layers that the budget's filter chooses; None if there is no filter."""
        filter = (self.budget_settings or {}).get("filter")
        if filter is None:
            return None
        return [name for name, layer in layers_of(model) if twin_of(layer) is not None and filter(layer, name)]

    def _note_batch(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if model.training:  # num_items_in_batch counts the tokens of several batches; without it, the loss is a mean
            self._batch = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}

    def state(self) -> dict[str, Any]:
        """Returns the state for the Trainer's checkpoint, in types that JSON can store."""
        settings = {name: getattr(self, name) for name in self.stored} | {"patterns": list(self.patterns.items())}
        attributes = {"measured": self.measured, "layers": self._converted}
        if self.budget_settings is not None:
            settings["budget"] = {key: value for key, value in self.budget_settings.items() if key != "filter"}
            attributes["budget_state"] = None if self.budget is None else self.budget.state_dict()
        return {"args": settings, "attributes": attributes}


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            "SdgpCallback: expected a model that returns its loss with budget=, got none: the Trainer's own loss "
            "functions and label_smoothing_factor cannot be used with it"
        )
    return loss

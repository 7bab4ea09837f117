# SPDX-License-Identifier: BSD-3-Clause
"""A callback for the Trainer of Lightning 2, imported as ``lightning`` or as ``pytorch_lightning``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .._steps import UnusableBatch
from ._callback import ScheduleCallback, scaled

# The two packages have separate Callback classes. Use the package that the program has imported, if any.
if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
    from pytorch_lightning import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        from pytorch_lightning import Callback


class SdgpCallback(ScheduleCallback, Callback):  # type: ignore[misc]
    """Converts the module when ``fit`` starts training, and schedules when its gradients are exact.

    Steps are steps of the optimizer, counted like ``trainer.global_step`` and ``max_steps``. A float below 1 is a share
    of all steps. Shares and ``exact_last`` need a training of known length. The callback takes the position in the
    schedule from the trainer, so a resumed run continues where it stopped. The trainer's checkpoints store the
    measurements for ``backend="auto"`` and ``"pruned"``.

    Args:
        pattern, method, filter, backend, weight_grad: as ``sdgp.convert`` takes them. Without a pattern, the callback
            expects a module that is already converted.
        exact_first, exact_last, patterns: as ``sdgp.Schedule`` takes them.
        budget: the keyword arguments of a ``sdgp.Budget``, ``{}`` for its defaults. It replaces all other arguments and
            chooses what to prune and when. It calls ``training_step`` with whole batches, halves and quarters of them,
            with logging turned off. Metrics that ``training_step`` itself updates count these calls too.

    Raises:
        ValueError: If an argument is invalid. The message reads ``SdgpCallback: requirement, got actual``. The start of
            training also raises the errors of ``convert`` and ``Schedule``.

    Examples:
        >>> callback = SdgpCallback("2:4", backend="pruned", exact_first=0.05, exact_last=0.1)
        >>> Trainer(max_epochs=10, callbacks=[callback]).fit(module, loader)  # doctest: +SKIP
    """

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        if self.budget_settings is not None:
            if not getattr(pl_module, "automatic_optimization", True):
                raise ValueError("SdgpCallback: expected automatic optimization with budget=, got manual optimization")
            self._step, self._trainer = trainer.global_step, trainer
            self.start_budget(pl_module, self._loss, trainer.optimizers[0])
            return
        steps = trainer.estimated_stepping_batches
        self.start(pl_module, int(steps) if 0 < steps < float("inf") else None, trainer.global_step)

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        self._batch_idx = batch_idx
        if self.schedule is not None:
            self.schedule.seek(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.budget is not None and trainer.global_step != self._step:  # unchanged while gradients accumulate
            self._step = trainer.global_step
            self.budget.step(batch)

    def _loss(self, module: Any, batch: Any) -> Tensor:
        logs = ("log", "log_dict")
        own = {name: vars(module)[name] for name in logs if name in vars(module)}
        vars(module).update(dict.fromkeys(logs, lambda *args, **kwargs: None))
        try:
            takes_index = len(inspect.signature(module.training_step).parameters) > 1
            with self._trainer.precision_plugin.train_step_context():
                output = module.training_step(batch, *((self._batch_idx,) if takes_index else ()))
        finally:
            for name in logs:
                vars(module).pop(name)
            vars(module).update(own)
        if output is None:
            raise UnusableBatch("SdgpCallback: expected a loss, got None")
        loss: Tensor = output["loss"] if isinstance(output, Mapping) else output
        return scaled(loss, getattr(self._trainer.precision_plugin, "scaler", None))

    def state_dict(self) -> dict[str, Any]:
        budget = {} if self.budget is None else {"budget": self.budget.state_dict()}
        return {"measured": self.measured} | budget

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.measured, self.budget_state = state_dict["measured"], state_dict.get("budget")

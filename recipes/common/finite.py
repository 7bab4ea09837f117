# SPDX-License-Identifier: BSD-3-Clause
"""Stops a run whose loss is no number any more, and names the step and the layer whose gradient went first."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .errors import UserError


class FiniteCheck:
    """Looks at the loss and every gradient of every step; asks the device for the verdict every ``every`` steps only.

    Where a loss is scaled (float16), infinite gradients are everyday and their steps are skipped: ``gradients=False``.
    """

    def __init__(self, model: nn.Module, *, gradients: bool = True, every: int = 20) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._names, self._parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self._gradients, self._every = gradients, every
        self._loss_step: Tensor | None = None  # of the first bad loss, -1: none yet
        self._first: Tensor | None = None  # by parameter, the first step with a bad gradient, -1: none yet

    def update(self, step: int, loss: Tensor) -> None:
        """After each backward, before the gradients are changed.

        Raises:
            UserError: a loss was not finite, in this step or one of the last ``every``.
        """
        if self._loss_step is None:
            self._loss_step = torch.tensor(-1, device=loss.device)
            self._first = torch.full((len(self._names),), -1, device=loss.device)
        _note(self._loss_step, step, loss.detach().isfinite())
        if self._gradients and self._first is not None:
            gradients = [_local(p.grad) if p.grad is not None else p.new_zeros(()) for p in self._parameters]
            _note(self._first, step, torch.stack(torch._foreach_norm(gradients)).isfinite())
        if step % self._every == 0:
            self.check()

    def check(self) -> None:
        """Raises what :meth:`update` would, now."""
        if self._loss_step is None or self._first is None or int(self._loss_step) < 0:
            return
        step, firsts = int(self._loss_step), self._first.tolist()
        bad = [first for first in firsts if first >= 0]
        message = f"loss: expected a finite number, got none at step {step}"
        if bad and (first := min(bad)) <= step:
            # Backward runs from the last layer to the first: of those that went in one step, the last went first.
            name = self._names[len(firsts) - 1 - firsts[::-1].index(first)]
            message += f"; the gradient of {name} went first, at step {first}"
        elif self._gradients:
            message += "; every gradient before it was finite: the forward overflowed"
        raise UserError(f"{message}. Try a lower lr or a longer warm-up; the last checkpoint is from before")


def _note(first: Tensor, step: int, finite: Tensor) -> None:
    first.copy_(torch.where((first < 0) & ~finite, step, first))


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient

# SPDX-License-Identifier: BSD-3-Clause
"""Stops a run whose loss is no longer finite, and names the step and the layer of the first bad gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .errors import Diverged


class FiniteCheck:
    """Checks the loss and every gradient in every step, but fetches the result from the device only in some steps.

    Args:
        gradients: whether to check gradients. Use False if the loss is scaled (float16): infinite gradients are normal
            then, and their steps are skipped.
        every: the number of steps from one fetch to the next.
    """

    def __init__(self, model: nn.Module, *, gradients: bool = True, every: int = 20) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._names, self._parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self._gradients, self._every = gradients, every
        device = next(model.parameters()).device
        self._loss_step = torch.tensor(-1, device=device)  # the step of the first bad loss; -1: none yet
        self._first = torch.full((len(named),), -1, device=device)  # the same for each parameter's gradient

    def update(self, step: int, loss: Tensor) -> None:
        """Checks one step. Call this method after each backward, before anything changes the gradients.

        Raises:
            Diverged: if the loss was not finite in this step or in one of the last ``every`` steps.
        """
        _note(self._loss_step, step, loss.detach().isfinite())
        if self._gradients:
            gradients = [_local(p.grad) if p.grad is not None else p.new_zeros(()) for p in self._parameters]
            _note(self._first, step, torch.stack(torch._foreach_norm(gradients)).isfinite())
        if step % self._every == 0:
            self.check()

    def check(self) -> None:
        """Fetches the result now, and raises the error of ``update`` if a loss was not finite."""
        step = int(self._loss_step)
        if step < 0:
            return
        firsts = self._first.tolist()
        bad = [first for first in firsts if first >= 0]
        message = f"loss: expected a finite number, got none at step {step}"
        if bad and (first := min(bad)) <= step:
            # Backward runs from the last layer to the first. If several gradients are bad in one step, the last
            # layer's gradient was bad first.
            name = self._names[len(firsts) - 1 - firsts[::-1].index(first)]
            message += f"; the gradient of {name} was the first that was not finite, at step {first}"
        elif self._gradients:
            message += "; every gradient before it was finite: the forward overflowed"
        raise Diverged(f"{message}. Try a lower lr or a longer warm-up; the last checkpoint was saved before")


def _note(first: Tensor, step: int, finite: Tensor) -> None:
    first.copy_(torch.where((first < 0) & ~finite, step, first))


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient

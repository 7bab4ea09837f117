# SPDX-License-Identifier: BSD-3-Clause
"""The steps that ``sdgp.advise`` runs on the caller's batches: their gradients, their time, and the batch's noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ._decision import Decision
from ._noise import Estimate, Gradients, Norm, batch_noise, noise_of_halves, part_of, samples_of, tensors_of
from ._plan import Interval
from ._step import Loss, compute_loss, generators_kept, run_backward
from ._timing import interval, seconds

_LONG = 10  # seconds: three pairs of long steps are enough, because short disturbances average out in each


class UnusableBatch(ValueError):
    """Raised if a batch gives no advice. Another batch may give advice."""


@dataclass
class Memory:
    """The times that one call of ``advised`` keeps for the next call. They hold for batches of one size."""

    step_ms: float = math.nan
    realized: Interval | None = None  # of the products' savings, see ``Steps.realized``
    decisions: dict[str, Decision] = field(default_factory=dict)  # by layer, call and pruning
    values: int = 0  # the number of values in the batch

    def fit(self, batch: Any) -> None:
        """Drops the times if ``batch`` has another size."""
        values = sum(tensor.numel() for tensor in tensors_of(batch))
        if not 0.9 * self.values <= values <= 1.1 * self.values:
            self.forget()
            self.values = values

    def forget(self) -> None:
        self.step_ms, self.realized, self.decisions = math.nan, None, {}


class Steps:
    """A model with the batches and the loss of the caller, and what its steps showed.

    Attributes:
        batches: those with as many samples as the first one: gradients of smaller batches are noisier.
        ignored: the number of the other batches.
        without_gradient: the number of trained parameters that got no gradient in the last step.
        bfloat16_saved: the share of a step's time that autocast to bfloat16 saves; 0 if it was not measured.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], loss: Loss | None, norm: Norm, rounds: int, memory: Memory
    ) -> None:
        self.model, self.norm, self.rounds, self.memory = model, norm, rounds, memory
        self.batches = alike(batches)
        self.ignored = len(batches) - len(self.batches)
        self._loss = loss
        self.without_gradient = 0
        self.bfloat16_saved = 0.0

    def loss(self, batch: Any) -> Tensor:
        """Runs the forward on a batch and returns its loss."""
        return compute_loss("advise", self.model, batch, self._loss)

    def gradients(self, batch: Any, autocast: torch.dtype | None = None) -> dict[nn.Parameter, Tensor]:
        """Returns the gradients of the trained parameters. Every call draws the same dropout.

        Args:
            autocast: the dtype of an autocast around the forward. With None, there is none.
        """
        parameters = list(self.norm.scales)
        for parameter in parameters:
            parameter.grad = None
        with generators_kept(parameters):
            with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
                value = self.loss(batch)
            if not torch.isfinite(value):
                raise UnusableBatch(f"advise: expected a finite loss, got {value.item()}")
            run_backward("advise", value, parameters)
        self.without_gradient = sum(parameter.grad is None for parameter in parameters)
        return {p: torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters}

    def time(self) -> None:
        """Times a step, unless ``memory`` has the time from an earlier call."""
        if math.isfinite(self.memory.step_ms):
            return

        def step() -> None:
            self.gradients(self.batches[0])

        step()  # warms up
        device = next(iter(self.norm.scales)).device
        self.memory.step_ms = 1e3 * min(seconds(step, device) for _ in range(self.rounds))
        # Without AVX-512, PyTorch's bfloat16 products on x86 take about twenty times as long.
        if device.type == "cpu" and "AVX512" in torch.backends.cpu.get_cpu_capability():
            self.bfloat16_saved = self._saved_by_bfloat16(device)

    def _saved_by_bfloat16(self, device: torch.device) -> float:
        """Returns the share of a step's time that autocast to bfloat16 saves, or 0 if the model does not run under it.

        It saves nothing where ``loss`` has its own autocast.
        """

        def step() -> None:
            self.gradients(self.batches[0], torch.bfloat16)

        times: list[float] = []
        try:
            for _ in range(1 + self.rounds):  # the first one warms up
                times.append(1e3 * seconds(step, device))
                if times[0] > 2 * self.memory.step_ms:
                    return 0.0
        except Exception:  # a loss may do anything that bfloat16 does not support; then there is no hint
            return 0.0
        return 1 - min(times[1:]) / self.memory.step_ms

    def realized(self, pruned: Callable[[], AbstractContextManager[None]], expected: float) -> Interval:
        """Measures how much of the expected saving whole steps show. Plain and pruned steps take turns.

        Args:
            pruned: returns a context manager in which the model prunes.
            expected: the share of a step's time that pruning saves according to the times of its products.

        Returns:
            Measured saving / ``expected``, from the shortest times, and the ends of its 95 % interval.
        """

        def with_pruning() -> None:
            with pruned():
                self.gradients(self.batches[0])

        device = next(iter(self.norm.scales)).device
        with_pruning()  # the first backward measures which products are faster
        plain, own = list[float](), list[float]()
        while len(own) < 3 or (len(own) < self.rounds + 2 and sum(plain) + sum(own) < _LONG):
            plain.append(seconds(lambda: self.gradients(self.batches[0]), device))
            own.append(seconds(with_pruning, device))
        ratios = sorted((b / a for a, b in zip(plain, own, strict=True)), reverse=True)
        low, high = interval(len(ratios))
        return Interval(*((1 - ratio) / expected for ratio in (min(own) / min(plain), ratios[low], ratios[high])))

    def batch_noise(self, exact: Gradients) -> Estimate:
        """Estimates the noise of the batch from several batches, or from the halves of a single one.

        Args:
            exact: the exact gradients of the first batch.
        """
        if len(self.batches) > 1:
            estimate = batch_noise(chain([exact], map(self.gradients, self.batches[1:])), self.norm)
        else:
            batch = self.batches[0]
            half = (samples_of(batch) or 0) // 2
            try:
                one, other = self.gradients(part_of(batch, 0, half)), self.gradients(part_of(batch, half, 2 * half))
            except UnusableBatch:
                raise
            except Exception as error:  # a loss may refuse a part of a batch
                raise ValueError(
                    f"advise: expected several batches, or one whose halves the loss accepts, got: {error}"
                ) from error
            estimate = noise_of_halves(exact, one, other, self.norm)
        if math.isnan(estimate.mean):
            raise UnusableBatch("advise: expected gradients that are finite, got some that are not")
        if not 0 < estimate.mean < math.inf:
            raise UnusableBatch(f"advise: expected batches whose gradients differ, got a variance of {estimate.mean}")
        return estimate


def alike(batches: Sequence[Any]) -> list[Any]:
    """Returns the batches with as many samples as the first one."""
    return [batch for batch in batches if samples_of(batch) == samples_of(batches[0])]

# SPDX-License-Identifier: BSD-3-Clause
"""The training loop of all recipes: steps, epochs, progress, and what a run counts."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import Optimizer

from .budget import CountedBudget
from .errors import Diverged, Stopped
from .finite import FiniteCheck
from .process import Stop, World, derive_seed
from .record import Curve, Job, Record
from .settings import Settings

#: The micro-batches of one step: (input, target).
MicroBatches: TypeAlias = Sequence[tuple[Tensor, Tensor]]


class Measured(NamedTuple):
    """What the forward of a micro-batch returns.

    Attributes:
        loss: the mean over the micro-batch.
        units: the images or tokens in it.
        sums: other values, summed over the units.
    """

    loss: Tensor
    units: int
    sums: Mapping[str, Tensor]


#: A function of model, input and target.
Forward: TypeAlias = Callable[[nn.Module, Tensor, Tensor], Measured]


def classify(model: nn.Module, inputs: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Measured:
    """The cross-entropy of a micro-batch, and its top-1 in percent, summed over the samples."""
    scores = model(inputs)
    loss = F.cross_entropy(scores, labels, label_smoothing=label_smoothing)
    hits = (scores.argmax(1) == labels).sum()
    return Measured(loss, len(labels), {"top1": 100 * hits})


def update(
    model: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler, config: Settings, epoch: float
) -> None:
    """Ends a step, whose gradients are complete and unscaled: clips them and moves the parameters.

    Args:
        epoch: the time in epochs, for the learning rate.
    """
    if config.clip:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate(epoch)
    scaler.step(optimizer)
    scaler.update()


class Run:
    """One training run, from its first step or a checkpoint to its result line.

    Args:
        job: the files of the run. If it resumes, model and optimizer are restored from the checkpoint.
        config, seed: the settings of the run.
        data: the name of the data. A checkpoint with another config, seed, data or plan is rejected.
        steps: the number of steps per epoch.
    """

    def __init__(
        self,
        job: Job,
        config: Settings,
        seed: int,
        data: str,
        world: World,
        model: nn.Module,
        optimizer: Optimizer,
        steps: int,
    ) -> None:
        self._config, self._seed, self._world = config, seed, world
        self._model, self._optimizer, self._scaler = model, optimizer, config.scaler(world.device)
        self._epoch_steps = steps
        self._finite = FiniteCheck(model, gradients=not self._scaler.is_enabled())
        self._first = 0  # the step to continue with
        self._totals = {"seconds": 0.0, "waiting": 0.0, "units": 0.0}  # over all steps so far
        self._epoch: dict[str, float] = {}  # sums over the epoch's steps, on the host
        self._pending: dict[str, Tensor] = {}  # sums over later steps, still on the device
        self._curve: Curve = []
        self._budget: CountedBudget | None = None
        self._saved_budget: dict[str, Any] | None = None
        self._record = Record(job, config, seed, data, world)
        if (saved := self._record.restore(model, optimizer, self._scaler)) is not None:
            self._first, self._totals = saved["step"], saved["totals"]
            self._epoch, self._curve, self._saved_budget = saved["epoch"], saved["curve"], saved.get("budget")
        text = "[bold]{task.description}[/] epoch {task.fields[epoch]}"
        shown = TextColumn("{task.percentage:3.0f}% {task.fields[shown]}")
        self._progress = Progress(
            TextColumn(text), BarColumn(), shown, TimeRemainingColumn(), disable=not world.is_first
        )
        self._task = self._progress.add_task(
            f"{config.row} seed {seed}",
            total=config.epochs * steps,
            completed=self._first,
            epoch=1,
            shown="",
            start=False,
        )

    def fit(
        self,
        batches: Callable[[int, int], Iterable[MicroBatches]],
        forward: Forward,
        validate: Callable[[int], Mapping[str, float]],
    ) -> None:
        """Trains from the restored step to the last epoch.

        Args:
            batches: from an epoch and its first step, the micro-batches of each step: (input, target).
            forward: from the model, which may be wrapped, input and target. It runs under the config's autocast.
            validate: from the epoch that has ended; what it returns goes into the epoch's line.

        Raises:
            Stopped: If a signal stopped the run before its end. A checkpoint is saved then.
            Diverged: If a loss, a gradient or a result is not finite.
        """
        self._budget = self._make_budget(forward)
        first, schedule = self._first, self._config.schedule(self._model)
        wrapped = self._config.wrap(self._model, self._world)
        with contextlib.closing(Stop(self._world)) as self._stop, self._progress:
            self._progress.start_task(self._task)
            for epoch in range(first // self._epoch_steps, self._config.epochs):
                self._model.train()
                if schedule is not None:
                    schedule.seek(epoch)
                for step, micro_batches in self._steps(first, batches(epoch, first % self._epoch_steps)):
                    self._end_step(step, epoch, self._step(step, wrapped, micro_batches, forward))
                first = (epoch + 1) * self._epoch_steps
                self._end_epoch(first, epoch, validate(epoch))

    def _step(self, step: int, model: nn.Module, micro_batches: MicroBatches, forward: Forward) -> int:
        """Trains one step. Returns its images or tokens."""
        start = time.perf_counter()
        self._optimizer.zero_grad()
        mean, units = torch.zeros((), device=self._world.device), 0
        for input, target in micro_batches:
            with self._config.autocast(self._world.device):
                loss, count, sums = forward(model, input, target)
                loss = loss / len(micro_batches)
            self._scaler.scale(loss).backward()
            mean += loss.detach()
            units += count
            self._add(sums)
        self._scaler.unscale_(self._optimizer)
        self._finite.update(step, mean)
        update(self._model, self._optimizer, self._scaler, self._config, (step + 1) / self._epoch_steps)
        self._add({"loss": mean * units})
        if self._budget is not None:
            self._budget.step(micro_batches[0], start)
        return units

    def _make_budget(self, forward: Forward) -> CountedBudget | None:
        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            with self._config.autocast(self._world.device):
                value: Tensor = self._scaler.scale(forward(model, *batch).loss)
            return value

        if not self._config.budget:
            return None
        every, steps = self._config.budget, self._config.epochs * self._epoch_steps
        return CountedBudget(every, steps, self._model, loss, self._optimizer, self._saved_budget)

    def _steps(self, step: int, batches: Iterable[MicroBatches]) -> Iterator[tuple[int, MicroBatches]]:
        """Yields (step, batch) and times the steps. Random numbers in a step depend only on seed, process and step."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            # Augmentation belongs to the step, so set the seed before the batch is made.
            torch.manual_seed(derive_seed("step", self._seed, self._world.rank, step))
            batch = next(iterator, None)
            ready = time.perf_counter()
            if batch is None:
                return
            yield step, batch
            step += 1
            now = time.perf_counter()
            self._totals["seconds"] += now - start
            self._totals["waiting"] += ready - start

    def _add(self, sums: Mapping[str, Tensor]) -> None:
        """Adds to the epoch's sums over images or tokens (loss, top1)."""
        for name, value in sums.items():
            value = value.detach().double()
            self._pending[name] = self._pending[name] + value if name in self._pending else value

    def _end_step(self, step: int, epoch: int, units: int) -> None:
        """Counts a step's images or tokens. If a signal asked to stop, saves the run and stops it."""
        self._totals["units"] += units * self._world.size
        self._epoch["units"] = self._epoch.get("units", 0) + units
        self._show(step + 1, epoch)
        if (step + 1) % self._epoch_steps == 0 or not self._stop.asked(step + 1):  # the epoch's end asks again
            return
        self._finite.check()
        self._save(step + 1)
        self._stop_after(step + 1)

    def _end_epoch(self, step: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Writes the epoch's line, with the means over its steps, and a checkpoint. Stops if a signal asked for it."""
        self._finite.check()
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise Diverged(f"{name}: expected a finite number, got {value} after epoch {epoch + 1}")
        self._collect()
        names = list(self._epoch)
        sums = self._world.sum(torch.tensor([self._epoch[name] for name in names], device=self._world.device)).tolist()
        means = dict(zip(names, sums, strict=True))
        units = means.pop("units")
        line = {"epoch": epoch + 1, **{f"train_{name}": value / units for name, value in means.items()}, **metrics}
        line |= {
            "seconds": self._totals["seconds"],
            f"{self._config.unit}_per_s": self._speed,
            "waiting": self._waiting,
        }
        line = {name: round(value, 5) for name, value in line.items()}
        self._curve.append(line)
        self._epoch = {}
        if self._world.is_first:
            self._record.write_curve(self._curve)
            said = ", ".join(f"{name} {value:g}" for name, value in line.items())
            self._progress.console.print(f"{self._config.row} seed {self._seed}: {said}", soft_wrap=True)
        self._save(step)
        if epoch + 1 < self._config.epochs and self._stop.asked(0):
            self._stop_after(step)

    def finish(self, recipe: str, *metrics: str) -> None:
        """Writes the result line to the run's folder and to the results file, unless they already have it.

        Args:
            recipe: its name.
            metrics: which values of the last epoch are the result.
        """
        result = {
            **{name: self._curve[-1][name] for name in metrics},
            "minutes": round(self._totals["seconds"] / 60, 2),
            f"{self._config.unit}_per_s": round(self._speed, 1),
            "waiting": round(self._waiting, 4),
            **({} if self._budget is None else self._budget.result()),
        }
        self._record.finish(self._model, recipe, result, self._curve)
        if self._stop.asked(0):  # a signal came after the last step
            raise Stopped(self._stop.number)

    def _stop_after(self, step: int) -> None:
        if self._world.is_first:
            self._progress.console.print(f"stopped after step {step}; go on with --resume")
        raise Stopped(self._stop.number)

    @property
    def _speed(self) -> float:
        return self._totals["units"] / max(self._totals["seconds"], 1e-9)

    @property
    def _waiting(self) -> float:
        """The share of the time that the run waited for the next batch."""
        return self._totals["waiting"] / max(self._totals["seconds"], 1e-9)

    def _collect(self) -> None:
        for name, value in self._pending.items():
            self._epoch[name] = self._epoch.get(name, 0) + float(value)
        self._pending = {}

    def _show(self, step: int, epoch: int) -> None:
        self._progress.update(self._task, completed=step, epoch=epoch + 1)
        if step % 20 or not self._world.is_first:
            return
        self._collect()
        means = (f"{k} {v / self._epoch['units']:.3f}" for k, v in self._epoch.items() if k != "units")
        speed = f"{self._speed:.0f} {self._config.unit}/s, {100 * self._waiting:.0f}% waiting"
        self._progress.update(self._task, shown=", ".join((*means, speed)))

    def _save(self, step: int) -> None:
        self._collect()
        counted = {"step": step, "totals": self._totals, "epoch": self._epoch, "curve": self._curve}
        counted["budget"] = None if self._budget is None else self._budget.state_dict()
        self._record.save(self._model, self._optimizer, self._scaler, counted)

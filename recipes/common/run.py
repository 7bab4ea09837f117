# SPDX-License-Identifier: BSD-3-Clause
"""The bookkeeping of a run: its folder, progress, checkpoints, a JSON line per epoch, and one for the result.

runs/<recipe>/<config>/seed0/checkpoint.safetensors   saved after each epoch, and when a signal stops the run
runs/<recipe>/<config>/seed0/metrics.jsonl            one line per epoch
runs/<recipe>.jsonl                                   one line per finished run; recipes/report.py reads it
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import sdgp
from sdgp._machine import machine

from . import checkpoint
from .config import difference
from .errors import UserError
from .files import append_line, replacing
from .finite import FiniteCheck
from .process import Stop, World, derive_seed
from .settings import Settings

ROOT = Path(__file__).parents[2]
_MEASURED = ("CMakeLists.txt", "cpp", "cuda", "python", "recipes/*.py")

_SAVED = {"config", "seed", "world", "step", "optimizer", "scaler", "products", "totals", "epoch", "curve"}

_Batch = TypeVar("_Batch")


class Job(NamedTuple):
    """The files of a run, and whether the run resumes from them."""

    folder: Path  # the folder for its checkpoint and metrics
    results: Path  # the file for its result line
    resume: bool


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


class Run:
    """One training run, from its first step or a checkpoint to its result line.

    Args:
        job: the files of the run.
        config, seed: the settings of the run. A checkpoint with another config is rejected.
        epoch_steps: the number of steps per epoch.
        unit: what the throughput counts, for example "images".
    """

    def __init__(self, job: Job, config: Settings, seed: int, world: World, *, epoch_steps: int, unit: str) -> None:
        self._job, self._config, self._seed, self._world = job, config, seed, world
        self._epoch_steps, self._unit = epoch_steps, unit
        self._settings = dataclasses.asdict(config)
        self._totals = {"seconds": 0.0, "waiting": 0.0, "units": 0.0}  # over all steps so far
        self._epoch: dict[str, float] = {}  # sums over the epoch's steps, on the host
        self._pending: dict[str, Tensor] = {}  # sums over later steps, still on the device
        self._curve: list[dict[str, float]] = []
        text = "[bold]{task.description}[/] epoch {task.fields[epoch]}"
        shown = TextColumn("{task.percentage:3.0f}% {task.fields[shown]}")
        self._progress = Progress(
            TextColumn(text), BarColumn(), shown, TimeRemainingColumn(), disable=not world.is_first
        )
        description = f"{config.row} seed {seed}"
        self._task = self._progress.add_task(
            description, total=config.epochs * epoch_steps, epoch=1, shown="", start=False
        )

    # --- start and end

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Restores model and optimizer from the checkpoint, if the job resumes one.

        Raises:
            UserError: if the checkpoint has another config or number of processes, a checkpoint exists but the job does
                not resume, or the run's folder is not writable.
        """
        self._model, self._optimizer, self._scaler = model, optimizer, self._config.scaler(self._world.device)
        self._finite = FiniteCheck(model, gradients=not self._scaler.is_enabled())
        self._first = 0  # the step to continue with
        _make(self._job.folder)
        path = self._job.folder / "checkpoint.safetensors"
        if not self._job.resume:
            if path.exists():
                raise UserError(f"{path} exists: go on with --resume, or choose another --out")
            return
        if not path.exists():
            return
        weights, training = checkpoint.load(path)
        if missing := _SAVED - training.keys():
            raise UserError(
                f"--resume: expected a checkpoint of a recipe, got {path} without {', '.join(sorted(missing))}"
            )
        if changed := difference(training["config"], self._settings):
            raise UserError(f"--resume: expected the config of {path}, got changes: {changed}")
        if training["world"] != self._world.size:
            was, now = training["world"], self._world.size
            raise UserError(f"--resume: expected {was} processes as {path} was saved by, got {now}")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=cast(dict[str, Any], weights),
            optim_state_dict=training["optimizer"],
            options=StateDictOptions(full_state_dict=True, strict=not _is_partly_frozen(model)),
        )
        _match_layouts(optimizer)
        self._scaler.load_state_dict(training["scaler"])
        sdgp.chooser.load_state_dict(training["products"])
        self._totals, self._epoch, self._curve = training["totals"], training["epoch"], training["curve"]
        if self._world.is_first:  # a crash may have come between a line and its checkpoint
            _write_lines(self._job.folder / "metrics.jsonl", self._curve)
        self._first = training["step"]
        self._progress.update(self._task, completed=self._first)

    def fit(
        self,
        batches: Callable[[int, int], Iterable[Sequence[tuple[Tensor, Tensor]]]],
        forward: Callable[[Tensor, Tensor], Measured],
        learning_rate: Callable[[float], float],
        validate: Callable[[int], Mapping[str, float]],
    ) -> bool:
        """Trains from the restored step to the last epoch.

        Args:
            batches: from an epoch and its first step, the micro-batches of each step: (input, target).
            forward: from input and target. It runs under the config's autocast.
            learning_rate: from the time in epochs.
            validate: from the epoch that has ended; what it returns goes into the epoch's line.

        Returns:
            False if a signal stopped the run before its end.
        """
        first, schedule = self._first, self._config.schedule(self._model)
        with contextlib.closing(Stop(self._world)) as self._stop, self._progress:
            self._progress.start_task(self._task)
            for epoch in range(first // self._epoch_steps, self._config.epochs):
                self._model.train()
                if schedule is not None:
                    schedule.seek(epoch)
                for step, micro_batches in self._steps(first, batches(epoch, first % self._epoch_steps)):
                    for group in self._optimizer.param_groups:
                        group["lr"] = learning_rate((step + 1) / self._epoch_steps)
                    units = self._step(step, micro_batches, forward)
                    if self._stopped_after_step(step, epoch, units):
                        return False
                first = (epoch + 1) * self._epoch_steps
                if self._stopped_after_epoch(first, epoch, validate(epoch)):
                    return False
        return True

    def _step(
        self, step: int, micro_batches: Sequence[tuple[Tensor, Tensor]], forward: Callable[[Tensor, Tensor], Measured]
    ) -> int:
        """Trains one step. Returns its images or tokens."""
        self._optimizer.zero_grad()
        mean, units = torch.zeros((), device=self._world.device), 0
        for input, target in micro_batches:
            with self._config.autocast(self._world.device):
                loss, count, sums = forward(input, target)
                loss = loss / len(micro_batches)
            self._scaler.scale(loss).backward()
            mean += loss.detach()
            units += count
            self._add(sums)
        self._scaler.unscale_(self._optimizer)
        self._finite.update(step, mean)
        if self._config.clip:
            nn.utils.clip_grad_norm_(self._model.parameters(), self._config.clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._add({"loss": mean * units})
        return units

    # --- around the steps

    def _steps(self, step: int, batches: Iterable[_Batch]) -> Iterator[tuple[int, _Batch]]:
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

    def _stopped_after_step(self, step: int, epoch: int, units: int) -> bool:
        """Counts a step's images or tokens. Returns whether a signal asked to stop; the run is saved then."""
        self._totals["units"] += units * self._world.size
        self._epoch["units"] = self._epoch.get("units", 0) + units
        self._show(step + 1, epoch)
        if (step + 1) % self._epoch_steps == 0 or not self._stop.asked(step + 1):  # the epoch's end asks again
            return False
        self._finite.check()
        self._save(step + 1)
        self._say_stopped(step + 1)
        return True

    def _stopped_after_epoch(self, step: int, epoch: int, metrics: Mapping[str, float]) -> bool:
        """Writes the epoch's line, with the means over its steps, and a checkpoint. Returns whether a signal asked to
        stop."""
        self._finite.check()
        self._collect()
        names = list(self._epoch)
        sums = self._world.sum(torch.tensor([self._epoch[name] for name in names], device=self._world.device)).tolist()
        means = dict(zip(names, sums, strict=True))
        units = means.pop("units")
        line = {"epoch": epoch + 1, **{f"train_{name}": value / units for name, value in means.items()}, **metrics}
        line |= {"seconds": self._totals["seconds"], f"{self._unit}_per_s": self._speed, "waiting": self._waiting}
        line = {name: round(value, 5) for name, value in line.items()}
        self._curve.append(line)
        self._epoch = {}
        if self._world.is_first:
            _write_lines(self._job.folder / "metrics.jsonl", self._curve)
            said = ", ".join(f"{name} {value:g}" for name, value in line.items())
            self._progress.console.print(f"{self._config.row} seed {self._seed}: {said}", soft_wrap=True)
        self._save(step)
        if epoch + 1 == self._config.epochs or not self._stop.asked(0):
            return False
        self._say_stopped(step)
        return True

    def finish(self, recipe: str, **result: Any) -> None:
        """Writes the result line to the run's folder and to the results file, unless they already have it."""
        line = {
            "recipe": recipe,
            "row": self._config.row,
            "seed": self._seed,
            **result,
            "minutes": round(self._totals["seconds"] / 60, 2),
            f"{self._unit}_per_s": round(self._speed, 1),
            "waiting": round(self._waiting, 4),
            "parameters": sum(parameter.numel() for parameter in self._model.parameters()),
            "layers": _layers(self._model),
            "processes": self._world.size,
            "device": _device(self._world.device),
            "machine": machine(ROOT, *_MEASURED),
            "config": self._settings,
            "curve": self._curve,
        }
        if not self._world.is_first:
            return
        kept, results = self._job.folder / "result.json", self._job.results
        if not kept.exists():
            _write_lines(kept, [line])
        try:  # comes second: if it fails, a resumed run appends the line that result.json keeps
            append_line(results, kept.read_text(encoding="utf-8").rstrip("\n"))
        except OSError as error:
            raise UserError(
                f"--results: expected a file that can be written, got {results}: {error.strerror}; {kept} has the "
                "line, and --resume appends it"
            ) from None

    @property
    def last(self) -> dict[str, float]:
        """The line of the last epoch."""
        return self._curve[-1]

    # --- internals

    def _say_stopped(self, step: int) -> None:
        if self._world.is_first:
            self._progress.console.print(f"stopped after step {step}; go on with --resume")

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
        speed = f"{self._speed:.0f} {self._unit}/s, {100 * self._waiting:.0f}% waiting"
        self._progress.update(self._task, shown=", ".join((*means, speed)))

    def _save(self, step: int) -> None:
        self._collect()
        frozen = _is_partly_frozen(self._model)  # the checkpoint does not need frozen parameters
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=frozen)
        weights, optimizer = get_state_dict(self._model, self._optimizer, options=options)
        if not self._world.is_first:
            return
        training = {
            "config": self._settings,
            "seed": self._seed,
            "world": self._world.size,
            "step": step,
            "optimizer": optimizer,
            "scaler": self._scaler.state_dict(),
            "products": sdgp.chooser.state_dict(),
            "totals": self._totals,
            "epoch": self._epoch,
            "curve": self._curve,
        }
        checkpoint.save(self._job.folder / "checkpoint.safetensors", cast(dict[str, Tensor], weights), training)


def _is_partly_frozen(model: nn.Module) -> bool:
    return not all(parameter.requires_grad for parameter in model.parameters())


def _match_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Gives the optimizer's buffers the strides of their parameters, as in an uninterrupted run.

    A checkpoint stores contiguous tensors. With other strides, results would round differently.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _make(folder: Path) -> None:
    """Creates the folder and checks that it is writable, so that the run fails before its first step if it is not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".tmp").touch()
        (folder / ".tmp").unlink(missing_ok=True)  # another process of the run may have removed it
    except OSError as error:
        raise UserError(f"--out: expected a folder that can be written, got {folder}: {error.strerror}") from None


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    try:
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror}; the last checkpoint stays") from None


def _layers(model: nn.Module) -> dict[str, int]:
    """Counts the layers that prune, and the layers whose last data gradient took the sparse product."""
    products = [row.product for row in sdgp.report(model) if row.gradient == "data"]
    pruned = sum(product not in ("plain", "exact") for product in products)  # it is "" before the first backward
    return {"pruned": pruned, "sparse": products.count("sparse")}


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

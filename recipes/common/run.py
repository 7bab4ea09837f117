# SPDX-License-Identifier: BSD-3-Clause
"""The bookkeeping of a run: its folder, progress, checkpoints, a JSON line an epoch, and one for the result.

runs/<recipe>/<config>/seed0/checkpoint.safetensors   after each epoch, and where a signal stopped it
runs/<recipe>/<config>/seed0/metrics.jsonl            a line an epoch
runs/<recipe>.jsonl                                   a line a finished run: what recipes/report.py reads
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
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

_Batch = TypeVar("_Batch")


class Job(NamedTuple):
    """The files of a run, and whether it goes on with them."""

    folder: Path  # of its checkpoint and metrics
    results: Path  # the file that gets its result line
    resume: bool


class Run:
    """One training run, from its first step or a checkpoint to its result line.

    Args:
        job: where its files are.
        config, seed: what it is; a checkpoint of another config is refused.
        epochs, epoch_steps: how many, and of how many steps.
        unit: what the throughput counts, "images" say.
    """

    def __init__(
        self, job: Job, config: Settings, seed: int, world: World, *, epochs: int, epoch_steps: int, unit: str
    ) -> None:
        self._job, self._config, self._seed, self._world = job, config, seed, world
        self._epochs, self._epoch_steps, self._unit = epochs, epoch_steps, unit
        self._settings = dataclasses.asdict(config)
        self._totals = {"seconds": 0.0, "waiting": 0.0, "units": 0.0}  # of all steps so far
        self._epoch: dict[str, float] = {}  # sums of the epoch's steps that are on the host
        self._pending: dict[str, Tensor] = {}  # and on the device
        self._curve: list[dict[str, float]] = []
        text = "[bold]{task.description}[/] epoch {task.fields[epoch]}"
        shown = TextColumn("{task.percentage:3.0f}% {task.fields[shown]}")
        self._progress = Progress(
            TextColumn(text), BarColumn(), shown, TimeRemainingColumn(), disable=not world.is_first
        )
        description = f"{config.row} seed {seed}"
        self._task = self._progress.add_task(description, total=epochs * epoch_steps, epoch=1, shown="", start=False)

    # --- where it begins and ends

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> int:
        """The step to go on with: 0, or where the checkpoint was saved, whose state the three then have.

        Raises:
            UserError: the checkpoint is of another config; there is one, and the job is no resumption; the run's folder
                cannot be written.
        """
        self._model, self._optimizer, self._scaler = model, optimizer, scaler
        self._finite = FiniteCheck(model, gradients=not scaler.is_enabled())
        _make(self._job.folder)
        path = self._job.folder / "checkpoint.safetensors"
        if not self._job.resume:
            if path.exists():
                raise UserError(f"{path} exists: go on with --resume, or choose another --out")
            return 0
        if not path.exists():
            return 0
        weights, training = checkpoint.load(path)
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
        scaler.load_state_dict(training["scaler"])
        sdgp.chooser.load_state_dict(training["products"])
        self._totals, self._epoch, self._curve = training["totals"], training["epoch"], training["curve"]
        if self._world.is_first:  # a line may have been written just before a crash, its checkpoint not
            _write_lines(self._job.folder / "metrics.jsonl", self._curve)
        step: int = training["step"]
        self._progress.update(self._task, completed=step)
        return step

    def __enter__(self) -> Run:
        self._stop = Stop(self._world)
        self._progress.start()
        self._progress.start_task(self._task)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._stop.close()

    # --- around the steps

    def steps(self, step: int, batches: Iterable[_Batch]) -> Iterator[tuple[int, _Batch]]:
        """(step, batch), seeded: all that is random in a step depends on seed, process and step. Times it all."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            # Augmentation belongs to the step, so the seed stands before the batch is made.
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

    def after_backward(self, step: int, loss: Tensor) -> None:
        """Between backward and the optimizer's step: notes what is not finite."""
        self._finite.update(step, loss)

    def after_step(self, step: int, epoch: int, units: int, **sums: Tensor) -> bool:
        """Counts a step's images or tokens and what is summed over them (loss, top1). True: told to stop, and saved."""
        self._totals["units"] += units * self._world.size
        self._epoch["units"] = self._epoch.get("units", 0) + units
        for name, value in sums.items():
            value = value.detach().double()
            self._pending[name] = self._pending[name] + value if name in self._pending else value
        self._show(step + 1, epoch)
        if (step + 1) % self._epoch_steps == 0 or not self._stop.asked(step + 1):  # after_epoch asks after the last
            return False
        self._finite.check()
        self._save(step + 1)
        self._say_stopped(step + 1)
        return True

    def after_epoch(self, step: int, epoch: int, **metrics: float) -> bool:
        """Writes the epoch's line, with what was summed in its steps, and a checkpoint. True: told to stop."""
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
        if epoch + 1 == self._epochs or not self._stop.asked(0):
            return False
        self._say_stopped(step)
        return True

    def finish(self, recipe: str, **result: Any) -> None:
        """Writes the run's result line to its folder, and appends it to the results, unless either has it."""
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
        try:  # after the other, which says what to append if this is never reached
            append_line(results, kept.read_text().rstrip("\n"))
        except OSError as error:
            raise UserError(
                f"--results: expected a file that can be written, got {results}: {error.strerror}; {kept} has the "
                "line, and --resume appends it"
            ) from None

    @property
    def last(self) -> dict[str, float]:
        """The line of the last epoch."""
        return self._curve[-1]

    # --- inside

    def _say_stopped(self, step: int) -> None:
        if self._world.is_first:
            self._progress.console.print(f"stopped after step {step}; go on with --resume")

    @property
    def _speed(self) -> float:
        return self._totals["units"] / max(self._totals["seconds"], 1e-9)

    @property
    def _waiting(self) -> float:
        """The share of the time in which the next batch was waited for."""
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
        frozen = _is_partly_frozen(self._model)  # of what is frozen, the checkpoint needs nothing
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
    """A checkpoint is contiguous; an unbroken run's buffers are laid out as their parameters, and so round alike."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _make(folder: Path) -> None:
    """Before the first step, not after the first epoch."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".tmp").touch()
        (folder / ".tmp").unlink(missing_ok=True)  # another process of the run may have been faster
    except OSError as error:
        raise UserError(f"--out: expected a folder that can be written, got {folder}: {error.strerror}") from None


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    try:
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror}; the last checkpoint stays") from None


def _layers(model: nn.Module) -> dict[str, int]:
    """How many layers prune, and in how many the last data gradient was a sparse product."""
    products = [row.product for row in sdgp.report(model) if row.gradient == "data"]
    pruned = sum(product not in ("plain", "exact") for product in products)  # one without a backward so far has none
    return {"pruned": pruned, "sparse": products.count("sparse")}


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

# SPDX-License-Identifier: BSD-3-Clause
"""The files of a run: its checkpoint, a JSON line per epoch, and one for the result.

runs/<recipe>/<config>/seed0/checkpoint.safetensors   saved after each epoch, and when a signal stops the run
runs/<recipe>/<config>/seed0/metrics.jsonl            one line per epoch
runs/<recipe>.jsonl                                   one line per finished run; recipes/report.py reads it
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import sdgp
from sdgp._machine import machine

from . import checkpoint
from .config import difference
from .errors import UserError
from .files import append_line, replacing
from .process import World
from .settings import Settings

ROOT = Path(__file__).parents[2]
_MEASURED = ("CMakeLists.txt", "cpp", "cuda", "python", "recipes/*.py")
_SAVED = {"config", "seed", "data", "plan", "world"}  # what must be as it was
_SAVED |= {"step", "optimizer", "scaler", "products", "totals", "epoch", "curve"}

Curve = list[dict[str, float]]  # a line per epoch


class Job(NamedTuple):
    """The files of a run, and whether the run resumes from them."""

    folder: Path  # the folder for its checkpoint and metrics
    results: Path  # the file for its result line
    resume: bool


class Record:
    """Reads and writes the files of one run. Only the first process writes."""

    def __init__(self, job: Job, config: Settings, seed: int, data: str, world: World) -> None:
        self._job, self._config, self._world = job, config, world
        self._settings = dataclasses.asdict(config)
        # What a resumed run must have in common with the one that it continues. The plan's file may change meanwhile.
        self._same = {"seed": seed, "data": data, "plan": config.read_plan(), "world": world.size}
        self._checkpoint = job.folder / "checkpoint.safetensors"

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> dict[str, Any] | None:
        """Restores the state of a run from its checkpoint, if the job resumes one. Returns what ``save`` was told.

        Raises:
            UserError: if the checkpoint has another config or number of processes, a checkpoint exists but the job does
                not resume, or the run's folder is not writable.
        """
        _make(self._job.folder)
        path = self._checkpoint
        if not self._job.resume and path.exists():
            raise UserError(f"{path} exists: go on with --resume, or choose another --out")
        if not path.exists():
            if self._world.is_first:  # of a run whose checkpoint was deleted
                (self._job.folder / "result.json").unlink(missing_ok=True)
            return None
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
        for name in ("seed", "data", "plan"):
            if training[name] != self._same[name]:
                raise UserError(f"--resume: expected the {name} of {path}, {training[name]}, got {self._same[name]}")
        checkpoint.check_names("--resume", model, weights)
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
        self.write_curve(training["curve"])  # a crash may have come between a line and its checkpoint
        return training

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        counted: Mapping[str, Any],
    ) -> None:
        """Writes the checkpoint. Every process must call this method.

        Args:
            counted: the step and what the run has counted: ``totals``, ``epoch``, ``curve``
                and ``budget``.
        """
        frozen = _is_partly_frozen(model)  # the checkpoint does not need frozen parameters
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=frozen)
        weights, state = get_state_dict(model, optimizer, options=options)
        if not self._world.is_first:
            return
        training = {
            "config": self._settings,
            **self._same,
            "optimizer": state,
            "scaler": scaler.state_dict(),
            "products": sdgp.chooser.state_dict(),
            **counted,
        }
        checkpoint.save(self._checkpoint, cast(dict[str, Tensor], weights), training)

    def write_curve(self, curve: Curve) -> None:
        if self._world.is_first:
            _write_lines(self._job.folder / "metrics.jsonl", curve)

    def finish(self, model: nn.Module, recipe: str, result: Mapping[str, Any], curve: Curve) -> None:
        """Writes the result line to the run's folder and to the results file, unless they already have it."""
        line = {
            "recipe": recipe,
            "row": self._config.row,
            "seed": self._same["seed"],
            "data": self._same["data"],
            **result,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "layers": _layers(model),
            "processes": self._world.size,
            "device": _device(self._world.device),
            "machine": machine(ROOT, *_MEASURED),
            "config": self._settings,
            **({} if self._same["plan"] is None else {"plan": self._same["plan"]}),
            "curve": curve,
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

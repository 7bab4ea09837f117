# SPDX-License-Identifier: BSD-3-Clause
"""The tasks of the study, and the arms of each: plain runs of several lengths and batches, and pruned ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cifar10 import data as cifar10_data
from ..cifar10 import train as cifar10
from ..cifar10.config import Config as Cifar10Config
from ..common.images import is_pruned
from ..common.process import World
from ..common.run import Job
from ..common.settings import Settings

_ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"

#: Settings of one run, over the task's own.
Overrides = Mapping[str, Any]


class Parts(NamedTuple):
    """What a recipe trains, for those who measure steps of it.

    Attributes:
        batches: as the recipe draws them, (input, target); without end.
        is_pruned: whether the recipe prunes a layer, from module and name.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Iterator[tuple[Tensor, Tensor]]
    is_pruned: Callable[[nn.Module, str], bool]


class Task(NamedTuple):
    """One model, data set and recipe.

    Attributes:
        name: the first part of the names of its results.
        config: the type of the recipe's settings.
        base: the settings of the full plain run.
        load, train: the recipe's functions.
        parts: of the plain run, from settings, data and world; the loss is the cross-entropy of the model's output.
        shorter: the settings of a plain run at this share of the epochs; the schedule is always a whole one.
        pruned: (data gradient, weight gradient) of the pruned runs; ``""``: exact.
    """

    name: str
    config: type[Settings]
    base: Overrides
    load: Callable[[Any, Path | None, World], Any]
    train: Callable[[Any, Any, int, World, Job], None]
    parts: Callable[[Any, Any, World], Parts]
    shorter: Callable[[float], Overrides]
    lengths: tuple[float, ...]
    batches: tuple[float, ...]
    pruned: tuple[tuple[str, str], ...]

    def arms(self) -> list[Overrides]:
        """The settings of every run, the full plain one first."""
        size = self.base["batch_size"]
        arms: list[Overrides] = [{}, *({"plan": str(path), "backend": "pruned"} for path in self.plans())]
        arms += [self.shorter(length) for length in self.lengths]
        arms += [{**self.shorter(part), "batch_size": round(size * part)} for part in self.batches]
        arms += [{"method": "mvue", "pattern": data, "weight_grad": weight} for data, weight in self.pruned]
        arms.append({"method": "rescale", "pattern": "2:4"})
        return arms

    def plans(self) -> list[Path]:
        """What ``sdgp.advise`` proposed, on each machine, as files from the repository's folder on."""
        return [path.relative_to(_ROOT) for path in sorted(RESULTS.glob(f"{self.name}-plan-*.json"))]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    input, target = batch
    return F.cross_entropy(model(input), target)


def _resnet9_parts(config: Cifar10Config, data: cifar10_data.Cifar, world: World) -> Parts:
    torch.manual_seed(0)
    model = cifar10.prepare(config, world)
    optimizer = torch.optim.SGD(model.parameters(), 0.0, config.momentum, weight_decay=config.weight_decay)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in range(10**9):
            yield from cifar10.batches(data.train, config, 0, epoch, 0, world)

    return Parts(model, optimizer, batches(), is_pruned)


_RESNET9 = {
    "width": 32,
    "epochs": 8,
    "epoch_images": 6400,
    "validate_every": 1000,
    "batch_size": 128,
    "lr": 0.2,
    "peak_epoch": 2.0,
    "label_smoothing": 0.0,
    "cutout": 0,
    "amp": "off",
}

TASKS = {
    "resnet9": Task(
        "resnet9",
        Cifar10Config,
        _RESNET9,
        cifar10_data.load,
        cifar10.train,
        _resnet9_parts,
        lambda share: {"epochs": round(8 * share), "peak_epoch": 2.0 * share},
        lengths=(0.875, 0.75, 0.625),
        batches=(0.875, 0.75),
        pruned=(("8:16", "8:16"), ("4:16", "8:16"), ("8:16", "4:16"), ("4:16", "4:16")),
    ),
}

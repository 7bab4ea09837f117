# SPDX-License-Identifier: BSD-3-Clause
"""What a recipe consists of, and what all recipes do with it: train one run, and evaluate a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import load_weights
from .process import World
from .record import Job
from .run import Forward, MicroBatches, Run
from .settings import Settings


@dataclass(frozen=True)
class Recipe:
    """The parts of a recipe. ``launch`` gives it a command line, and the study measures its steps.

    The config of all functions is an instance of ``config``, and the data is what ``load`` returned.

    Attributes:
        name: the name of its results.
        config: the type of its settings.
        metrics: the values of ``validate`` that are the result of a run: ``top1`` or ``bits_per_byte`` first, and the
            one that the study compares last.
        load: from config, the path that ``--data`` names, and world: the data, whose ``name`` is in the results.
        prepare: from config, data and world: the model, converted as the config says, and sharded if need be. The
            generator has the seed of the run.
        is_pruned: from config, module and name: whether the recipe prunes this layer.
        make_optimizer: from model and config: the optimizer.
        steps: from config, data and world: the number of steps per epoch.
        batches: from config, data, seed, epoch, first step of the epoch and world: the micro-batches of each step, up
            to the end of the epoch. They may use the global generator, which has a seed of its own in each step.
        forward: from config: the function that computes the loss of a micro-batch.
        validate: from model, data, config, world and the epoch that has ended: the values for the epoch's line, over
            all processes. After the last epoch these include ``metrics``. It calls ``model.eval()``.
    """

    name: str
    config: type[Settings]
    metrics: tuple[str, ...]
    load: Callable[[Any, Path | None, World], Any]
    prepare: Callable[[Any, Any, World], nn.Module]
    is_pruned: Callable[[Any, nn.Module, str], bool]
    make_optimizer: Callable[[nn.Module, Any], torch.optim.Optimizer]
    steps: Callable[[Any, Any, World], int]
    batches: Callable[[Any, Any, int, int, int, World], Iterator[MicroBatches]]
    forward: Callable[[Any], Forward]
    validate: Callable[[nn.Module, Any, Any, World, int], Mapping[str, float]]

    def train(self, config: Any, data: Any, seed: int, world: World, job: Job) -> None:
        """Trains one run to its result line."""
        steps = self.steps(config, data, world)
        torch.manual_seed(seed)
        model = self.prepare(config, data, world)
        run = Run(job, config, seed, data.name, world, model, self.make_optimizer(model, config), steps)
        run.fit(
            batches=lambda epoch, first: self.batches(config, data, seed, epoch, first, world),
            forward=self.forward(config),
            validate=lambda epoch: self.validate(model, data, config, world, epoch),
        )
        run.finish(self.name, *self.metrics)

    def evaluate(self, config: Any, data: Any, world: World, weights: dict[str, Tensor]) -> str:
        """Evaluates the weights of a checkpoint. Returns a text to print."""
        plain = dataclasses.replace(config, method="plain", plan="", weight_grad="", budget=0)
        model = self.prepare(plain, data, world)
        load_weights(model, weights)
        values = self.validate(model, data, config, world, config.epochs - 1)
        return ", ".join(f"{name} {value:.5g}" for name, value in values.items()) + f" ({data.name})"

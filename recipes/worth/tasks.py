# SPDX-License-Identifier: BSD-3-Clause
"""The tasks of the study and the arms of each: plain runs with several lengths and batch sizes, and pruned runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..cifar10 import train as cifar10
from ..common.recipe import Recipe
from ..lm import classify, gpt, lora

_ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"

EXACT_START = 0.25  # the share of the steps that are exact at the start of a run, while pruning costs most

#: The settings of one run that differ from the settings of the task.
Overrides = Mapping[str, Any]


class Task(NamedTuple):
    """One model, data set and recipe.

    Attributes:
        name: the first part of the names of its result files.
        base: the settings of the full plain run.
        data: the default path of the data.
        metric: the key of the test loss in a result line.
        samples: the number of samples that a run with the given settings uses.
        shorter: the settings of a plain run with this share of the epochs and a complete schedule.
        smaller: the settings of a plain run with the same number of steps and this share of the batch size.
        lengths, batches: the shares for ``shorter`` and ``smaller``.
        pruned: the patterns (data gradient, weight gradient) of the pruned runs; ``""`` means exact.
        budget: the steps between two calls for advice in the run with ``sdgp.Budget``; 0: there is no such run.
    """

    name: str
    recipe: Recipe
    base: Overrides
    data: Path | None
    metric: str
    samples: Callable[[Any], int]
    shorter: Callable[[float], Overrides]
    smaller: Callable[[float], Overrides]
    lengths: tuple[float, ...]
    batches: tuple[float, ...]
    pruned: tuple[tuple[str, str], ...]
    budget: int = 0

    def config(self, **overrides: Any) -> Any:
        """Returns the settings of the run with these overrides."""
        return self.recipe.config(**{**self.base, **overrides})

    def arms(self, results: Path | None = None) -> list[Overrides]:
        """Returns the settings of every run. The full plain run comes first.

        Runs with a plan or a pattern come in pairs: with an exact start, and pruned from the first step.

        Args:
            results: the folder with the plans. Default: the study's.
        """
        plans: list[Overrides] = [{"plan": str(path), "backend": "pruned"} for path in self.plans(results or RESULTS)]
        patterns: list[Overrides] = [
            {"method": "mvue", "pattern": data, "weight_grad": weight} for data, weight in self.pruned
        ]
        start = {"exact_first": round(EXACT_START * self.base["epochs"])}
        return [
            {},
            *(arm for plan in plans for arm in ({**plan, **start}, plan)),
            *([{"budget": self.budget}] if self.budget else []),
            *map(self.shorter, self.lengths),
            *map(self.smaller, self.batches),
            *(arm for pattern in patterns for arm in ({**pattern, **start}, pattern)),
            {"method": "rescale", "pattern": "2:4"},  # the published method
        ]

    def plans(self, results: Path) -> list[Path]:
        """Returns the files with the plans of ``sdgp.advise`` on each machine.

        Paths inside the repository are relative to it.
        """
        paths = (Path(os.path.abspath(path)) for path in sorted(results.glob(f"{self.name}-plan-*.json")))
        return [path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path for path in paths]


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
_VIT = _RESNET9 | {"net": "vit", "width": 128, "lr": 2e-3, "weight_decay": 0.05, "clip": 1.0}
_GPT = {"size": "small", "epochs": 8, "epoch_steps": 50, "batch_size": 16, "lr": 2e-3, "validation_bytes": 2**16}
_GPT_BFLOAT16 = _GPT | {"size": "medium", "epoch_steps": 40, "lr": 1e-3, "amp": "bfloat16"}
_FINE_TUNING = {
    "model": "runs/worth/gpt/seed0/checkpoint.safetensors",  # the plain run of the task "gpt"
    "epochs": 8,
    "epoch_steps": 25,
    "batch_size": 16,
    "warmup": 1.0,
    "validation_bytes": 2**16,
}
_LORA = _FINE_TUNING | {"rank": 8, "lr": 3e-3}
_CLASSIFY = _FINE_TUNING | {"epoch_steps": 12, "lr": 1e-3}


def _text_task(
    name: str,
    recipe: Recipe,
    base: Overrides,
    data: Path | None,
    pruned: tuple[tuple[str, str], ...],
    shares: tuple[float, ...] = (0.875, 0.75),
) -> Task:
    """A task of a language model: eight epochs, and the given shares of the steps and of a batch of 16."""
    return Task(
        name,
        recipe,
        base,
        data,
        recipe.metrics[-1],
        lambda config: config.epochs * config.epoch_steps * config.batch_size,
        lambda share: {"epochs": round(8 * share), "warmup": share},
        lambda share: {"batch_size": round(16 * share)},
        lengths=shares,
        batches=shares,
        pruned=pruned,
    )


def _cifar10_task(name: str, base: Overrides, budget: int = 0) -> Task:
    return Task(
        name,
        cifar10.RECIPE,
        base,
        None,
        "test_loss",
        lambda config: config.epochs * config.epoch_images,
        lambda share: {"epochs": round(8 * share), "peak_epoch": 2.0 * share},
        lambda share: {"epochs": round(8 * share), "peak_epoch": 2.0 * share, "batch_size": round(128 * share)},
        lengths=(0.875, 0.75, 0.625),
        batches=(0.875, 0.75),
        pruned=(("8:16", "8:16"), ("4:16", "8:16"), ("8:16", "4:16"), ("4:16", "4:16")),
        budget=budget,
    )


def _classify_task(name: str, base: Overrides) -> Task:
    return _text_task(
        name, classify.RECIPE, base, None, (("8:16", "8:16"), ("4:16", "4:16")), shares=(0.875, 0.75, 0.625)
    )


def _lora_task(name: str, base: Overrides) -> Task:
    text = Path(torch.__file__).parent / "include" / "torch"
    return _text_task(name, lora.RECIPE, base, text, (("8:16", ""), ("4:16", "")))


TASKS = {
    "resnet9": _cifar10_task("resnet9", _RESNET9),
    "resnet9_bfloat16": _cifar10_task("resnet9_bfloat16", _RESNET9 | {"amp": "bfloat16"}, budget=100),
    "vit": _cifar10_task("vit", _VIT),
    "vit_bfloat16": _cifar10_task("vit_bfloat16", _VIT | {"amp": "bfloat16"}),
    "gpt": _text_task("gpt", gpt.RECIPE, _GPT, None, (("8:16", "8:16"), ("4:16", "4:16"))),
    "gpt_bfloat16": _text_task("gpt_bfloat16", gpt.RECIPE, _GPT_BFLOAT16, None, ()),
    "lora": _lora_task("lora", _LORA),
    "lora_bfloat16": _lora_task("lora_bfloat16", _LORA | {"amp": "bfloat16"}),
    "classify": _classify_task("classify", _CLASSIFY),
    "classify_bfloat16": _classify_task("classify_bfloat16", _CLASSIFY | {"amp": "bfloat16"}),
}

# SPDX-License-Identifier: BSD-3-Clause
"""Fine-tunes a GPT to tell which class of text a sequence of bytes is from, and prunes the gradients in its blocks.

    python -m recipes.lm.classify recipes/pruning/mvue_2_4.toml --set model=CHECKPOINT
    python -m recipes.lm.classify recipes/pruning/mvue_2_4.toml --set model=CHECKPOINT --data DIR

CHECKPOINT: a checkpoint.safetensors of recipes.lm.gpt; without it the weights are random. Each folder in DIR is a
class. Without DIR the classes are the eight largest packages of Python's standard library (PSF-2.0). One in twenty
parts of each class is for validation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.config import Count, NonNegative
from ..common.launch import launch
from ..common.process import World
from ..common.recipe import Recipe
from ..common.run import classify
from ..common.transformer import decay_matrices
from . import gpt
from .text import Classes, TextSettings, epoch_steps, load_classes


@dataclass(frozen=True)
class Config(TextSettings):
    model: str = ""  # a checkpoint of recipes.lm.gpt; "": random weights
    size: Literal["tiny", "small"] = "tiny"  # the size of the model with random weights
    epochs: Count = 4
    epoch_steps: Count = 50
    lr: NonNegative = 1e-3
    warmup: NonNegative = 0.5
    weight_decay: NonNegative = 0.1
    unit = "sequences"


class Classifier(nn.Module):
    """A linear layer on the mean of a GPT's features over all positions."""

    def __init__(self, body: gpt.GPT, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(body.norm.normalized_shape[0], classes)

    def forward(self, text: Tensor) -> Tensor:
        """Returns scores, (batch, classes), of bytes, (batch, context)."""
        scores: Tensor = self.head(self.body.features(text).mean(1))
        return scores


def is_pruned(config: Config, module: nn.Module, name: str) -> bool:
    return name.rpartition(".")[2] in gpt.PRUNED["all"]


def prepare(config: Config, classes: Classes, world: World) -> nn.Module:
    if config.model:
        body = gpt.from_checkpoint(config.model, config.context)
    else:
        body = gpt.GPT(*gpt.SIZES[config.size], config.context)
    return config.convert(Classifier(body, len(classes.texts)).to(world.device), partial(is_pruned, config))


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    return torch.optim.AdamW(decay_matrices(model, config.weight_decay), config.lr)


def load(config: Config, path: Path | None, world: World) -> Classes:
    return load_classes(path, config.context + 1)


def batches(
    config: Config, classes: Classes, seed: int, epoch: int, first: int, world: World
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yields this process's micro-batches of each step of an epoch from step ``first`` on.

    They are random sequences of random classes, and the classes, and depend on the seed of the generator alone, which
    ``Run`` sets for each step.
    """
    lengths = torch.tensor([len(text.train) for text in classes.texts])
    firsts, joined = lengths.cumsum(0) - lengths, torch.cat([text.train for text in classes.texts])
    offsets, shape = torch.arange(config.context), (config.accumulate, config.sequences(world))
    for _ in range(first, config.epoch_steps):
        labels = torch.randint(len(classes.texts), shape)
        starts = firsts[labels] + (torch.rand(shape) * (lengths[labels] - config.context)).long()
        inputs = joined[starts.unsqueeze(-1) + offsets].long().to(world.device, non_blocking=True)
        yield list(zip(inputs, labels.to(world.device, non_blocking=True), strict=True))


@torch.no_grad()
def validate(model: nn.Module, classes: Classes, config: Config, world: World, epoch: int) -> dict[str, float]:
    """Returns top-1 in percent and the cross-entropy, each the mean over the classes."""
    model.eval()
    most = max(1, config.validation_bytes // len(classes.texts) // config.context)  # sequences per class
    sums = torch.zeros(2, device=world.device)
    for label in range(world.rank, len(classes.texts), world.size):
        windows = (
            classes.texts[label].validation.unfold(0, config.context, config.context)[:most].long().to(world.device)
        )
        with config.autocast(world.device):
            scores = model(windows).float()
        labels = torch.full((len(windows),), label, device=world.device)
        sums += torch.stack([(scores.argmax(1) == labels).float().mean(), F.cross_entropy(scores, labels)])
    hits, loss = (world.sum(sums) / len(classes.texts)).tolist()
    return {"top1": 100 * hits, "test_loss": loss}


RECIPE = Recipe(
    name="classify",
    config=Config,
    metrics=("top1", "test_loss"),
    load=load,
    prepare=prepare,
    is_pruned=is_pruned,
    make_optimizer=make_optimizer,
    steps=epoch_steps,
    batches=batches,
    forward=lambda config: classify,
    validate=validate,
)

main = partial(launch, RECIPE, __doc__)

if __name__ == "__main__":
    main()

# SPDX-License-Identifier: BSD-3-Clause
"""Trains a GPT on bytes from scratch, with pruned data gradients in all linear layers of its blocks.

    python -m recipes.lm.gpt recipes/pruning/mvue_2_4.toml
    python -m recipes.lm.gpt recipes/pruning/mvue_2_4.toml recipes/lm/configs/gpt2.toml --data TEXT
    torchrun --nproc-per-node 8 -m recipes.lm.gpt recipes/pruning/mvue_2_4.toml --set size=gpt2 --set shard=true

Without --data it trains on the source of Python's standard library (PSF-2.0), which every Python has. An epoch is
``epoch_steps`` steps and a validation in bits per byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ..common import checkpoint
from ..common.config import NonNegative
from ..common.errors import UserError
from ..common.launch import launch
from ..common.process import World
from ..common.recipe import Recipe
from ..common.run import Forward, Measured
from ..common.transformer import Block, decay_matrices
from .text import Text, TextSettings, batches, epoch_steps, load_text, mean_loss

SIZES = {  # layers, heads, width
    "tiny": (6, 4, 128),
    "small": (4, 4, 256),
    "medium": (4, 8, 512),
    "wide": (2, 32, 4096),  # layers as large as those of an 8 B model
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


@dataclass(frozen=True)
class Config(TextSettings):
    """The settings of the recipe. The defaults are for a CPU; configs/gpt2.toml is for a GPU."""

    size: Literal["tiny", "small", "medium", "wide", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "tiny"
    layers: Literal["all", "attention", "mlp"] = "all"  # the layers of the blocks that prune
    weight_decay: NonNegative = 0.1
    beta2: Annotated[float, 0, 0.999999] = 0.95  # AdamW refuses 1
    shard: bool = False  # FSDP2 instead of DDP

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers != "all" and (self.plan or self.budget):
            raise UserError(f"config: expected layers = all with a plan or a budget, got layers = {self.layers}")


class GPT(nn.Module):
    """A model with the layout of GPT-2 over 256 byte values. The head and the embedding share one weight."""

    def __init__(self, layers: int, heads: int, width: int, context: int) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(heads, width, causal=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                ends_branch = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if ends_branch else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def features(self, text: Tensor) -> Tensor:
        """Returns (batch, context, width) for bytes, (batch, context)."""
        x = self.bytes(text) + self.positions.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        normalized: Tensor = self.norm(x)
        return normalized

    def forward(self, text: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss in nats. Both arguments are (batch, context)."""
        scores = F.linear(self.features(text), self.bytes.weight)
        return F.cross_entropy(scores.flatten(0, 1).float(), targets.flatten())


def from_checkpoint(path: str, context: int | None = None) -> GPT:
    """Loads the model from a checkpoint of this recipe.

    Args:
        context: the context that it must have been trained with. Default: any.

    Raises:
        UserError: if the file is no such checkpoint, or was trained with another context.
    """
    weights, training = checkpoint.load(Path(path))
    try:
        trained = training["config"]
        model = GPT(*SIZES[trained["size"]], context or trained["context"])
        model.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"checkpoint: expected one of recipes.lm.gpt, got {path}: {error}") from None
    return model


PRUNED = {"all": ("qkv", "out", "up", "down"), "attention": ("qkv", "out"), "mlp": ("up", "down")}


def is_pruned(config: Config, module: nn.Module, name: str) -> bool:
    return name.rpartition(".")[2] in PRUNED[config.layers]


@torch.no_grad()
def validate(model: nn.Module, text: Text, config: Config, world: World, epoch: int) -> dict[str, float]:
    """Returns the loss in bits per byte over the first ``validation_bytes``."""
    model.eval()
    first = text.validation[: config.validation_bytes + 1]
    return {"bits_per_byte": mean_loss(model, first, config, world, batch=64) / math.log(2)}


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    return torch.optim.AdamW(decay_matrices(model, config.weight_decay), config.lr, (0.9, config.beta2))


def prepare(config: Config, text: Text, world: World) -> nn.Module:
    model = GPT(*SIZES[config.size], config.context).to(world.device)
    config.convert(model, partial(is_pruned, config))
    if config.shard and world.size > 1:
        dtype = None if config.amp == "off" else torch.bfloat16
        for part in (*model.blocks, model):
            fully_shard(part, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    return model


def load(config: Config, path: Path | None, world: World) -> Text:
    return load_text(path, config.context + 1)


def forward(config: Config) -> Forward:
    return lambda model, tokens, targets: Measured(model(tokens, targets), tokens.numel(), {})


RECIPE = Recipe(
    name="gpt",
    config=Config,
    metrics=("bits_per_byte",),
    load=load,
    prepare=prepare,
    is_pruned=is_pruned,
    make_optimizer=make_optimizer,
    steps=epoch_steps,
    batches=batches,
    forward=forward,
    validate=validate,
)

main = partial(launch, RECIPE, __doc__)

if __name__ == "__main__":
    main()

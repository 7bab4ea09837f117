# SPDX-License-Identifier: BSD-3-Clause
"""Fine-tunes a causal language model of transformers with LoRA, and prunes data gradients in its frozen linear layers.

    python -m recipes.lm.lora recipes/pruning/mvue_2_4.toml --set model=DIR_OR_NAME --data TEXT
    python -m recipes.lm.lora recipes/pruning/mvue_2_4.toml
    torchrun --nproc-per-node 2 -m recipes.lm.lora recipes/pruning/mvue_2_4.toml --set model=DIR_OR_NAME --data TEXT

DIR_OR_NAME: an argument of from_pretrained (safetensors only, no code of the model runs), or a checkpoint.safetensors
of recipes.lm.gpt. Without a model the recipe builds a Llama over bytes with random weights (``size``). It shows the
speed, but not the quality of fine-tuning. The base weights are frozen and have no gradient, so the data gradient is
half of all products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from ..common.config import Count, NonNegative
from ..common.errors import UserError
from ..common.launch import launch
from ..common.process import World
from ..common.recipe import Recipe
from ..common.run import Forward, Measured
from . import gpt
from .text import Text, TextSettings, batches, epoch_steps, load_text, mean_loss

SIZES = {  # layers, heads, key and value heads, width, inner width
    "tiny": (4, 4, 2, 256, 688),
    "llama-1b": (16, 32, 8, 2048, 8192),
}


@dataclass(frozen=True)
class Config(TextSettings):
    model: str = ""  # a model of transformers, or a checkpoint of recipes.lm.gpt; "": random weights
    size: Literal["tiny", "llama-1b"] = "tiny"  # the size of the model with random weights
    rank: Count = 8
    alpha: int = 16
    epochs: Count = 4
    epoch_steps: Count = 50
    batch_size: Count = 16  # sequences, over all processes
    lr: NonNegative = 1e-3
    warmup: NonNegative = 0.5


def is_pruned(config: Config, module: nn.Module, name: str) -> bool:
    """Whether a layer is pruned: adapters, which are small, and the head are not."""
    return "lora_" not in name and "lm_head" not in name


def _pretrained(kind: Any, config: Config, **options: Any) -> Any:
    try:
        return kind.from_pretrained(config.model, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"config: expected a causal language model and its tokenizer, got model={config.model!r}: {reason}"
        ) from None


def _is_gpt(config: Config) -> bool:
    return config.model.endswith(".safetensors")


def _make_base(config: Config) -> nn.Module:
    if _is_gpt(config):
        return gpt.from_checkpoint(config.model, config.context)
    if config.model:
        options = {"use_safetensors": True, "dtype": torch.float32, "attn_implementation": "sdpa"}
        base: nn.Module = _pretrained(transformers.AutoModelForCausalLM, config, **options)
        return base
    layers, heads, key_heads, width, inner = SIZES[config.size]
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            max_position_embeddings=config.context,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def prepare(config: Config, text: Text, world: World) -> nn.Module:
    targets, kind = (list(gpt.PRUNED["all"]), None) if _is_gpt(config) else ("all-linear", "CAUSAL_LM")
    adapters = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, task_type=kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same base for every seed
        model = peft.get_peft_model(_make_base(config), adapters)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))  # again, because peft used the seed of the base
    return config.convert(model.to(world.device), partial(is_pruned, config))


def load(config: Config, path: Path | None, world: World) -> Text:
    """Loads the text as tokens of the model."""
    text = load_text(path, config.context + 1)
    validation = text.validation[: config.validation_bytes]
    if not config.model or _is_gpt(config):
        return text._replace(validation=validation)
    tokenizer = _pretrained(transformers.AutoTokenizer, config)

    def tokens(part: Tensor) -> Tensor:
        return torch.tensor(tokenizer(bytes(part.tolist()).decode(errors="replace"))["input_ids"])

    train, held_out = tokens(text.train), tokens(validation)
    if min(len(train), len(held_out)) <= config.context:
        raise UserError(
            f"--data: expected more than context = {config.context} tokens to train on and to validate with, got "
            f"{len(train)} and {len(held_out)} in {text.name}"
        )
    return Text(text.name, train, held_out, len(validation))


def _mean_loss(config: Config, model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean loss in nats. ``tokens`` and ``targets`` are (batch, context)."""
    if _is_gpt(config):
        loss: Tensor = model(tokens, targets)
        return loss
    scores: Tensor = model(input_ids=tokens, use_cache=False).logits
    return F.cross_entropy(scores.flatten(0, 1).float(), targets.flatten())


def forward(config: Config) -> Forward:
    return lambda model, tokens, targets: Measured(_mean_loss(config, model, tokens, targets), tokens.numel(), {})


@torch.no_grad()
def validate(model: nn.Module, text: Text, config: Config, world: World, epoch: int) -> dict[str, float]:
    model.eval()
    per_token = mean_loss(partial(_mean_loss, config, model), text.validation, config, world, batch=16) / math.log(2)
    return {"bits_per_byte": per_token * len(text.validation) / (text.validation_bytes or len(text.validation))}


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Returns AdamW for the adapters."""
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return torch.optim.AdamW(trained, config.lr, weight_decay=0.0)


RECIPE = Recipe(
    name="lora",
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

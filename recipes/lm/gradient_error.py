# SPDX-License-Identifier: BSD-3-Clause
"""Measures the error of pruning in the data gradient of each layer of a GPT on one batch, relative to the exact norm.

python -m recipes.lm.gradient_error runs/gpt/plain/seed0/checkpoint.safetensors
python -m recipes.lm.gradient_error                                                # of an untrained network
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sdgp

from ..common import checkpoint
from ..common.errors import UserError
from ..common.process import World
from .gpt import Config, is_pruned, prepare
from .text import Text, batches, load_text

COLUMNS = (("2:4", "mvue"), ("4:8", "mvue"), ("4:32", "mvue"), ("2:4", "magnitude"), ("2:4", "rescale"))


def gradients(model: nn.Module, config: Config, text: Text, world: World) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns for each layer its output gradient, (batch, context, out), and its weight, (out, in)."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    names = {layer: name for name, layer in model.named_modules() if is_pruned(config, layer, name)}

    def keep(layer: nn.Module, inputs: object, outputs: Any) -> None:
        assert isinstance(layer, nn.Linear)
        found[names[layer]] = outputs[0].detach(), layer.weight.detach()

    for layer in names:
        layer.register_full_backward_hook(keep)
    ((batch,), *_) = batches(config, text, 0, 0, config.epoch_steps - 1, world)
    model(*batch).backward()
    return found


def error(gradient: Tensor, weight: Tensor, pattern: str, method: str) -> float:
    """Returns the relative error ||prune(dy) W - dy W|| / ||dy W||."""
    exact = gradient @ weight
    n, m = sdgp.Pattern.parse(pattern)
    return float((sdgp.prune_nm(gradient, n, m, -1, method) @ weight - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--data", type=Path, help="a text file; default: the Python standard library")
    args = parser.parse_args()
    torch.manual_seed(0)
    config, world = Config(), World(0, 1, torch.device("cpu"))
    try:
        weights, training = (None, {}) if args.checkpoint is None else checkpoint.load(args.checkpoint)
        trained = {key: value for key, value in training.get("config", {}).items() if key in ("size", "context")}
        config = dataclasses.replace(config, **trained)
        text = load_text(args.data, config.context + 1)
        model = prepare(config, text, world)
        if weights is not None:
            model.load_state_dict(weights)
    except (UserError, RuntimeError) as problem:
        sys.exit(f"gradient_error: {problem}")
    print("| layer | " + " | ".join(f"{method} {pattern}" for pattern, method in COLUMNS) + " |")
    print("|---" * (1 + len(COLUMNS)) + "|")
    for name, (gradient, weight) in sorted(gradients(model, config, text, world).items()):
        cells = (f"{error(gradient, weight, pattern, method):.2f}" for pattern, method in COLUMNS)
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

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

from ..common.errors import UserError
from ..common.process import World
from .gpt import GPT, SIZES, Config, from_checkpoint, is_pruned
from .text import Text, batches, load_text

COLUMNS = (("2:4", "mvue"), ("4:8", "mvue"), ("4:32", "mvue"), ("2:4", "magnitude"), ("2:4", "rescale"))


def gradients(model: nn.Module, config: Config, text: Text) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns for each layer its output gradient, (batch, context, out), and its weight, (out, in)."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    names = {layer: name for name, layer in model.named_modules() if is_pruned(config, layer, name)}

    def keep(layer: nn.Module, inputs: object, outputs: Any) -> None:
        assert isinstance(layer, nn.Linear)
        found[names[layer]] = outputs[0].detach(), layer.weight.detach()

    for layer in names:
        layer.register_full_backward_hook(keep)
    one_process = World(0, 1, torch.device("cpu"))
    ((batch,), *_) = batches(config, text, 0, 0, config.epoch_steps - 1, one_process)
    model(*batch).backward()
    return found


def error(gradient: Tensor, weight: Tensor, pattern: str, method: str) -> float:
    """Returns the relative error ||prune(dy) W - dy W|| / ||dy W||."""
    exact = gradient @ weight
    n, m = sdgp.Pattern.parse(pattern)
    return float((sdgp.prune_nm(gradient, n, m, -1, method) @ weight - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--data", type=Path, help="a text file; default: the Python standard library")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = Config()
    try:
        if args.checkpoint is None:
            model = GPT(*SIZES[config.size], config.context)
        else:
            model = from_checkpoint(args.checkpoint)
            config = dataclasses.replace(config, context=len(model.positions.weight))
        text = load_text(args.data, config.context + 1)
    except UserError as problem:
        sys.exit(f"gradient_error: {problem}")
    print("| layer | " + " | ".join(f"{method} {pattern}" for pattern, method in COLUMNS) + " |")
    print("|---" * (1 + len(COLUMNS)) + "|")
    for name, (gradient, weight) in sorted(gradients(model, config, text).items()):
        cells = (f"{error(gradient, weight, pattern, method):.2f}" for pattern, method in COLUMNS)
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

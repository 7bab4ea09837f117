# SPDX-License-Identifier: BSD-3-Clause
"""Runs every recipe at its smallest size from its command line."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"

SMALL = {  # recipe: (module, settings); each run has two epochs of three steps
    "cifar10": ("cifar10.train", "width=4 classes=3 epochs=2 batch_size=8 peak_epoch=1 lr=0.1 amp=off"),
    "imagenet": (
        "imagenet.train",
        "net=resnet18 classes=3 epochs=2 batch_size=8 peak_epoch=1 lr=0.1 amp=off workers=0 "
        "resolution=32 last_resolution=64 grow_from=0 grow_to=1 eval_resolution=32",
    ),
    "gpt": ("lm.gpt", "weight_grad=4:16 epochs=2 epoch_steps=3 batch_size=4 context=16 validation_bytes=512"),
    "lora": ("lm.lora", "epochs=2 epoch_steps=3 batch_size=4 context=16 validation_bytes=512"),
    "classify": ("lm.classify", "epochs=2 epoch_steps=3 batch_size=4 context=16 validation_bytes=512"),
}
IMAGES = ("cifar10", "imagenet")


def command(recipe: str, out: Path, images: Path, *more: str, row: str = "mvue_2_4") -> list[str]:
    module, settings = SMALL[recipe]
    if row == "plain":  # prunes nothing
        settings = settings.replace("weight_grad=4:16 ", "")
    result = [f"recipes.{module}", str(RECIPES / "pruning" / f"{row}.toml"), "--out", str(out)]
    result += ["--data", str(images)] if recipe in IMAGES else []
    return [*result, *(word for setting in settings.split() for word in ("--set", setting)), *more]


def run(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """Runs a recipe in this process, as `python -m` would."""
    monkeypatch.setattr(sys, "argv", words)
    importlib.import_module(words[0]).main()


def fails(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> str:
    """Returns the error message of a recipe that must fail."""
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, words)
    assert isinstance(stopped.value.code, str)
    return stopped.value.code


def saved(out: Path) -> Path:
    (path,) = out.glob("*/*/seed0/checkpoint.safetensors")
    return path


def lines(out: Path) -> list[dict[str, Any]]:
    (path,) = out.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def flat(tree: Any) -> Any:
    """Converts tensors to lists, so that trees can be compared."""
    if isinstance(tree, Tensor):
        return tree.tolist()
    return {key: flat(value) for key, value in tree.items()} if isinstance(tree, dict) else tree

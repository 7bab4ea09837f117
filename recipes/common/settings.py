# SPDX-License-Identifier: BSD-3-Clause
"""What every recipe's config begins with: how to prune, in which epochs, in which precision."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sdgp

from .errors import UserError
from .process import World


@dataclass(frozen=True)
class Settings:
    """The fields that all recipes share; a recipe's config adds its own."""

    method: Literal["plain", "magnitude", "random", "rescale", "rescale_group", "mvue"] = "plain"
    pattern: str = "2:4"
    weight_grad: str = ""  # the pattern of the weight gradients, by mvue; "": exact
    plan: str = ""  # a JSON file with a plan of sdgp.advise; it takes the place of pattern, weight_grad and filter
    backend: Literal["auto", "pruned", "sparse", "dense"] = "pruned"
    exact_first: int = 0  # epochs with exact gradients at the start
    exact_last: int = 0  # and at the end
    amp: Literal["off", "bfloat16", "float16"] = "off"
    compile: bool = False

    @property
    def row(self) -> str:
        """``mvue 2:4``: its row in the tables."""
        if self.plan:
            return f"plan {Path(self.plan).stem}"
        if self.method == "plain":
            return "plain"
        return f"{self.method} {self.pattern}" + (f", weight gradient {self.weight_grad}" if self.weight_grad else "")

    def convert(self, model: nn.Module, filter: Callable[[nn.Module, str], bool]) -> nn.Module:
        """Makes ``model`` prune as the config says; a plain one stays what it is."""
        if self.method == "plain" and not self.plan:
            return model
        try:
            if self.plan:
                return sdgp.convert(model, json.loads(Path(self.plan).read_text()), backend=self.backend)
            return sdgp.convert(
                model,
                self.pattern,
                self.method,
                filter=filter,
                backend=self.backend,
                weight_grad=self.weight_grad or None,
            )
        except OSError as error:
            raise UserError(f"config: expected plan to be a file, got {self.plan}: {error.strerror}") from None
        except ValueError as error:  # JSON's is one, too
            raise UserError(f"config: {error}") from None

    def wrap(self, model: nn.Module, world: World, *, sharded: bool = False) -> nn.Module:
        """The model as a training step calls it: averaged over the processes, unless sharded, and compiled if asked."""
        wrapped = DistributedDataParallel(model) if world.size > 1 and not sharded else model
        if self.compile:
            wrapped.compile()
        return wrapped

    def exact_epoch(self, model: nn.Module, epoch: int, epochs: int) -> contextlib.AbstractContextManager[object]:
        """Exact gradients within, if the epoch is one of those."""
        exact = epoch < self.exact_first or epoch >= epochs - self.exact_last
        return sdgp.paused(model) if exact else contextlib.nullcontext()

    def autocast(self, device: torch.device) -> torch.autocast:
        dtype = torch.float16 if self.amp == "float16" else torch.bfloat16
        return torch.autocast(device.type, dtype, enabled=self.amp != "off")

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(device.type, enabled=self.amp == "float16")

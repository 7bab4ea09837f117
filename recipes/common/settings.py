# SPDX-License-Identifier: BSD-3-Clause
"""The settings that all recipes share: how to prune, in which epochs, and in which precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

import sdgp

from .config import Count, Natural, NonNegative
from .errors import UserError
from .process import World


@dataclass(frozen=True)
class Settings:
    """The fields that all recipes share. The config of a recipe adds its own fields."""

    method: Literal["plain", "magnitude", "random", "rescale", "rescale_group", "mvue", "unstructured"] = "plain"
    pattern: str = "2:4"
    weight_grad: str = ""  # the pattern of the weight gradients, always with mvue; "": exact
    plan: str = ""  # a JSON file with a plan of sdgp.advise, which replaces pattern, weight_grad and filter
    backend: Literal["auto", "pruned", "sparse", "dense"] = "pruned"
    budget: Natural = 0  # sdgp.Budget chooses a plan every this many steps; 0: no budget
    epochs: Count = 1
    exact_first: Natural = 0  # epochs with exact gradients at the start
    exact_last: Natural = 0  # epochs with exact gradients at the end
    clip: NonNegative = 0.0  # the largest norm of the gradient; 0: no limit
    amp: Literal["off", "bfloat16", "float16"] = "off"
    compile: bool = False
    unit: ClassVar[str]  # what the throughput counts

    def __post_init__(self) -> None:
        if self.exact_first + self.exact_last > self.epochs:
            raise UserError(
                f"config: expected exact_first + exact_last <= epochs, got {self.exact_first} + {self.exact_last} > "
                f"{self.epochs}"
            )
        if self.weight_grad and self.method == "plain" and not self.budget:
            raise UserError(f"config: expected a method with weight_grad = {self.weight_grad}, got method = plain")
        others = ("plan", "weight_grad", "exact_first", "exact_last", "compile")
        fixed = [f"method = {self.method}"] if self.method != "plain" else []
        fixed += [f"{name} = {getattr(self, name)}" for name in others if getattr(self, name)]
        if self.budget and fixed:
            raise UserError(f"config: expected no {fixed[0]} with budget = {self.budget}, which chooses what to prune")

    @property
    def row(self) -> str:
        """The name of the run's row in the tables, for example ``mvue 2:4``."""
        if self.budget:
            return f"budget, every {self.budget} steps"
        if self.plan:
            return f"plan {Path(self.plan).stem}"
        if self.method == "plain":
            return "plain"
        return f"{self.method} {self.pattern}" + (f", weight gradient {self.weight_grad}" if self.weight_grad else "")

    def convert(self, model: nn.Module, filter: Callable[[nn.Module, str], bool]) -> nn.Module:
        """Converts ``model`` as the config says. With the method "plain" and no plan, the model stays plain."""
        if self.method == "plain" and not self.plan:
            return model
        plan = self.read_plan()
        try:
            if plan is not None:
                return sdgp.convert(model, plan, backend=self.backend)
            return sdgp.convert(
                model,
                self.pattern,
                self.method,
                filter=filter,
                backend=self.backend,
                weight_grad=self.weight_grad or None,
            )
        except ValueError as error:
            raise UserError(f"config: {error}") from None

    def read_plan(self) -> dict[str, Any] | None:
        """Returns what the file of the plan contains; None if the config names no plan.

        Raises:
            UserError: if there is no such file, or it contains no plan.
        """
        if not self.plan:
            return None
        try:
            plan = json.loads(Path(self.plan).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"config: expected plan to be a file, got {self.plan}: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"config: expected plan to be JSON, got {self.plan}: {error}") from None
        if not isinstance(plan, dict) or not plan:
            raise UserError(f"config: expected plan to name layers, got {plan!r} in {self.plan}")
        return plan

    def wrap(self, model: nn.Module, world: World) -> nn.Module:
        """Wraps the model in DistributedDataParallel, unless it is sharded, and compiles it if the config says so."""
        wrapped = model if world.size == 1 or isinstance(model, FSDPModule) else DistributedDataParallel(model)
        if self.compile:
            wrapped.compile()
        return wrapped

    def schedule(self, model: nn.Module) -> sdgp.Schedule | None:
        """The schedule of the exact epochs; None if no layer of the model prunes."""
        if not any(row.pattern for row in sdgp.report(model)):
            return None
        return sdgp.Schedule(model, total=self.epochs, exact_first=self.exact_first, exact_last=self.exact_last)

    def learning_rate(self, epoch: float) -> float:
        """Returns the learning rate at a time in epochs."""
        raise NotImplementedError

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The autocast of the config. With amp = "off" an autocast around it stays on."""
        if self.amp == "off":
            return nullcontext()
        return torch.autocast(device.type, torch.float16 if self.amp == "float16" else torch.bfloat16)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(device.type, enabled=self.amp == "float16")

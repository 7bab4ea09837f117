# SPDX-License-Identifier: BSD-3-Clause
"""Measures what the steps of each arm save on this machine, the proposal of ``sdgp.advise``, and the noise.

    python -m recipes.worth.measure resnet9 --data DIR --machine NAME     # about ten minutes on an idle machine
    python -m recipes.worth.measure resnet9 --data DIR --machine NAME --keep-plan     # the steps again, as stored
    python -m recipes.worth.measure resnet9 --data DIR --noise            # the noise of each pattern, on any machine

The program asks for advice after a quarter of the plain run. Steps of the plain model and of its pruned copies take
turns; the saving is the median of their paired ratios. The noise is the noise that ``sdgp.advise`` measures at each
eighth of a plain run, regardless of the speed of the products.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import sdgp
from sdgp._decision import Products
from sdgp._machine import machine
from sdgp._pattern import Pruning
from sdgp._timing import steps_beside_plain
from sdgp_cli import count

from ..common import process
from ..common.errors import UserError
from ..common.files import replacing
from ..common.run import update
from .tasks import TASKS, Task

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
POINTS = 8
_PREDICTED = ("verdict", "saved", "limit", "noise", "net")


class Parts(NamedTuple):
    """The parts of the full plain run of a task.

    Attributes:
        loss: a function of a model, input and target, under the autocast of the recipe.
        epoch_steps: the number of steps per epoch.
        batches: the micro-batches of one epoch after the other.
        is_pruned: a function of module and name, which says whether the recipe prunes a layer.
    """

    config: Any
    model: torch.nn.Module
    make_optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer]
    loss: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
    epoch_steps: int
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]]
    is_pruned: Callable[[torch.nn.Module, str], bool]


def prepare(task: Task, data: Any) -> Parts:
    recipe, config, world = task.recipe, task.config(), process.start(None)
    torch.manual_seed(0)
    model, forward = recipe.prepare(config, data, world), recipe.forward(config)

    def loss(model: torch.nn.Module, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with config.autocast(world.device):
            return forward(model, input, target).loss

    steps = (step for epoch in itertools.count() for step in recipe.batches(config, data, 0, epoch, 0, world))
    return Parts(
        config,
        model,
        lambda model: recipe.make_optimizer(model, config),
        loss,
        recipe.steps(config, data, world),
        itertools.chain.from_iterable(steps),
        partial(recipe.is_pruned, config),
    )


def advice(task: Task, data: Any) -> sdgp.Plan:
    parts = prepare(task, data)
    optimizer = parts.make_optimizer(parts.model)
    for step in range(parts.config.epochs * parts.epoch_steps // 4):
        train(parts, optimizer, step)
    return ask(parts, optimizer, rounds=5)


def savings(task: Task, data: Any, rounds: int, plan: dict[str, Any]) -> dict[str, Any]:
    """Returns what each arm saves, by its name, for example ``"8:16 + 4:16"`` or ``"plan"``."""
    parts = prepare(task, data)
    input, target = next(parts.batches)
    patterns = [" + ".join(part for part in arm if part) for arm in task.pruned]
    settings: dict[str, Any] = {"loss": parts.loss, "make_optimizer": parts.make_optimizer, "filter": parts.is_pruned}
    rows = steps_beside_plain(parts.model, input, target, patterns, "mvue", ["auto"], rounds, **settings)
    if plan:
        rows += steps_beside_plain(parts.model, input, target, {"plan": plan}, "mvue", ["auto"], rounds, **settings)
    return {row["pattern"]: row for row in rows}


class _Untimed(sdgp.Chooser):
    """Reports every sparse product as faster, so that ``advise`` measures the noise of all patterns."""

    def measure(
        self, products: Products, pruning: Pruning, rounds: int | None = None, exact_ms: float | None = None
    ) -> sdgp.Decision:
        return sdgp.Decision("sparse", "", exact_ms=2.0, sparse_ms=1.0)


def noises(task: Task, data: Any) -> Iterator[dict[str, Any]]:
    """Yields the noise of every pattern during a plain run, for each gradient, summed over the layers."""
    parts = prepare(task, data)
    optimizer = parts.make_optimizer(parts.model)
    patterns = dict.fromkeys(pattern for arm in task.pruned for pattern in arm if pattern)
    steps = parts.config.epochs * parts.epoch_steps
    for step in range(steps):
        if step % (steps // POINTS) == 0:
            with _Untimed():
                plan = ask(parts, optimizer, rounds=1, patterns=patterns, filter=parts.is_pruned)
            sums = dict.fromkeys(
                (f"{gradient} {pattern}" for gradient in ("data", "weight") for pattern in patterns), 0.0
            )
            for row in plan.candidates:
                sums[f"{row.gradient} {row.pattern}"] += 0.0 if math.isnan(row.noise) else row.noise
            yield {"step": step, "norm": plan.norm, "noise": {key: round(value, 6) for key, value in sums.items()}}
        train(parts, optimizer, step)


def train(parts: Parts, optimizer: torch.optim.Optimizer, step: int) -> None:
    config = parts.config
    optimizer.zero_grad()
    loss = parts.loss(parts.model, *next(parts.batches))
    loss.backward()
    update(parts.model, optimizer, config.scaler(loss.device), config, (step + 1) / parts.epoch_steps)


def ask(parts: Parts, optimizer: torch.optim.Optimizer, **settings: Any) -> sdgp.Plan:
    parts.model.train()
    few = list(itertools.islice(parts.batches, 4))

    def loss(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return parts.loss(model, *batch)

    return sdgp.advise(parts.model, *few, loss=loss, optimizer=optimizer, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, help="where the recipe finds its data")
    parser.add_argument("--rounds", type=count, default=30, help="steps of each arm")
    parser.add_argument("--noise", action="store_true", help="measure the noise alone")
    parser.add_argument("--keep-plan", action="store_true", help="measure the steps again, with the stored plan")
    parser.add_argument("--machine", default="this", help="what the results' files call the machine")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for results")
    parser.add_argument("--threads", type=count, default=1, help="the number of PyTorch's CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        _measure(TASKS[args.task], args)
    except (UserError, OSError) as error:
        sys.exit(f"worth: {error}")


def _measure(task: Task, args: argparse.Namespace) -> None:
    args.results.mkdir(parents=True, exist_ok=True)
    data = task.recipe.load(task.config(), args.data or task.data, process.start(None))
    if args.noise:
        if not task.pruned:
            raise UserError(f"--noise: expected a task with one-pattern runs, got {task.name}")
        points = []
        for point in noises(task, data):
            print(point, flush=True)
            points.append(point)
        _write(args.results / f"{task.name}-noise.json", _with_machine(points))
        return
    plan_path = args.results / f"{task.name}-plan-{args.machine}.json"
    saved_path = args.results / f"{task.name}-saved-{args.machine}.json"
    if args.keep_plan:
        try:
            plan = json.loads(plan_path.read_text(encoding="utf-8"))
            stored = json.loads(saved_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--keep-plan: expected a stored plan, got none: {error}") from None
        predicted = {key: stored[key] for key in _PREDICTED if key in stored}
    else:
        advised = advice(task, data)
        print(advised, flush=True)
        plan, predicted = dict(advised), {key: getattr(advised, key) for key in _PREDICTED}
        plan_path.unlink(missing_ok=True)
        if plan:
            _write(plan_path, plan)
    _write(saved_path, _with_machine(savings(task, data, args.rounds, plan)) | predicted)


def _with_machine(result: Any) -> dict[str, Any]:
    return {"machine": machine(ROOT, "CMakeLists.txt", "cpp", "cuda", "python", "recipes/*.py"), "result": result}


def _write(path: Path, result: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()

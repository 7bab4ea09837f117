# SPDX-License-Identifier: BSD-3-Clause
"""What an arm's steps save on this machine, and the noise that its pruning adds along a plain run.

    python -m recipes.worth.measure resnet9 --data DIR               # both, some ten minutes on an idle machine
    python -m recipes.worth.measure resnet9 --data DIR --no-noise    # on another machine, the time alone

Steps of the plain model and of its pruned copies run in turn; the saving is the median of their paired ratios. Noise is
what ``sdgp.advise`` finds, after each eighth of a plain run, whatever the products' speed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

import sdgp
from sdgp._decision import Products
from sdgp._machine import machine
from sdgp._pattern import Pruning
from sdgp._timing import steps_beside_plain

from ..common import process
from ..common.errors import UserError
from ..common.files import replacing
from .tasks import TASKS, Task, loss

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
POINTS = 8


def savings(task: Task, data: Any, rounds: int) -> dict[str, Any]:
    """By arm, ``"8:16 + 4:16"`` say."""
    world = process.start(None)
    parts = task.parts(task.config(**task.base), data, world)
    input, target = next(parts.batches)
    patterns = [" + ".join(part for part in arm if part) for arm in task.pruned]
    rows = steps_beside_plain(parts.model, input, target, patterns, "mvue", ["auto"], rounds)
    kept = (
        "saved",
        "saved_low",
        "saved_high",
        "noise",
        "bfloat16_saved",
        "plain_ms",
        "layers_sparse",
        "weights_sparse",
    )
    return {row["pattern"]: {key: row[key] for key in kept} for row in rows}


class _Untimed(sdgp.Chooser):
    """Finds every sparse product faster: noise is what is asked for."""

    def measure(self, products: Products, pruning: Pruning, rounds: int | None = None) -> sdgp.Decision:
        return sdgp.Decision("sparse", "", exact_ms=2.0, sparse_ms=1.0)


def noises(task: Task, data: Any) -> list[dict[str, Any]]:
    """Along a plain run: the noise of every pattern, summed over the layers, by gradient."""
    world = process.start(None)
    config: Any = task.config(**task.base)
    parts = task.parts(config, data, world)
    patterns = dict.fromkeys(pattern for arm in task.pruned for pattern in arm if pattern)
    images = getattr(config, "epoch_images", 0)
    epoch_steps = images // config.batch_size if images else config.epoch_steps
    steps, points = config.epochs * epoch_steps, []
    for step in range(steps):
        if step % (steps // POINTS) == 0:
            few = list(itertools.islice(parts.batches, 4))
            parts.model.train()
            with _Untimed():
                plan = sdgp.advise(parts.model, *few, loss=loss, optimizer=parts.optimizer, patterns=patterns, rounds=1)
            sums = {
                f"{gradient} {pattern}": math.fsum(
                    row.noise for row in plan.candidates if (row.gradient, row.pattern) == (gradient, pattern)
                )
                for gradient in ("data", "weight")
                for pattern in patterns
            }
            points.append(
                {"step": step, "norm": plan.norm, "noise": {key: round(value, 6) for key, value in sums.items()}}
            )
            print(points[-1], flush=True)
        for group in parts.optimizer.param_groups:
            group["lr"] = config.learning_rate((step + 1) / epoch_steps)
        parts.optimizer.zero_grad()
        loss(parts.model, next(parts.batches)).backward()
        parts.optimizer.step()
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, help="where the recipe finds its data")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each arm")
    parser.add_argument("--no-noise", action="store_true", help="measure the time alone")
    parser.add_argument("--machine", default="this", help="what the results' file calls the machine")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for results")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, on a CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    task = TASKS[args.task]
    try:
        data = task.load(task.config(**task.base), args.data, process.start(None))
    except UserError as error:
        sys.exit(f"worth: {error}")
    _store(args.results / f"{args.task}-saved-{args.machine}.json", savings(task, data, args.rounds))
    if not args.no_noise:
        _store(args.results / f"{args.task}-noise.json", noises(task, data))


def _store(path: Path, result: Any) -> None:
    with replacing(path) as temporary:
        where = machine(ROOT, "CMakeLists.txt", "cpp", "cuda", "python", "recipes/*.py")
        temporary.write_text(json.dumps({"machine": where, "result": result}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()

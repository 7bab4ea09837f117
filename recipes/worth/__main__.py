# SPDX-License-Identifier: BSD-3-Clause
"""Runs one task of the study: plain runs with several lengths and batch sizes, and pruned runs.

    python -m recipes.worth resnet9 --data DIR             # hours; started again, it goes on where it was
    python -m recipes.worth.measure resnet9 --data DIR     # what a step saves on this machine, and the noise
    python -m recipes.worth.report                         # the tables and plots of README.md

Every run has a complete learning-rate schedule. When a run ends, its line is written to results/TASK.jsonl; runs that
have a line there are not repeated. All arms of the first seed run before the next seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from sdgp_cli import count

from ..common import process
from ..common.errors import Diverged, Stopped, UserError
from ..common.files import append_line
from ..common.launch import seed
from ..common.record import Job
from ..common.settings import Settings
from .compare import has_present_plan, read_runs
from .tasks import TASKS, Task

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, help="where the recipe finds its data")
    parser.add_argument("--seed", type=seed, default=0, help="the first seed")
    parser.add_argument("--seeds", type=count, default=3, help="the number of seeds, one run of each arm for each")
    parser.add_argument("--out", type=Path, default=Path("runs/worth"), help="folder for checkpoints")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for result lines")
    parser.add_argument("--threads", type=count, default=1, help="the number of PyTorch's CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        run(args.task, args.data, range(args.seed, args.seed + args.seeds), args.out, args.results)
    except Stopped as stopped:
        sys.exit(128 + stopped.signal)
    except UserError as error:
        sys.exit(f"worth: {error}")


def run(name: str, data_path: Path | None, seeds: Iterable[int], out: Path, results: Path) -> None:
    """Runs every run of a task that has no result line yet."""
    task, path = TASKS[name], results / f"{name}.jsonl"
    results.mkdir(parents=True, exist_ok=True)
    world = process.start(None)
    try:
        data = task.recipe.load(task.config(), data_path or task.data, world)
        for seed in seeds:
            for overrides in task.arms(results):
                config = task.config(**overrides)
                if (config, seed) in finished(task, path):
                    continue
                folder = out / name / "+".join(f"{key}={value}" for key, value in overrides.items()) / f"seed{seed}"
                try:
                    task.recipe.train(config, data, seed, world, Job(folder, path, resume=True))
                except Diverged as error:  # a result, too
                    line = {
                        "row": config.row,
                        "seed": seed,
                        "diverged": str(error),
                        "config": dataclasses.asdict(config),
                    }
                    if config.plan:
                        line["plan"] = config.read_plan()
                    append_line(path, json.dumps(line))
    finally:
        process.stop()


def finished(task: Task, path: Path) -> list[tuple[Settings, int]]:
    """Returns config and seed of every run that has a result line."""
    if not path.exists():
        return []
    lines = filter(has_present_plan, read_runs(path))
    return [(task.recipe.config(**line["config"]), line["seed"]) for line in lines]


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: BSD-3-Clause
"""The command line of a recipe, and its runs: one for each seed."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path

import torch

from sdgp_cli import count

from . import checkpoint, config, process
from .config import difference
from .errors import Diverged, Stopped, UserError
from .recipe import Recipe
from .record import Job


def launch(recipe: Recipe, doc: str | None) -> None:
    """Parses the command line and trains a run for each seed, or evaluates a checkpoint."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr] # for names that are not UTF-8
    args = _parse(doc)
    try:
        settings = config.load(recipe.config, args.config, args.set)
        if args.threads:
            torch.set_num_threads(args.threads)
        world = process.start(args.device)
        try:
            if args.eval is not None:
                weights, training = checkpoint.load(args.eval)
                if changed := difference(training.get("config", {}), dataclasses.asdict(settings)):
                    print(f"--eval: the checkpoint was trained with another config: {changed}", file=sys.stderr)
                data = recipe.load(settings, args.data, world)
                print(recipe.evaluate(settings, data, world, weights))
                return
            data = recipe.load(settings, args.data, world)
            diverged = []
            for seed in range(args.seed, args.seed + args.seeds):
                folder = args.out / recipe.name / "+".join(file.stem for file in args.config) / f"seed{seed}"
                results = args.results or args.out / f"{recipe.name}.jsonl"
                try:
                    recipe.train(settings, data, seed, world, Job(folder, results, args.resume))
                except Diverged as error:
                    if args.seeds == 1 or world.size > 1:  # another process may not have noticed yet
                        raise
                    print(f"{recipe.name}: seed {seed}: {error}", file=sys.stderr)
                    diverged.append(seed)
            if diverged:
                raise UserError(f"the runs of these seeds diverged: {', '.join(map(str, diverged))}")
        finally:
            process.stop()
    except Stopped as stopped:
        sys.exit(128 + stopped.signal)  # as a shell reports a program that a signal ended
    except UserError as error:
        sys.exit(f"{recipe.name}: {error}")


def seed(text: str) -> int:
    """The argparse type of a seed that PyTorch takes."""
    if not re.fullmatch(r"\d{1,18}", text):
        raise argparse.ArgumentTypeError(f"expected a number from 0 on with at most 18 digits, got {text!r}")
    return int(text)


def _parse(doc: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", type=Path, help="TOML files, a later one over an earlier; none: defaults")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="overrides the files; may be repeated"
    )
    parser.add_argument("--data", type=Path, help="where the data is")
    parser.add_argument("--seed", type=seed, default=0, help="the first seed")
    parser.add_argument("--seeds", type=count, default=1, help="the number of seeds, one run for each")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for checkpoints and metrics")
    parser.add_argument("--results", type=Path, help="file that gets a line per finished run; default OUT/RECIPE.jsonl")
    parser.add_argument("--resume", action="store_true", help="go on from each run's checkpoint, where there is one")
    parser.add_argument("--eval", type=Path, metavar="CHECKPOINT", help="evaluate this, train nothing")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    parser.add_argument("--threads", type=count, help="the number of PyTorch's CPU threads")
    return parser.parse_args()

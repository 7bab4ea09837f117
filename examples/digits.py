# SPDX-License-Identifier: BSD-3-Clause
"""Tests whether pruning pays for a small convolutional network on scikit-learn's handwritten digits.

The data set has 1,797 real images; one third is held out for testing. After two plain epochs, ``sdgp.advise`` measures
what pruning would save and what its noise would cost, and says whether pruning pays. Then the example trains the same
network three times per seed:

    plain            all epochs
    plain, shorter   as many epochs as fit into the time of the plan; pruning has to beat this run
    the plan         all epochs, pruned as advised after an exact first quarter, because pruning costs most at the start
                     (if nothing pays, 16:32 in all convolutions except the first)

The runs take turns after every epoch, so that their times are comparable: an epoch's time is the median of the ratios
to the neighboring plain epochs. The example prints the plan and a table, and draws the learning curves:

    make demo
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import matplotlib
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import sdgp
from sdgp._machine import machine

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Batch: TypeAlias = tuple[Tensor, Tensor]

BATCH_SIZE = 128
EVERYWHERE = ("16:32", "mvue", "16:32")  # used if no plan pays
EXACT_FIRST = 0.25  # of the epochs of the plan


class Arm(NamedTuple):
    name: str
    epochs: int
    plan: dict[str, tuple[Any, ...]]
    exact: int = 0  # epochs at the start that do not prune


class Epoch(NamedTuple):
    loss: float  # on the test images, after the epoch
    accuracy: float  # on the test images, in percent
    seconds: float


Runs: TypeAlias = dict[str, list[list[Epoch]]]  # by the name of the arm, then by seed


class Data(NamedTuple):
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load() -> Data:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8)
    images = F.interpolate(images, scale_factor=2, mode="bilinear")  # (1797, 1, 16, 16)
    labels = torch.tensor(digits.target)
    parts = train_test_split(images, labels, test_size=1 / 3, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = parts
    return Data(train_images, train_labels, test_images, test_labels)


def make_model() -> nn.Module:
    def block(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(channels_out), nn.ReLU()]

    layers = [*block(1, 32, 1), *block(32, 128, 2), *block(128, 128, 1), *block(128, 256, 2), *block(256, 256, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))
    return model.to(memory_format=torch.channels_last)


def batches(data: Data) -> Iterator[Batch]:
    """Yields the batches of an epoch. Each image is shifted by up to two pixels in each direction."""
    for batch in torch.randperm(len(data.train_images)).split(BATCH_SIZE):
        images = data.train_images[batch]
        windows = F.pad(images, (2, 2, 2, 2)).unfold(2, 16, 1).unfold(3, 16, 1)  # (N, 1, 5, 5, 16, 16)
        row, column = torch.randint(0, 5, (2, len(images)))
        images = windows[torch.arange(len(images)), :, row, column]
        yield images.contiguous(memory_format=torch.channels_last), data.train_labels[batch]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def train(model: nn.Module, data: Data, seed: int, epochs: int, exact: int = 0) -> Iterator[Epoch]:
    """Trains one epoch at a time. It keeps its own random state, so that other models can train in between."""
    torch.manual_seed(seed)
    pruning = sdgp.Schedule(model, total=epochs, exact_first=exact) if exact else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = -(-len(data.train_images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=epochs * steps)
    state = torch.get_rng_state()
    for _ in range(epochs):
        torch.set_rng_state(state)
        start = time.perf_counter()
        model.train()
        for batch in batches(data):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
            schedule.step()
        if pruning:
            pruning.step()
        seconds = time.perf_counter() - start
        state = torch.get_rng_state()
        yield Epoch(*evaluate(model, data), seconds)


@torch.no_grad()
def evaluate(model: nn.Module, data: Data) -> tuple[float, float]:
    model.eval()
    scores = model(data.test_images)
    accuracy = 100 * (scores.argmax(1) == data.test_labels).float().mean().item()
    return F.cross_entropy(scores, data.test_labels).item(), accuracy


def ask(data: Data, epochs: int) -> sdgp.Plan:
    """Returns the plan for a model after a little training, because an untrained model tolerates pruning worst."""
    torch.manual_seed(0)
    model = make_model()
    for _ in zip(range(2), train(model, data, seed=0, epochs=max(epochs, 3)), strict=False):
        pass
    model.train()
    few = [batch for batch in batches(data) if len(batch[0]) == BATCH_SIZE][:4]
    return sdgp.advise(model, *few, loss=loss_of)


def arms_for(plan: sdgp.Plan, epochs: int) -> list[Arm]:
    if plan.pays:
        name, pruned, saved = "the plan", dict(plan), plan.saved
    else:
        layers = [name for name, module in make_model().named_modules() if isinstance(module, nn.Conv2d)]
        name, pruned, saved = "16:32 everywhere", dict.fromkeys(layers[1:], EVERYWHERE), 1 / epochs
    exact = int(EXACT_FIRST * epochs)
    shorter = max(1, min(epochs - 1, round(epochs - saved * (epochs - exact))))
    return [Arm("plain", epochs, {}), Arm("plain, shorter", shorter, {}), Arm(name, epochs, pruned, exact)]


def run(arms: list[Arm], data: Data, seeds: int, console: Console) -> Runs:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    runs: Runs = {arm.name: [] for arm in arms}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("epochs of all runs", total=seeds * sum(arm.epochs for arm in arms))
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = make_model()
            training = {}
            for arm in arms:
                runs[arm.name].append([])
                twin = sdgp.convert(copy.deepcopy(model), arm.plan)
                training[arm.name] = train(twin, data, seed, arm.epochs, arm.exact)
            for epoch in range(arms[0].epochs):
                for arm in arms:
                    if epoch < arm.epochs:
                        runs[arm.name][-1].append(next(training[arm.name]))
                        progress.advance(task)
    return runs


def summarize(arms: list[Arm], runs: Runs) -> list[dict[str, Any]]:
    rows = []
    for arm in arms:
        pairs = zip(runs[arm.name], runs["plain"], strict=True)
        ratios = [
            one.seconds / other.seconds
            for own, plain in pairs
            for one, other in zip(own[arm.exact :], plain[arm.exact :], strict=False)
        ]
        epoch_time = statistics.median(ratios)
        last = [repeat[-1] for repeat in runs[arm.name]]
        rows.append(
            {
                "arm": arm.name,
                "epochs": arm.epochs,
                "exact_epochs": arm.exact,
                "epoch_times_plain": round(epoch_time, 3),
                "time": round((arm.exact + epoch_time * (arm.epochs - arm.exact)) / arms[0].epochs, 3),
                "loss": round(statistics.mean(epoch.loss for epoch in last), 4),
                "losses": [round(epoch.loss, 4) for epoch in last],
                "top1": round(statistics.mean(epoch.accuracy for epoch in last), 2),
            }
        )
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("", "epochs", "time", "test loss", "each seed's", "top-1")
    for row in rows:
        losses = " ".join(f"{loss:.3f}" for loss in row["losses"])
        cells = row["arm"], str(row["epochs"]), f"{row['time']:.0%}", f"{row['loss']:.3f}", losses, f"{row['top1']:.2f}"
        table.add_row(*cells)
    console.print(table)


def plot(runs: Runs, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, repeats in runs.items():
        curves = torch.tensor([[epoch.loss for epoch in repeat] for repeat in repeats])  # (seeds, epochs)
        elapsed = torch.tensor([[epoch.seconds for epoch in repeat] for repeat in repeats]).cumsum(1).mean(0)
        (line,) = axes.plot(elapsed, curves.mean(0), label=name, linewidth=1.8)
        axes.fill_between(elapsed, curves.amin(0), curves.amax(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="seconds of training", ylabel="test loss", yscale="log", title="Handwritten digits")
    axes.grid(alpha=0.3, which="both")
    axes.legend(title=f"mean and range of {len(next(iter(runs.values())))} seeds")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="one seed, three epochs: shows that it runs, no more")
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder for the plot and the table")
    args = parser.parse_args()
    epochs, seeds = (3, 1) if args.short else (args.epochs, args.seeds)

    where = machine(Path(__file__).parents[1], "CMakeLists.txt", "cpp", "python", "examples/digits.py")
    console, data = Console(), load()
    console.print("asking sdgp.advise, after two plain epochs …")
    plan = ask(data, epochs)
    console.print(str(plan), highlight=False, soft_wrap=True)
    console.print()
    arms = arms_for(plan, epochs)
    runs = run(arms, data, seeds, console)
    rows = summarize(arms, runs)
    show(rows, console)
    console.print(
        "Time: of all epochs, beside the plain run. A saving counts where the loss is below the shorter run's."
    )
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"epochs": epochs, "seeds": list(range(seeds)), "plan": dict(plan), "verdict": plan.verdict}
    results = {"machine": where, "settings": settings, "rows": rows}
    (args.out / "digits.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(runs, args.out / "digits.png")
    console.print(f"learning curves: {args.out / 'digits.png'}; the table: {args.out / 'digits.json'}")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: BSD-3-Clause
"""Trains a small convolutional network on scikit-learn's handwritten digits, plain and with each way of pruning.

1,797 real images of 8 x 8 pixels, a third of them held out; three seeds each. The pruned variants prune everywhere, and
each layer multiplies by whichever product, sparse or dense, was the faster when its first gradient came. The variants
train in turn, epoch by epoch, so that times compare: "x plain" is the median, over epochs and seeds, of an epoch's time
beside that of the plain one before it; "seconds" the median epoch's, times the epochs. Prints a table, and draws the
learning curves:

    make demo
"""

from __future__ import annotations

import argparse
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


class Variant(NamedTuple):
    name: str
    pattern: str | None
    method: str


VARIANTS = (
    Variant("plain", None, ""),
    Variant("random 2:4", "2:4", "random"),
    Variant("magnitude 2:4", "2:4", "magnitude"),
    Variant("rescale 2:4", "2:4", "rescale"),
    Variant("mvue 2:4", "2:4", "mvue"),
    Variant("mvue 4:32", "4:32", "mvue"),
)


class Epoch(NamedTuple):
    accuracy: float  # percent, after it
    seconds: float
    layers_sparse: int  # that took the sparse product


Runs: TypeAlias = dict[Variant, list[list[Epoch]]]  # by seed


class Data(NamedTuple):
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load() -> Data:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8)
    labels = torch.tensor(digits.target)
    parts = train_test_split(images, labels, test_size=1 / 3, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = parts
    return Data(train_images, train_labels, test_images, test_labels)


def make_model() -> nn.Module:
    def block(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(channels_out), nn.ReLU()]

    layers = [*block(1, 32, 1), *block(32, 64, 2), *block(64, 64, 1), *block(64, 128, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def train(variant: Variant, data: Data, seed: int, epochs: int) -> Iterator[Epoch]:
    """One epoch at a time, with a random state of its own: between two, others may train."""
    torch.manual_seed(seed)
    model = make_model()
    if variant.pattern is not None:
        sdgp.convert(model, variant.pattern, variant.method, backend="pruned")
    steps = -(-len(data.train_images) // 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.03, total_steps=epochs * steps)
    state = torch.get_rng_state()
    for _ in range(epochs):
        torch.set_rng_state(state)
        start = time.perf_counter()
        model.train()
        for batch in torch.randperm(len(data.train_images)).split(64):
            images = augment(data.train_images[batch])
            loss = F.cross_entropy(model(images), data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds = time.perf_counter() - start
        state = torch.get_rng_state()
        layers_sparse = sum(row.product == "sparse" for row in sdgp.report(model))
        yield Epoch(evaluate(model, data), seconds, layers_sparse)


def augment(images: Tensor) -> Tensor:
    """Shifts each image by up to one pixel each way."""
    windows = F.pad(images, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)  # (N, 1, 3, 3, 8, 8)
    row, column = torch.randint(0, 3, (2, len(images)))
    return windows[torch.arange(len(images)), :, row, column]


@torch.no_grad()
def evaluate(model: nn.Module, data: Data) -> float:
    model.eval()
    return 100 * (model(data.test_images).argmax(1) == data.test_labels).float().mean().item()


def summarize(runs: Runs) -> list[dict[str, Any]]:
    rows = []
    plain = [epoch.seconds for run in runs[VARIANTS[0]] for epoch in run]
    for variant, repeats in runs.items():
        last = [run[-1].accuracy for run in repeats]
        seconds = [epoch.seconds for run in repeats for epoch in run]
        ratios = [own / before for own, before in zip(seconds, plain, strict=True)]
        rows.append(
            {
                "data gradient": variant.name,
                "top1_mean": round(statistics.mean(last), 2),
                "top1_std": round(statistics.stdev(last), 2) if len(last) > 1 else 0.0,
                "top1": [round(accuracy, 2) for accuracy in last],
                "seconds": round(len(repeats[0]) * statistics.median(seconds), 1),
                "times_plain": round(statistics.median(ratios), 2),
                "layers_sparse": [run[-1].layers_sparse for run in repeats],
            }
        )
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("data gradient", "top-1", "- plain", "seconds", "x plain", "layers sparse")
    for row in rows:
        difference = row["top1_mean"] - rows[0]["top1_mean"]
        accuracy = f"{row['top1_mean']:.2f} ± {row['top1_std']:.2f}"
        seconds, times, layers = f"{row['seconds']:.1f}", f"{row['times_plain']:.2f}", str(max(row["layers_sparse"]))
        table.add_row(row["data gradient"], accuracy, f"{difference:+.2f}", seconds, times, layers)
    console.print(table)


def plot(runs: Runs, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for variant, repeats in runs.items():
        curves = torch.tensor([[epoch.accuracy for epoch in run] for run in repeats])  # (seeds, epochs)
        epochs = range(1, curves.shape[1] + 1)
        (line,) = axes.plot(epochs, curves.mean(0), label=variant.name, linewidth=1.8)
        axes.fill_between(epochs, curves.amin(0), curves.amax(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="epoch", ylabel="test top-1, %", title="Handwritten digits: pruned data gradients")
    axes.set_ylim(80, 100)
    axes.grid(alpha=0.3)
    axes.legend(title=f"mean and range of {len(next(iter(runs.values())))} seeds")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="one seed, three epochs: shows that it runs, no more")
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder for the plot and the table")
    args = parser.parse_args()
    epochs, seeds = (3, 1) if args.short else (args.epochs, args.seeds)

    where = machine(Path(__file__).parents[1], "CMakeLists.txt", "cpp", "python", "examples/digits.py")
    console, data = Console(), load()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    runs: Runs = {variant: [] for variant in VARIANTS}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("epochs of all runs", total=len(VARIANTS) * seeds * epochs)
        for seed in range(seeds):
            training = {variant: train(variant, data, seed, epochs) for variant in VARIANTS}
            for variant in VARIANTS:
                runs[variant].append([])
            for _ in range(epochs):
                for variant in VARIANTS:
                    runs[variant][-1].append(next(training[variant]))
                    progress.advance(task)
    rows = summarize(runs)
    show(rows, console)
    args.out.mkdir(parents=True, exist_ok=True)
    results = {"machine": where, "settings": {"epochs": epochs, "seeds": list(range(seeds))}, "rows": rows}
    (args.out / "digits.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(runs, args.out / "digits.png")
    console.print(f"learning curves: {args.out / 'digits.png'}; the table: {args.out / 'digits.json'}")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: BSD-3-Clause
"""Compares whole training steps (forward, backward, SGD) of the plain model and of converted copies of it.

Prints one line per model, pattern and backend: the milliseconds, the saving with its 95 % interval, and how many data
and weight gradients took the sparse product. "plain again" is what a second copy of the plain model seems to save.
"bfloat16" is what the plain model saves under autocast; if that is more, pruning in float32 gains nothing. The pattern
"4:16 + 8:16" prunes the data gradient to 4:16 and the weight gradient to 8:16, which frozen weights ignore.

    python benchmarks/train_step.py                             # all four, an hour or so
    python benchmarks/train_step.py --bfloat16                  # all of them under bfloat16 autocast
    python benchmarks/train_step.py --model transformer lora --pattern 2:4 "4:16 + 4:16" --backend auto
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import models
import torch
from bench import Row, arguments, begin, finish, subject_here
from torch import Tensor, nn

from sdgp._timing import steps_beside_plain

METHOD = "mvue"


def resnet18() -> tuple[nn.Module, Tensor, Tensor]:
    return models.resnet18().to(memory_format=torch.channels_last), *images(16, 32, classes=10)


def resnet50() -> tuple[nn.Module, Tensor, Tensor]:
    return models.resnet50().to(memory_format=torch.channels_last), *images(4, 224, classes=1000)


def transformer() -> tuple[nn.Module, Tensor, Tensor]:
    return models.Transformer(), *text(8, 128)


def lora() -> tuple[nn.Module, Tensor, Tensor]:
    return models.with_adapters(models.Transformer(), rank=8), *text(8, 128)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "transformer": transformer,
    "lora": lora,
}


def images(batch: int, size: int, classes: int) -> tuple[Tensor, Tensor]:
    input = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    return input, torch.randint(classes, (batch,))


def text(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Returns random bytes, and for each of them the next byte."""
    stream = torch.randint(256, (batch, length + 1))
    return stream[:, :-1], stream[:, 1:]


def rows(args: argparse.Namespace) -> Iterator[Row]:
    autocast = torch.bfloat16 if args.bfloat16 else None
    for name in args.model:
        for row in steps_beside_plain(*MODELS[name](), args.pattern, METHOD, args.backend, args.rounds, autocast):
            yield {"model": name, **row}


def line(row: Row) -> str:
    head = f"{row['model']:11s} | {row['method']} {row['pattern']:>11s} | {row['backend']:6s}"
    saved = f"{row['saved']:+6.1%} [{row['saved_low']:+.1%}, {row['saved_high']:+.1%}] saved"
    times = f"plain {row['plain_ms']:8.1f} ms | converted {row['converted_ms']:8.1f} ms | {saved}"
    others = f"plain again {row['plain_again_saved']:+.1%}, bfloat16 {row['bfloat16_saved']:+.1%}"
    data, weights = (f"{row[f'{kind}_sparse']} of {row[kind]}" for kind in ("layers", "weights"))
    return f"{head} | {times} ({others}) | sparse: {data} data, {weights} weight gradients"


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=30)
    parser.add_argument("--model", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--pattern", nargs="*", default=["8:16", "4:16", "8:16 + 8:16", "4:16 + 4:16"])
    parser.add_argument("--backend", nargs="*", choices=("auto", "pruned", "sparse"), default=["auto"])
    parser.add_argument("--bfloat16", action="store_true", help="all under bfloat16 autocast, the plain model too")
    args = begin(parser)
    subject = "train_step, bfloat16" if args.bfloat16 else "train_step"
    finish(args, subject_here(subject), rows(args), line)


if __name__ == "__main__":
    main()

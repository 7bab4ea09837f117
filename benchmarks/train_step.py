# SPDX-License-Identifier: BSD-3-Clause
"""Whole training steps (forward, backward, SGD): the dense model beside converted copies of it, in turn.

One line per model, pattern and backend: milliseconds, what is saved, and how many layers took the sparse product.
"Noise" is what a second copy of the dense model seems to save.

    python benchmarks/train_step.py                             # all four, half an hour or so
    python benchmarks/train_step.py --model transformer lora --pattern 2:4 --backend auto
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import models
import torch
import torch.nn.functional as F
from bench import arguments, begin, interleaved, store
from torch import Tensor, nn

import sdgp

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
    """Bytes, and the byte after each."""
    stream = torch.randint(256, (batch, length + 1))
    return stream[:, :-1], stream[:, 1:]


def make_step(model: nn.Module, input: Tensor, target: Tensor) -> Callable[[], None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        output = model(input)
        torch.autograd.backward(F.cross_entropy(output.flatten(0, -2), target.flatten()))
        optimizer.step()

    return step


def measure(name: str, patterns: list[str], backends: list[str], rounds: int) -> list[dict[str, Any]]:
    model, input, target = MODELS[name]()
    converted = {
        (pattern, backend): sdgp.convert(copy.deepcopy(model), pattern, METHOD, backend=backend)
        for pattern in patterns
        for backend in backends
    }
    candidates = {"dense": make_step(model, input, target)}
    for (pattern, backend), twin in converted.items():
        candidates[f"{pattern} {backend}"] = make_step(twin, input, target)
    candidates["dense again"] = make_step(copy.deepcopy(model), input, target)
    milliseconds = {candidate: 1e3 * seconds for candidate, seconds in interleaved(candidates, rounds).items()}
    dense = milliseconds["dense"]
    rows = []
    for (pattern, backend), twin in converted.items():
        layers = [row for row in sdgp.report(twin) if row.pattern]
        rows.append(
            {
                "model": name,
                "pattern": pattern,
                "method": METHOD,
                "backend": backend,
                "dense_ms": round(dense, 2),
                "converted_ms": round(milliseconds[f"{pattern} {backend}"], 2),
                "saved": round(1 - milliseconds[f"{pattern} {backend}"] / dense, 4),
                "noise": round(1 - milliseconds["dense again"] / dense, 4),
                "layers": len(layers),
                "layers_sparse": sum("sparse product" in row.note for row in layers),
            }
        )
    return rows


def show(row: dict[str, Any]) -> None:
    head = f"{row['model']:11s} | {row['method']} {row['pattern']:>4s} | {row['backend']:6s}"
    times = f"dense {row['dense_ms']:8.1f} ms | converted {row['converted_ms']:8.1f} ms | {row['saved']:+6.1%} saved"
    print(
        f"{head} | {times} (noise {row['noise']:+.1%}) | sparse in {row['layers_sparse']} of {row['layers']} layers",
        flush=True,
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--pattern", nargs="*", default=["2:4", "4:32"])
    parser.add_argument("--backend", nargs="*", choices=("auto", "pruned", "sparse"), default=["auto", "sparse"])
    args = parser.parse_args()
    machine = begin(args)
    rows = []
    for name in args.model:
        rows += measure(name, args.pattern, args.backend, args.rounds)
        for row in rows[-len(args.pattern) * len(args.backend) :]:
            show(row)
    if machine is not None:
        store("train_step", machine, rows, args.store)


if __name__ == "__main__":
    main()

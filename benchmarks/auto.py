# SPDX-License-Identifier: BSD-3-Clause
"""Checks that backend="auto" is never slower than plain, for layers of 1 x 1 to 4096 x 4096 and batches of 1 to 256.

Times a forward and backward. Prints one line per layer and batch: the milliseconds of the plain layer, the time of the
converted layer and of a second plain layer as multiples of it, and the choice of auto. The time does not
include the choice itself, which auto makes in the first backward of a shape.

    python benchmarks/auto.py                                   # everything, ten minutes or so
    python benchmarks/auto.py --layer linear --pattern 4:32
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator

import torch
from bench import Row, arguments, begin, finish, interleaved
from torch import Tensor, nn

import sdgp

METHOD = "mvue"
BATCHES = (1, 16, 256)
LINEAR = (  # in, out
    *((size, size) for size in (1, 16, 64, 256, 1024, 4096)),
    *((64, 4096), (4096, 64), (768, 3072), (3072, 768)),
)
CONV2D = (  # kernel, in, out, height and width
    *((1, 1, 1, 1), (1, 64, 64, 14), (1, 256, 64, 28), (1, 64, 256, 28), (1, 512, 2048, 7)),
    *((3, 3, 64, 32), (3, 16, 16, 32), (3, 64, 64, 16), (3, 256, 256, 8), (3, 512, 512, 4)),
)


def layers(kind: str) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yields (name, layer, input) for every batch size."""
    for batch in BATCHES:
        if kind == "linear":
            for features_in, features_out in LINEAR:
                name = f"linear {features_in} -> {features_out}, batch {batch}"
                yield name, nn.Linear(features_in, features_out), torch.randn(batch, features_in)
        else:
            for kernel, channels_in, channels_out, size in CONV2D:
                name = f"conv {kernel}x{kernel} {channels_in} -> {channels_out}, {size}x{size}, batch {batch}"
                layer = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2)
                input = torch.randn(batch, channels_in, size, size)
                yield name, *(x.to(memory_format=torch.channels_last) for x in (layer, input))  # type: ignore[misc]


def make_call(layer: nn.Module, input: Tensor) -> Callable[[], object]:
    input = input.detach().requires_grad_()
    wanted = (input, *layer.parameters())
    grad_output = torch.randn_like(layer(input))
    return lambda: torch.autograd.grad(layer(input), wanted, grad_output)


def measure(name: str, layer: nn.Module, input: Tensor, pattern: str, rounds: int) -> Row:
    converted = sdgp.convert(copy.deepcopy(layer), pattern, METHOD, backend="auto")
    candidates = {
        "plain": make_call(layer, input),
        "auto": make_call(converted, input),
        "plain again": make_call(copy.deepcopy(layer), input),
    }
    for call in candidates.values():  # auto chooses here
        call()
    start = time.perf_counter()
    candidates["plain"]()
    rounds = max(rounds, min(1000, int(0.2 / (time.perf_counter() - start))))  # short calls are noisier
    seconds = interleaved(candidates, rounds)
    (chosen,) = sdgp.report(converted)
    return {
        "layer": name,
        "pattern": pattern,
        "method": METHOD,
        "plain_ms": round(seconds["plain"] * 1e3, 4),
        "times_plain": round(seconds["auto"] / seconds["plain"], 3),
        "plain_again": round(seconds["plain again"] / seconds["plain"], 3),
        "chosen": chosen.note,
    }


def line(row: Row) -> str:
    head = f"{row['layer']:42s} | {row['pattern']:>4s} | plain {row['plain_ms']:9.4f} ms"
    return f"{head} | auto {row['times_plain']:.3f}x | plain again {row['plain_again']:.3f}x | {row['chosen']}"


def main() -> None:
    parser = arguments(__doc__, rounds="the least; quick layers get up to 1000")
    parser.add_argument("--layer", nargs="*", choices=("linear", "conv2d"), default=["linear", "conv2d"])
    parser.add_argument("--pattern", nargs="*", default=["2:4", "4:32"])
    args = begin(parser)
    rows = (
        measure(name, layer, input, pattern, args.rounds)
        for kind in args.layer
        for name, layer, input in layers(kind)
        for pattern in args.pattern
    )
    measured = finish(args, "auto", rows, line)
    slowest = max(measured, key=lambda row: row["times_plain"])
    print(f"slowest beside plain: {slowest['times_plain']:.3f}x, {slowest['layer']}, {slowest['pattern']}")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: BSD-3-Clause
"""Measures the call overhead of converted layers that prune nothing: microseconds more than the plain layer.

The layers are tiny ones, which are held exact or too small for auto, and the smallest ones that auto measures and
leaves exact. Forward, and forward with backward, are timed. Each difference is the median over rounds of two
consecutive calls, with its 95 % interval; a second plain layer shows the noise.

    python benchmarks/overhead.py
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from bench import Row, arguments, begin, finish, median_and_interval
from torch import Tensor, nn

import sdgp
from sdgp._timing import seconds

REPEATS = 5

# A function that makes the layer, and the shape of its input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear 16 -> 16, (8, 16)": (lambda: nn.Linear(16, 16), (8, 16)),
    "linear 16 -> 16, (2, 4, 16)": (lambda: nn.Linear(16, 16), (2, 4, 16)),
    "conv 1x1 16 -> 16, (1, 16, 4, 4)": (lambda: nn.Conv2d(16, 16, 1), (1, 16, 4, 4)),
    "linear 256 -> 256, (256, 256)": (lambda: nn.Linear(256, 256), (256, 256)),
    "conv 1x1 256 -> 256, (4, 256, 8, 8)": (lambda: nn.Conv2d(256, 256, 1), (4, 256, 8, 8)),
}


def states(plain: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers to compare with the plain one."""
    held = sdgp.convert(copy.deepcopy(plain), backend="pruned")
    held.hold("benchmark", "held")  # type: ignore[operator]
    return {
        "plain again": copy.deepcopy(plain),
        "auto": sdgp.convert(copy.deepcopy(plain)),
        "held exact": held,
    }


def repeat(call: Callable[[], object]) -> None:
    for _ in range(REPEATS):
        call()


def difference(call: Callable[[], object], plain: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Returns the median difference in microseconds and the ends of its 95 % interval."""
    differences = []
    for index in range(rounds):
        calls = (call, plain) if index % 2 else (plain, call)  # alternate which one comes first
        times = {each: seconds(functools.partial(repeat, each)) / REPEATS for each in calls}
        differences.append(1e6 * (times[call] - times[plain]))
    return median_and_interval(differences)


def measure(name: str, rounds: int) -> Iterator[Row]:
    make, shape = LAYERS[name]
    plain, x = make(), torch.randn(shape, requires_grad=True)
    gradient = torch.randn_like(plain(x))

    def forward(layer: nn.Module) -> Callable[[], Tensor]:
        return lambda: layer(x)

    def step(layer: nn.Module) -> Callable[[], object]:
        leaves = (x, *layer.parameters())

        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            layer(x).backward(gradient)

        return run

    for state, layer in states(plain).items():
        with sdgp.Chooser(timer=lambda call, device: 1.0):  # with equal times, auto finds that sparse is not faster
            step(layer)()
            for part, make_call in (("forward", forward), ("forward and backward", step)):
                added, low, high = (round(us, 2) for us in difference(make_call(layer), make_call(plain), rounds))
                yield {"layer": name, "state": state, "part": part, "added_us": added, "low_us": low, "high_us": high}


def rows(rounds: int) -> Iterator[Row]:
    for name in LAYERS:
        yield from measure(name, rounds)


def line(row: Row) -> str:
    head = f"{row['layer']:36s} | {row['state']:11s} | {row['part']:20s}"
    return f"{head} | {row['added_us']:+6.1f} us [{row['low_us']:6.1f}, {row['high_us']:6.1f}]"


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=1000)
    args = begin(parser)
    finish(args, "overhead", rows(args.rounds), line)


if __name__ == "__main__":
    main()

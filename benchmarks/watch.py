# SPDX-License-Identifier: BSD-3-Clause
"""Measures the cost of sdgp.watch and sdgp.Budget: steps with and without a record, and the time to ask for advice.

Prints one line per model: the milliseconds of both steps, and the cost if every 100th step is recorded. Then come the
times of the first call for advice, which times the products, and of a later call, as numbers of steps, and the cost of
the later call at every 1000th step.

    python benchmarks/watch.py --model resnet18 transformer
"""

from __future__ import annotations

import copy

from bench import Row, arguments, begin, finish, interleaved
from torch import Tensor, nn
from train_step import METHOD, MODELS

import sdgp
from sdgp._timing import cross_entropy, seconds, training_step

EVERY = 100
EVERY_ADVICE = 1000


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model, *batch)


def measure(name: str, rounds: int) -> Row:
    model, input, target = MODELS[name]()
    budget = sdgp.Budget(copy.deepcopy(model), loss, every=1)
    advices = [seconds(lambda: budget.step((input, target))) for _ in range(2)]
    sdgp.convert(model, "2:4", METHOD, backend="pruned")
    watched = copy.deepcopy(model)
    watch = sdgp.watch(watched, every=1)
    times = interleaved(
        {key: training_step(net, input, target) for key, net in (("plain", model), ("recorded", watched))}, rounds
    )
    plain, recorded = (1e3 * times[key] for key in ("plain", "recorded"))
    first, later = (1e3 * advice / plain for advice in advices)
    return {
        "model": name,
        "layers": len(watch),
        "plain_ms": round(plain, 2),
        "recorded_ms": round(recorded, 2),
        "every": EVERY,
        "cost": round((recorded / plain - 1) / EVERY, 5),
        "first_advice_steps": round(first, 1),
        "advice_steps": round(later, 1),
        "advice_cost": round(later / EVERY_ADVICE, 5),
    }


def line(row: Row) -> str:
    times = (
        f"plain {row['plain_ms']:9.2f} ms | recorded {row['recorded_ms']:9.2f} ms | {row['cost']:6.2%} every {EVERY}"
    )
    advice = f"first {row['first_advice_steps']}, later {row['advice_steps']} steps: {row['advice_cost']:.2%}"
    return f"{row['model']:12} | {row['layers']:3} layers | {times} | advice: {advice} every {EVERY_ADVICE}"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    args = begin(parser)
    finish(args, "watch", (measure(name, args.rounds) for name in args.model), line)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: BSD-3-Clause
"""What sdgp.watch costs: training steps of converted models that are recorded beside steps that are not, in turn.

One line per model: milliseconds of both, and what that comes to when every 100th step is recorded.

    python benchmarks/watch.py --model resnet18 transformer
"""

from __future__ import annotations

import copy
from typing import Any

from bench import arguments, begin, interleaved, store
from train_step import METHOD, MODELS

import sdgp
from sdgp._timing import training_step

EVERY = 100


def measure(name: str, rounds: int) -> dict[str, Any]:
    model, input, target = MODELS[name]()
    sdgp.convert(model, "2:4", METHOD, backend="pruned")
    watched = copy.deepcopy(model)
    watch = sdgp.watch(watched, every=1)
    times = interleaved(
        {key: training_step(net, input, target) for key, net in (("plain", model), ("recorded", watched))}, rounds
    )
    plain, recorded = (1e3 * times[key] for key in ("plain", "recorded"))
    return {
        "model": name,
        "layers": len(watch),
        "plain_ms": round(plain, 2),
        "recorded_ms": round(recorded, 2),
        "every": EVERY,
        "cost": round((recorded / plain - 1) / EVERY, 5),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    machine = begin(args)
    rows = []
    print(f"{'model':12} | {'layers':>6} | {'plain ms':>9} | {'recorded ms':>11} | cost, every {EVERY}")
    for name in args.model:
        rows.append(row := measure(name, args.rounds))
        times = f"{row['plain_ms']:9.2f} | {row['recorded_ms']:11.2f}"
        print(f"{row['model']:12} | {row['layers']:6} | {times} | {row['cost']:.2%}", flush=True)
    if machine:
        store("watch", machine, rows, args.store)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: BSD-3-Clause
"""Many training steps of small converted models: what stays in memory after them.

One line per backend and method: the growth of the resident memory, in KiB, between the first tenth of the steps and the
last, and of the number of objects that Python's collector knows.

    python benchmarks/soak.py --steps 10000
"""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
from bench import arguments, begin, store
from torch import nn

import sdgp
from sdgp import backends
from sdgp._timing import training_step


def resident_bytes() -> int:
    """Of this process, once what nobody needs is gone."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def measure(method: str, backend: str, steps: int) -> dict[str, Any]:
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 64)
    )
    sdgp.convert(model, "2:4", method, backend=backend)
    watch = sdgp.watch(model, every=100)
    step = training_step(model, torch.randn(16, 8, 8, 8), torch.randint(64, (16,)))
    first = steps // 10
    for _ in range(first):
        step()
    memory, objects = resident_bytes(), len(gc.get_objects())
    for _ in range(steps - first):
        step()
    growth = resident_bytes() - memory
    return {
        "method": method,
        "backend": backend,
        "steps": steps,
        "records": sum(len(record["step"]) for record in watch.values()),
        "resident_mib": round(memory / 2**20, 1),
        "growth_kib": round(growth / 2**10),
        "objects_growth": len(gc.get_objects()) - objects,
    }


def main() -> None:
    parser = arguments(__doc__, "not used here")
    parser.add_argument("--steps", type=int, default=10_000)
    args = parser.parse_args()
    machine = begin(args)
    backends.LEAST_WORK = 0  # so that auto looks at these small layers
    rows = []
    for method, backend in (("mvue", "auto"), ("mvue", "sparse"), ("rescale", "pruned"), ("random", "dense")):
        rows.append(row := measure(method, backend, args.steps))
        grown = f"{row['growth_kib']:+} KiB, objects {row['objects_growth']:+}"
        print(f"{method:8} | {backend:6} | {args.steps} steps, {row['records']} records | {grown}", flush=True)
    if machine:
        store("soak", machine, rows, args.store)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: BSD-3-Clause
"""Looks for memory leaks in many training steps of small converted models.

Prints one line per backend and method: how much the resident memory, in KiB, the number of tensors, and the number of
all objects that Python's garbage collector knows grow after the first tenth of the steps.

    python benchmarks/soak.py --steps 10000
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import torch
from bench import Row, arguments, begin, finish
from torch import Tensor, nn

import sdgp
from sdgp._timing import training_step

SETTINGS = (
    ("mvue", "auto"),
    ("random", "auto"),
    ("mvue", "pruned"),
    ("random", "pruned"),
    ("rescale", "pruned"),
    ("mvue", "sparse"),
    ("random", "dense"),
)


def resident_bytes() -> int:
    """Returns the resident memory of this process after a garbage collection."""
    gc.collect()
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def alive() -> tuple[int, int]:
    """Returns the number of tensors and of all objects."""
    objects = gc.get_objects()
    return sum(issubclass(type(each), Tensor) for each in objects), len(objects)


def measure(method: str, backend: str, steps: int) -> Row:
    model = nn.Sequential(
        *(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten()),
        *(nn.Linear(256, 1024), nn.Linear(1024, 1024)),  # the last is large enough for auto to measure
    )
    sdgp.convert(model, "2:4", method, backend=backend)
    watch = sdgp.watch(model, every=100)
    step = training_step(model, torch.randn(16, 8, 8, 8), torch.randint(1024, (16,)))
    first = steps // 10
    for _ in range(first):
        step()
    memory, (tensors, objects) = resident_bytes(), alive()
    for _ in range(steps - first):
        step()
    growth = resident_bytes() - memory
    tensors_now, objects_now = alive()
    return {
        "method": method,
        "backend": backend,
        "steps": steps,
        "records": sum(len(record["step"]) for record in watch.values()),
        "resident_mib": round(memory / 2**20, 1),
        "growth_kib": round(growth / 2**10),
        "tensors_growth": tensors_now - tensors,
        "objects_growth": objects_now - objects,
    }


def rows(steps: int) -> Iterator[Row]:
    with sdgp.Chooser(margin=1e9, least_work=0):  # always chooses the sparse product
        measure(*SETTINGS[0], steps)  # makes all one-time allocations of the process
        for method, backend in SETTINGS:
            yield measure(method, backend, steps)


def line(row: Row) -> str:
    grown = f"{row['growth_kib']:+} KiB, tensors {row['tensors_growth']:+}, objects {row['objects_growth']:+}"
    return f"{row['method']:8} | {row['backend']:6} | {row['steps']} steps, {row['records']} records | {grown}"


def main() -> None:
    parser = arguments(__doc__, "not used here")
    parser.add_argument("--steps", type=int, default=10_000)
    args = begin(parser)
    finish(args, "soak", rows(args.steps), line)


if __name__ == "__main__":
    main()

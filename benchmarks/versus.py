# SPDX-License-Identifier: BSD-3-Clause
"""Is this sdgp slower than another one? Both are installed, each in an environment of its own, and run in turn.

One line per case: milliseconds of this sdgp, and its time as a multiple of the other's: the median of the rounds'
ratios, with its 95 % interval. Only what both offer as public API is measured.

    python benchmarks/versus.py --other /path/to/other/bin/python
    python benchmarks/versus.py --other /path/to/other/bin/python --case prune linear --rounds 40
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import models
import torch
from bench import ROOT, arguments, begin, interval, store
from torch import nn

import sdgp
from sdgp._timing import training_step

Case = Callable[[], object]


def prune(shape: tuple[int, ...], dim: int, pattern: str, method: str, dtype: torch.dtype = torch.float32) -> Case:
    x, (n, m) = torch.randn(shape).to(dtype), sdgp.Pattern.parse(pattern)
    return lambda: sdgp.prune_nm(x, n, m, dim, method)


def layer(make: Callable[[], nn.Module], shape: tuple[int, ...], pattern: str, backend: str) -> Case:
    module = sdgp.convert(make(), pattern, "mvue", backend=backend)
    x = torch.randn(shape)
    if x.ndim == 4:
        module, x = (value.to(memory_format=torch.channels_last) for value in (module, x))  # type: ignore[assignment]
    x.requires_grad_()
    gradient = torch.randn_like(module(x))

    def run() -> None:
        x.grad = None
        module.zero_grad()
        module(x).backward(gradient)

    return run


def step(name: str, pattern: str, backend: str) -> Case:
    if name == "resnet18":
        model = models.resnet18().to(memory_format=torch.channels_last)
        input = torch.randn(16, 3, 32, 32).to(memory_format=torch.channels_last)
        target = torch.randint(10, (16,))
    else:
        model = models.Transformer()
        input, target = torch.randint(256, (2, 8, 128)).unbind()
    return training_step(sdgp.convert(model, pattern, "mvue", backend=backend), input, target)


def linear(features_in: int, features_out: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(features_in, features_out)


def conv(channels_in: int, channels_out: int, kernel: int) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2)


CASES: dict[str, dict[str, Callable[[], Case]]] = {
    "prune": {
        f"prune {method} {pattern} {name}": lambda shape=shape, dim=dim, pattern=pattern, method=method, dtype=dtype: (
            prune(shape, dim, pattern, method, dtype)
        )
        for name, shape, dim, dtype in (
            ("rows", (4096, 1024), -1, torch.float32),
            ("NCHW", (64, 64, 32, 32), 1, torch.float32),
            ("bfloat16 rows", (4096, 1024), -1, torch.bfloat16),
        )
        for method in ("magnitude", "mvue", "rescale", "rescale_group", "random")
        for pattern in ("2:4", "8:16", "4:32")
    },
    "linear": {
        f"linear {a} -> {b}, {rows} rows, {pattern} {backend}": (
            lambda a=a, b=b, rows=rows, p=pattern, backend=backend: layer(linear(a, b), (rows, a), p, backend)
        )
        for a, b, rows in ((64, 64, 8), (768, 3072, 1024), (3072, 768, 1024))
        for pattern in ("2:4", "4:16")
        for backend in ("sparse", "dense", "auto")
    },
    "conv": {
        f"conv {k}x{k} {a} -> {b}, {size}x{size}, {pattern} {backend}": (
            lambda a=a, b=b, k=k, size=size, p=pattern, backend=backend: layer(
                conv(a, b, k), (16, a, size, size), p, backend
            )
        )
        for k, a, b, size in ((3, 64, 64, 32), (3, 256, 256, 8), (1, 256, 64, 28), (1, 16, 16, 4))
        for pattern in ("2:4", "4:16")
        for backend in ("sparse", "dense", "auto")
    },
    "step": {
        f"step {name} {pattern} {backend}": lambda name=name, pattern=pattern, backend=backend: step(
            name, pattern, backend
        )
        for name in ("resnet18", "transformer")
        for pattern, backend in (("2:4", "auto"), ("4:32", "sparse"))
    },
}


def serve() -> None:
    """Runs cases as the parent asks for them: a name a line, the milliseconds of one call a line back."""
    cases = {name: make for group in CASES.values() for name, make in group.items()}
    name, call = "", None
    for line in sys.stdin:
        if line.strip() != name:
            name = line.strip()
            torch.manual_seed(0)
            call = cases[name]()
            for _ in range(3):  # caches are warm and choices made
                call()
        assert call is not None
        call()
        start = time.perf_counter()
        repeats = 0
        while repeats < 1 or time.perf_counter() - start < 2e-3:
            call()
            repeats += 1
        print(json.dumps(1e3 * (time.perf_counter() - start) / repeats), flush=True)


class Side:
    """One of the two environments, in a process of its own."""

    def __init__(self, python: str, threads: int) -> None:
        command = [python, __file__, "--serve", "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def milliseconds(self, case: str) -> float:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(case + "\n")
        process.stdin.flush()
        return float(json.loads(process.stdout.readline()))


def compare(case: str, this: Side, other: Side, rounds: int) -> dict[str, Any]:
    mine, ratios = [], []
    for index in range(rounds):
        sides = (this, other) if index % 2 else (other, this)  # neither always comes first
        times = {side: side.milliseconds(case) for side in sides}
        mine.append(times[this])
        ratios.append(times[this] / times[other])
    ratios.sort()
    low, high = interval(rounds)
    ms, ratio = statistics.median(mine), statistics.median(ratios)
    row = {"case": case, "ms": round(ms, 4), "ratio": round(ratio, 4)}
    return row | {"low": round(ratios[low], 4), "high": round(ratios[high], 4)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--other", metavar="PYTHON", help="the interpreter of the environment with the other sdgp")
    parser.add_argument("--case", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--serve", action="store_true", help="used by this program itself")
    args = parser.parse_args()
    machine = begin(args)
    if args.serve:
        serve()
        return
    if args.other is None:
        raise SystemExit("versus: expected --other, the interpreter of an environment with another sdgp, got none")
    this, other = Side(sys.executable, args.threads), Side(args.other, args.threads)
    rows = []
    for group in args.case:
        for case in CASES[group]:
            rows.append(compare(case, this, other, args.rounds))
            row = rows[-1]
            ratio = f"{row['ratio']:.3f} of the other [{row['low']:.3f}, {row['high']:.3f}]"
            print(f"{case:48s} | {row['ms']:9.3f} ms | {ratio}", flush=True)
    median = statistics.median(row["ratio"] for row in rows)
    print(f"median over {len(rows)} cases: {median:.3f}")
    if machine is not None:
        store("versus", machine, rows, args.store)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: BSD-3-Clause
"""How benchmarks and ``sdgp bench`` measure: all candidates in turn, round after round, in one process; medians. Not
API."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._clock import synchronize
from ._convert import convert
from ._report import report


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], rounds: int = 15, device: torch.device | None = None
) -> dict[str, float]:
    """Median seconds of each candidate; each gets its turn in every round, so that a slow moment hits all alike.

    An untimed call comes right before the timed one: each finds caches and allocator as it leaves them itself, whatever
    ran before.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            call()
            times[name].append(seconds(call, device))
    return {name: statistics.median(values) for name, values in times.items()}


def seconds(call: Callable[[], Any], device: torch.device | None = None) -> float:
    """Wall-clock seconds of one call, including the work that it started on ``device``."""
    if device is not None:
        synchronize(device)
    start = time.perf_counter()
    call()
    if device is not None:
        synchronize(device)
    return time.perf_counter() - start


def training_step(model: nn.Module, input: Tensor, target: Tensor) -> Callable[[], None]:
    """Forward, backward and SGD with momentum; the model's output is (..., classes), ``target`` (...)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        output = model(input)
        torch.autograd.backward(F.cross_entropy(output.flatten(0, -2), target.flatten()))
        optimizer.step()

    return step


def steps_beside_plain(
    model: nn.Module,
    input: Tensor,
    target: Tensor,
    patterns: Sequence[str],
    method: str,
    backends: Sequence[str],
    rounds: int,
) -> list[dict[str, Any]]:
    """Training steps of the plain model beside converted copies of it: a row per pattern and backend.

    ``noise`` is what a second copy of the plain model seems to save.
    """
    converted = {
        (pattern, backend): convert(copy.deepcopy(model), pattern, method, backend=backend)
        for pattern in patterns
        for backend in backends
    }
    candidates = {"plain": training_step(model, input, target)}
    for (pattern, backend), twin in converted.items():
        candidates[f"{pattern} {backend}"] = training_step(twin, input, target)
    candidates["plain again"] = training_step(copy.deepcopy(model), input, target)
    times = interleaved(candidates, rounds, input.device)
    milliseconds = {candidate: 1e3 * elapsed for candidate, elapsed in times.items()}
    plain = milliseconds["plain"]
    rows = []
    for (pattern, backend), twin in converted.items():
        layers = [row for row in report(twin) if row.pattern and row.gradient == "data"]
        rows.append(
            {
                "pattern": pattern,
                "method": method,
                "backend": backend,
                "plain_ms": round(plain, 2),
                "converted_ms": round(milliseconds[f"{pattern} {backend}"], 2),
                "saved": round(1 - milliseconds[f"{pattern} {backend}"] / plain, 4),
                "noise": round(1 - milliseconds["plain again"] / plain, 4),
                "layers": len(layers),
                "layers_sparse": sum(row.product == "sparse" for row in layers),
            }
        )
    return rows

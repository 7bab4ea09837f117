# SPDX-License-Identifier: BSD-3-Clause
"""Timing for ``profile``, ``advise``, ``sdgp bench``, the benchmarks and the study. This module is not public API.

One process runs all candidates one after the other in every round. The result of a candidate is its
median; ``profile`` and ``advise`` take the shortest time.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._clock import synchronize
from ._convert import PlanLike, convert
from ._report import report

#: A function of model, input and target that returns the loss.
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], rounds: int = 15, device: torch.device | None = None
) -> dict[str, float]:
    """Returns the median seconds of each candidate, measured by ``rounds_of``."""
    return {name: statistics.median(values) for name, values in rounds_of(candidates, rounds, device).items()}


def rounds_of(
    candidates: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device | None = None, *, warm: bool = True
) -> dict[str, list[float]]:
    """Returns the seconds of each candidate in every round.

    Every round runs all candidates, so that a slow phase of the machine affects all of them alike.

    Args:
        warm: if True, an untimed call of the candidate precedes every timed call. The candidate then finds the caches
            and the allocator as it left them itself. If False, each candidate has one untimed call before the first
            round.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    if not warm:
        for call in candidates.values():
            call()
    for _ in range(rounds):
        for name, call in candidates.items():
            if warm:
                call()
            times[name].append(seconds(call, device))
    return times


def interval(count: int) -> tuple[int, int]:
    """Returns the indices, among ``count`` sorted values, of the ends of the 95 % interval of their median."""
    half = 0.98 * math.sqrt(count)
    return max(0, math.floor(count / 2 - half)), min(count - 1, math.ceil(count / 2 + half))


def seconds(call: Callable[[], Any], device: torch.device | None = None) -> float:
    """Returns the wall-clock seconds of one call, including the work that it started on ``device``."""
    if device is not None:
        synchronize(device)
    start = time.perf_counter()
    call()
    if device is not None:
        synchronize(device)
    return time.perf_counter() - start


def cross_entropy(model: nn.Module, input: Tensor, target: Tensor) -> Tensor:
    """Returns the cross-entropy of a model with outputs of shape (..., classes) and a ``target`` of shape (...)."""
    return F.cross_entropy(model(input).flatten(0, -2), target.flatten())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Returns SGD with momentum over the parameters that require a gradient."""
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return torch.optim.SGD(trained, lr=1e-3, momentum=0.9)


def training_step(
    model: nn.Module,
    input: Tensor,
    target: Tensor,
    autocast: torch.dtype | None = None,
    loss: Loss = cross_entropy,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
) -> Callable[[], None]:
    """Returns a function that runs a training step: forward, backward and the optimizer's step.

    Args:
        autocast: the dtype of the forward under ``torch.autocast``. With None, autocast is off.
        loss: a function of the model, ``input`` and ``target``.
    """
    optimizer = make_optimizer(model)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(input.device.type, autocast, enabled=autocast is not None):
            value = loss(model, input, target)
        torch.autograd.backward(value)
        optimizer.step()

    return step


def steps_beside_plain(
    model: nn.Module,
    input: Tensor,
    target: Tensor,
    patterns: Sequence[str] | Mapping[str, PlanLike],
    method: str,
    backends: Sequence[str],
    rounds: int,
    autocast: torch.dtype | None = None,
    *,
    filter: Callable[[nn.Module, str], bool] | None = None,
    loss: Loss = cross_entropy,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
) -> list[dict[str, Any]]:
    """Times training steps of the plain model, of a plain copy under bfloat16 autocast, and of converted copies.

    Args:
        patterns: ``"n:m"`` prunes the data gradient, ``"n:m + n:m"`` the data and the weight gradient. A mapping gives
            plans by name instead.
        autocast: the dtype of ``torch.autocast`` for all other copies. With None, autocast is off.
        filter: as ``convert`` takes it.
        loss, make_optimizer: as ``training_step`` takes them.

    Returns:
        A row for each pattern and backend. ``saved`` is the median over the rounds of 1 - converted / plain;
        ``saved_low`` and ``saved_high`` are the ends of its 95 % interval. ``plain_again_saved`` is what a second
        copy of the plain model seems to save. ``bfloat16_saved`` is what a plain copy under bfloat16 autocast saves.
        Pruning has to beat the faster of the plain model and this copy.
    """

    def step(net: nn.Module, dtype: torch.dtype | None = autocast) -> Callable[[], None]:
        return training_step(net, input, target, dtype, loss, make_optimizer)

    plans: Mapping[str, PlanLike] = patterns if isinstance(patterns, Mapping) else {}
    converted = {
        (pattern, backend): _converted(copy.deepcopy(model), plans.get(pattern, pattern), method, backend, filter)
        for pattern in patterns
        for backend in backends
    }
    candidates = {
        "plain": step(model),
        "plain bfloat16": step(copy.deepcopy(model), torch.bfloat16),
    }
    once = rounds_of(candidates, 1, input.device, warm=False)
    if once["plain bfloat16"][0] > 2 * once["plain"][0]:
        del candidates["plain bfloat16"]  # a CPU without bfloat16 instructions takes many times as long
    for (pattern, backend), twin in converted.items():
        candidates[f"{pattern} {backend}"] = step(twin)
    candidates["plain again"] = step(copy.deepcopy(model))
    times = rounds_of(candidates, rounds, input.device, warm=False)  # no warm-up: a step evicts its own data anyway
    plain = times["plain"]
    of_bfloat16 = times if "plain bfloat16" in times else once
    bfloat16_saved = _saved(of_bfloat16["plain bfloat16"], of_bfloat16["plain"])
    shared = {
        "plain_ms": round(1e3 * statistics.median(plain), 2),
        "plain_again_saved": round(statistics.median(_saved(times["plain again"], plain)), 4),
        "bfloat16_saved": round(statistics.median(bfloat16_saved), 4),
    }
    return [
        {"pattern": pattern, "method": method, "backend": backend}
        | shared
        | _beside(times[f"{pattern} {backend}"], plain)
        | _counts(twin)
        for (pattern, backend), twin in converted.items()
    ]


def _beside(own: Sequence[float], plain: Sequence[float]) -> dict[str, float]:
    """Returns the time of a converted copy, and what it saves beside the plain model."""
    saved, (low, high) = sorted(_saved(own, plain)), interval(len(own))
    return {
        "converted_ms": round(1e3 * statistics.median(own), 2),
        "saved": round(statistics.median(saved), 4),
        "saved_low": round(saved[low], 4),
        "saved_high": round(saved[high], 4),
    }


def _counts(model: nn.Module) -> dict[str, int]:
    """Returns for each gradient how many layers may prune it, and how many of them take the sparse product."""
    result: dict[str, int] = {}
    for gradient, name in (("data", "layers"), ("weight", "weights")):
        rows = [row for row in report(model) if row.pattern and row.gradient == gradient]
        result |= {name: len(rows), f"{name}_sparse": sum(row.product == "sparse" for row in rows)}
    return result


def _converted(
    model: nn.Module,
    pattern: str | PlanLike,
    method: str,
    backend: str,
    filter: Callable[[nn.Module, str], bool] | None,
) -> nn.Module:
    if not isinstance(pattern, str):
        return convert(model, pattern, backend=backend)
    data, _, weight = pattern.partition(" + ")
    weight_grad = (weight, method) if weight else None
    return convert(model, data, method, backend=backend, filter=filter, weight_grad=weight_grad)


def _saved(own: Sequence[float], plain: Sequence[float]) -> list[float]:
    """Returns the share of the plain model's time that a copy saved in each round."""
    return [1 - mine / other for mine, other in zip(own, plain, strict=True)]

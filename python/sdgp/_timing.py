# SPDX-License-Identifier: BSD-3-Clause
"""How benchmarks and ``sdgp bench`` measure: all candidates in turn, round after round, in one process; medians. Not
API."""

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

#: The loss of a model on one batch, from input and target.
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], rounds: int = 15, device: torch.device | None = None
) -> dict[str, float]:
    """Median seconds of each candidate, see ``rounds_of``."""
    return {name: statistics.median(values) for name, values in rounds_of(candidates, rounds, device).items()}


def rounds_of(
    candidates: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device | None = None, *, warm: bool = True
) -> dict[str, list[float]]:
    """The seconds of each candidate in every round; each gets its turn in each, so that a slow moment hits all alike.

    Where ``warm``, an untimed call comes right before the timed one: each finds caches and allocator as it leaves them
    itself, whatever ran before. Else all candidates have one untimed call before the first round.
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
    """The places, among ``count`` sorted values, of the ends of their median's 95 % interval."""
    half = 0.98 * math.sqrt(count)
    return max(0, math.floor(count / 2 - half)), min(count - 1, math.ceil(count / 2 + half))


def seconds(call: Callable[[], Any], device: torch.device | None = None) -> float:
    """Wall-clock seconds of one call, including the work that it started on ``device``."""
    if device is not None:
        synchronize(device)
    start = time.perf_counter()
    call()
    if device is not None:
        synchronize(device)
    return time.perf_counter() - start


def cross_entropy(model: nn.Module, input: Tensor, target: Tensor) -> Tensor:
    """The loss of a model whose output is (..., classes); ``target`` is (...)."""
    return F.cross_entropy(model(input).flatten(0, -2), target.flatten())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum over the parameters that need a gradient."""
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
    """Forward, backward and the optimizer's step.

    Args:
        autocast: the dtype of the forward under ``torch.autocast``; None: as the model is.
        loss: from the model, ``input`` and ``target``.
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
    """Training steps of the plain model beside converted copies of it: a row per pattern and backend.

    A pattern is that of the data gradient, or ``"n:m + n:m"``: of data and weight gradient; or plans, by name. What is
    saved is the median over the rounds of 1 - converted / plain, with the ends of its 95 % interval; ``noise`` is what
    a second copy of the plain model seems to save, ``bfloat16_saved`` what one under bfloat16 autocast does: the faster
    of the two is what pruning has to beat. With ``autocast`` all others run under it too. ``filter`` is ``convert``'s;
    ``loss`` and ``make_optimizer`` are ``training_step``'s.
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
        del candidates["plain bfloat16"]  # the CPU has no instruction for it, and a step takes many times as long
    for (pattern, backend), twin in converted.items():
        candidates[f"{pattern} {backend}"] = step(twin)
    candidates["plain again"] = step(copy.deepcopy(model))
    times = rounds_of(candidates, rounds, input.device, warm=False)  # a step leaves its own caches cold
    plain = times["plain"]
    low, high = interval(rounds)
    noise = statistics.median(_saved(times["plain again"], plain))
    of_bfloat16 = times if "plain bfloat16" in times else once
    bfloat16 = statistics.median(_saved(of_bfloat16["plain bfloat16"], of_bfloat16["plain"]))
    rows = []
    for (pattern, backend), twin in converted.items():
        own = times[f"{pattern} {backend}"]
        saved = sorted(_saved(own, plain))
        layers = [row for row in report(twin) if row.pattern]
        weights = [row for row in layers if row.gradient == "weight"]
        data = [row for row in layers if row.gradient == "data"]
        rows.append(
            {
                "pattern": pattern,
                "method": method,
                "backend": backend,
                "plain_ms": round(1e3 * statistics.median(plain), 2),
                "converted_ms": round(1e3 * statistics.median(own), 2),
                "saved": round(statistics.median(saved), 4),
                "saved_low": round(saved[low], 4),
                "saved_high": round(saved[high], 4),
                "noise": round(noise, 4),
                "bfloat16_saved": round(bfloat16, 4),
                "layers": len(data),
                "layers_sparse": sum(row.product == "sparse" for row in data),
                "weights": len(weights),
                "weights_sparse": sum(row.product == "sparse" for row in weights),
            }
        )
    return rows


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
    """The share of the plain model's time that a copy saved, in each round."""
    return [1 - mine / other for mine, other in zip(own, plain, strict=True)]

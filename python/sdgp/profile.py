# SPDX-License-Identifier: BSD-3-Clause
"""What each converted layer's data gradient costs, dense beside sparse, on a real batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ._step import on_gradient, run_step, stand_in, state_kept
from .backends import describe, measure, synchronize
from .convert import check_module, format_table, paused
from .modules import PruningLayer


class LayerProfile(NamedTuple):
    """One call of one converted layer in the step: milliseconds of its data gradient."""

    layer: str
    shape: str  # of the output gradient
    pattern: str
    dense_ms: float
    sparse_ms: float  # pruning and packing included; NaN where the device has no sparse product
    share: float  # of the dense step that the dense data gradient takes
    backend: str


class Profile(list[LayerProfile]):
    """The rows that ``profile`` measured, and the whole step; prints as a table.

    Attributes:
        dense_ms: forward and backward of the model with every layer paused.
        step_ms: the same as it is converted.
    """

    dense_ms: float
    step_ms: float

    def __str__(self) -> str:
        head = ("layer", "gradient", "pattern", "dense ms", "sparse ms", "share", "backend")
        table = [
            (
                row.layer,
                row.shape,
                row.pattern,
                f"{row.dense_ms:.3f}",
                f"{row.sparse_ms:.3f}",
                f"{row.share:.1%}",
                row.backend,
            )
            for row in self
        ]
        lines = format_table(head, table)
        saved = 1 - self.step_ms / self.dense_ms
        lines.append(f"step: dense {self.dense_ms:.2f} ms, as converted {self.step_ms:.2f} ms, {saved:.1%} saved")
        return "\n".join(lines)

    __repr__ = __str__


def profile(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor] | None = None,
    *,
    rounds: int = 10,
) -> Profile:
    """Measures the data gradient of every converted layer on ``batch``, and the model's whole step.

    Runs forward and backward some dozens of times. Gradients of the parameters are put back as they were; buffers that
    a forward updates (BatchNorm's) and generators are too.

    Args:
        model: a model that ``sdgp.convert`` went over.
        batch: what the model is called with: a tensor, a tuple of positional or a mapping of keyword arguments.
        loss: from the model's output to a scalar. Default: the output's ``loss`` where it has one, else the mean of the
            squares of its floating-point tensors.
        rounds: of measuring; the median counts.

    Returns:
        A ``Profile``, a list of ``LayerProfile``; also printed.

    Raises:
        ValueError: ``profile: requirement, got actual``.

    Examples:
        >>> model = sdgp.convert(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)), "2:4")
        >>> result = sdgp.profile(model, torch.randn(8, 64))  # doctest: +ELLIPSIS
        layer | gradient | pattern | dense ms | sparse ms | share | backend
        ...
    """
    check_module("profile", model)
    layers = {module: name or "(model)" for name, module in model.named_modules() if isinstance(module, PruningLayer)}
    if not layers:
        raise ValueError("profile: expected a model with converted layers, got none: call sdgp.convert(model) first")
    if rounds < 1:
        raise ValueError(f"profile: expected rounds >= 1, got {rounds}")

    def step() -> None:
        run_step("profile", model, batch, loss)

    result = Profile()
    device = next(iter(layers)).weight.device
    with state_kept(model):
        step()  # warm-up; under auto, the choices are made here
        gradients: dict[PruningLayer, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
        handles = on_gradient(layers, lambda layer, grad, input: gradients[layer].append((grad, input)))
        step()
        for handle in handles:
            handle.remove()
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(rounds):
            for dense in (True, False):
                synchronize(device)
                start = time.perf_counter()
                if dense:
                    with paused(model):
                        step()
                else:
                    step()
                synchronize(device)
                times[dense].append(time.perf_counter() - start)
        result.dense_ms, result.step_ms = (1e3 * statistics.median(times[dense]) for dense in (True, False))
    for layer, name in layers.items():
        for grad_output, input in gradients[layer]:
            result.append(_measure_layer(layer, name, grad_output, input, rounds, result.dense_ms))
    print(result)
    return result


def _measure_layer(
    layer: PruningLayer, name: str, grad_output: Tensor, input: Tensor, rounds: int, step_ms: float
) -> LayerProfile:
    products = layer.products(grad_output, stand_in(input, grad_output))
    choice = measure(products, layer.pruning, rounds) if products.obstacle() is None else None
    return LayerProfile(
        layer=name,
        shape=str(tuple(grad_output.shape)),
        pattern=str(layer.pruning.pattern),
        dense_ms=choice.dense_ms if choice else float("nan"),
        sparse_ms=choice.sparse_ms if choice else float("nan"),
        share=choice.dense_ms / step_ms if choice else float("nan"),
        backend=describe(layer.pruning, layer.last_key).split(":")[0],
    )

# SPDX-License-Identifier: BSD-3-Clause
"""What each converted layer's data gradient costs, by each product, on a real batch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ._choose import current_chooser, kernels_run
from ._convert import paused
from ._layer import PruningLayer
from ._models import format_table, pruning_layers
from ._report import report
from ._step import Loss, on_gradient, run_step, stand_in, state_kept
from ._timing import seconds


class LayerProfile(NamedTuple):
    """One call of one converted layer in the step, and the milliseconds of its data gradient by each product.

    Attributes:
        shape: of the output gradient.
        exact_ms: not pruned.
        dense_ms: pruned, then multiplied by PyTorch's dense product.
        sparse_ms: pruned, packed and multiplied by the sparse product; NaN where the device has none. All three are NaN
            where no kernels run, as on the meta device.
        share: the part of the exact step that the exact data gradient takes.
        product: the one that the data gradient takes in the step, see ``sdgp.report``.
    """

    layer: str
    shape: str
    pattern: str
    exact_ms: float
    dense_ms: float
    sparse_ms: float
    share: float
    product: str


class Profile(list[LayerProfile]):
    """The rows that ``profile`` measured, and the whole step; prints as a table.

    Attributes:
        exact_ms: forward and backward of the model with every layer paused.
        step_ms: the same as it is converted.
    """

    exact_ms: float
    step_ms: float

    def __str__(self) -> str:
        head = ("layer", "gradient", "pattern", "exact ms", "pruned + dense ms", "sparse ms", "share", "product")
        table = [
            (
                row.layer,
                row.shape,
                row.pattern,
                *(f"{ms:.3f}" for ms in (row.exact_ms, row.dense_ms, row.sparse_ms)),
                f"{row.share:.1%}",
                row.product,
            )
            for row in self
        ]
        saved = 1 - self.step_ms / self.exact_ms
        return "\n".join(
            [
                *format_table(head, table),
                f"step: exact {self.exact_ms:.2f} ms, as converted {self.step_ms:.2f} ms, {saved:.1%} saved",
            ]
        )

    __repr__ = __str__


def profile(
    model: nn.Module,
    batch: Any,
    loss: Loss | None = None,
    *,
    rounds: int = 10,
) -> Profile:
    """Measures the data gradient of every converted layer on ``batch``, and the model's whole step, in which weight
    gradients are pruned where ``weight_grad`` says so.

    Runs forward and backward some dozens of times. Gradients of the parameters, buffers that a forward updates
    (BatchNorm's) and generators are put back as they were.

    Args:
        model: a model that ``sdgp.convert`` went over.
        batch: what the model is called with: a tensor, a tuple of positional or a mapping of keyword arguments.
        loss: ``loss(model, batch)`` runs the forward and returns a scalar. Default: the model is called with ``batch``,
            and the loss is its output's ``loss`` where it has one, else the mean of the squares of its floating-point
            tensors.
        rounds: how often each product and each step is timed; the median counts.

    Returns:
        A ``Profile``, a list of ``LayerProfile``; also printed.

    Raises:
        ValueError: ``profile: requirement, got actual``.

    Examples:
        >>> model = sdgp.convert(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)), "2:4")
        >>> result = sdgp.profile(model, torch.randn(8, 64))  # doctest: +ELLIPSIS
        layer | gradient | pattern | exact ms | pruned + dense ms | sparse ms | share | product
        ...
    """
    layers = pruning_layers("profile", model)
    if rounds < 1:
        raise ValueError(f"profile: expected rounds >= 1, got {rounds}")

    def step() -> None:
        run_step("profile", model, batch, loss)

    def exact_step() -> None:
        with paused(model):
            step()

    result = Profile()
    device = next(iter(layers)).weight.device
    gradients: dict[PruningLayer, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    times: dict[Callable[[], None], list[float]] = {exact_step: [], step: []}
    with state_kept(model):
        step()  # warms up; under auto, the choices are made here
        products = {row.layer: row.product for row in report(model) if row.gradient == "data"}
        with on_gradient(layers, lambda layer, grad, input: gradients[layer].append((grad, input))):
            step()
        for _ in range(rounds):
            for call, elapsed in times.items():
                elapsed.append(seconds(call, device))
    result.exact_ms, result.step_ms = (1e3 * statistics.median(times[call]) for call in (exact_step, step))
    for layer, name in layers.items():
        for grad_output, input in gradients[layer]:
            ms = _measure(layer, grad_output, input, rounds)
            result.append(
                LayerProfile(
                    layer=name,
                    shape=str(tuple(grad_output.shape)),
                    pattern=str(layer.pruning.pattern),
                    exact_ms=ms["exact"],
                    dense_ms=ms["dense"],
                    sparse_ms=ms.get("sparse", math.nan),
                    share=ms["exact"] / result.exact_ms,
                    product=products[name],
                )
            )
    print(result)
    return result


def _measure(layer: PruningLayer, grad_output: Tensor, input: Tensor, rounds: int) -> dict[str, float]:
    products = layer.products(grad_output, stand_in(input, grad_output))
    if not kernels_run(products.grad_output):
        return dict.fromkeys(("exact", "dense"), math.nan)
    names = ("exact", "dense", "sparse") if products.obstacle() is None else ("exact", "dense")
    return current_chooser().measure_all(products, names, rounds)

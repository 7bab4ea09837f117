# SPDX-License-Identifier: BSD-3-Clause
"""Measures the time of each converted layer's data gradient, with each product, on a real batch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._choose import current_chooser
from ._convert import paused
from ._layer import PruningLayer
from ._models import check_eager, check_whole, format_table, pruning_layers
from ._report import report
from ._rules import kernels_run
from ._step import Loss, check_optimizer, on_gradient, run_step, stand_in, state_kept
from ._timing import seconds


class LayerProfile(NamedTuple):
    """The times of the data gradient in one call of a converted layer, in milliseconds.

    All three times are NaN on a device without kernels, such as the meta device.

    Attributes:
        layer: the name of the layer in the model.
        shape: the shape of the output gradient.
        pattern: the pattern of the layer.
        exact_ms: the time of the exact product.
        dense_ms: the time to prune the gradient and multiply it with PyTorch's dense product.
        sparse_ms: the time to prune, pack and multiply it with the sparse product; NaN if the device has none.
        share: the exact data gradient's share of the time of the exact step.
        product: the product that the data gradient takes in the step, as in ``sdgp.report``.
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
    """The rows that ``profile`` measured, and the times of the whole step. It prints as a table.

    Attributes:
        exact_ms: milliseconds of a forward and backward with every layer paused.
        step_ms: milliseconds of a forward and backward of the converted model.
    """

    exact_ms: float
    step_ms: float

    def __str__(self) -> str:
        head = ("layer", "shape", "pattern", "exact ms", "pruned + dense ms", "sparse ms", "share", "product")
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
        saved = f"{1 - self.step_ms / self.exact_ms:.1%} saved"
        if not any(row.product in ("dense", "sparse") for row in self):
            saved = "nothing prunes"
        return "\n".join(
            [
                *format_table(head, table),
                f"step: exact {self.exact_ms:.2f} ms, as converted {self.step_ms:.2f} ms, {saved}",
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
    """Measures and prints the time of every converted layer's data gradient, and of the whole step, on ``batch``.

    In the step, weight gradients are pruned where ``weight_grad`` says so. The function runs forward and backward a few
    dozen times. It restores the parameters' gradients, the buffers that a forward updates (such as BatchNorm's) and the
    random number generators.

    Args:
        model: a model that ``sdgp.convert`` has converted.
        batch: the arguments of the model: a tensor, a tuple of positional or a mapping of keyword arguments.
        loss: ``loss(model, batch)`` runs the forward and returns a scalar. Default: the model is called with ``batch``.
            The loss is the attribute ``loss`` of the output if there is one, else the sum over its floating-point
            tensors of the mean of their squares.
        rounds: how often each product and each step is timed. The shortest time counts.

    Returns:
        A ``Profile``, which is a list of ``LayerProfile``.

    Raises:
        ValueError: If an argument is invalid, or an optimizer steps in the backward. The message reads
            ``profile: requirement, got actual``.

    Examples:
        >>> model = sdgp.convert(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)), "2:4")
        >>> result = sdgp.profile(model, torch.randn(8, 64))  # doctest: +ELLIPSIS
        layer | shape   | pattern | exact ms | pruned + dense ms | sparse ms | share | product
        ...
    """
    layers = pruning_layers("profile", model)
    if rounds < 1:
        raise ValueError(f"profile: expected rounds >= 1, got {rounds}")

    check_whole("profile", model)
    check_eager("profile", model)
    check_optimizer("profile", model.parameters())

    def step() -> None:
        run_step("profile", model, batch, loss)

    result = Profile()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    gradients: dict[PruningLayer, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    exact_times, times = [], []
    with state_kept("profile", model):
        step()  # warms up; with backend="auto", the layers choose their products here
        products = {row.layer: row.product for row in report(model) if row.gradient == "data"}
        with on_gradient(layers, lambda layer: lambda grad, input: gradients[layer].append((grad, input))):
            step()
        for _ in range(rounds):
            with paused(model):
                exact_times.append(seconds(step, device))
            times.append(seconds(step, device))
        result.exact_ms, result.step_ms = 1e3 * min(exact_times), 1e3 * min(times)
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

# SPDX-License-Identifier: BSD-3-Clause
"""What each converted layer's data gradient costs, dense beside sparse, on a real batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
        if isinstance(batch, Mapping):
            output = model(**batch)
        else:
            output = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
        torch.autograd.backward((_default_loss if loss is None else loss)(output))

    result = Profile()
    device = next(iter(layers)).weight.device
    with _state_kept(model):
        step()  # warm-up; under auto, the choices are made here
        gradients = _layer_gradients(layers, step)
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
        for grad_output, input in gradients.get(layer, ()):
            result.append(_measure_layer(layer, name, grad_output, input, rounds, result.dense_ms))
    print(result)
    return result


def _layer_gradients(
    layers: Mapping[PruningLayer, str], step: Callable[[], None]
) -> dict[PruningLayer, list[tuple[Tensor, Tensor]]]:
    """(output gradient, input) of every call of every layer that has a data gradient, from one step."""
    found: dict[PruningLayer, list[tuple[Tensor, Tensor]]] = {}

    def after_forward(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        input = (*args, *kwargs.values())[0]
        if output.requires_grad and input.requires_grad:
            calls = found.setdefault(layer, [])
            hook: Any = output.register_hook
            hook(lambda grad: calls.append((grad.detach(), input.detach())))

    handles = [layer.register_forward_hook(after_forward, with_kwargs=True) for layer in layers]
    try:
        step()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _measure_layer(
    layer: PruningLayer, name: str, grad_output: Tensor, input: Tensor, rounds: int, step_ms: float
) -> LayerProfile:
    products = layer.products(grad_output, input)
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


def _default_loss(output: Any) -> Tensor:
    if isinstance(getattr(output, "loss", None), Tensor):
        loss: Tensor = output.loss
        return loss
    tensors = [tensor for tensor in _tensors(output) if tensor.is_floating_point() and tensor.requires_grad]
    if not tensors:
        raise ValueError("profile: expected the model to return a tensor with a gradient, got none; pass loss=")
    return torch.stack([tensor.float().square().mean() for tensor in tensors]).sum()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (tensor for value in output.values() for tensor in _tensors(value))
    elif isinstance(output, (tuple, list)):
        yield from (tensor for value in output for tensor in _tensors(value))


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Puts gradients, buffers and generators back as they were."""
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    for parameter in parameters:
        parameter.grad = None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

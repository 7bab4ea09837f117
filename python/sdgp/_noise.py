# SPDX-License-Identifier: BSD-3-Clause
"""Measures the noise of a gradient: the noise from the choice of the minibatch, and the noise from pruning.

Noise is a variance: E |g - E g|², summed over the coordinates of the gradient g of all trained parameters. Each
coordinate is scaled as the optimizer scales its steps, see ``Norm``. The number of steps to reach a loss grows with the
noise of the gradient (McCandlish et al., "An Empirical Model of Large-Batch Training", 2018).
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ._decision import Products
from ._pattern import METHODS_THAT_DRAW, UNBIASED_METHODS
from ._step import Handles, Hook

Gradients = Mapping[nn.Parameter, Tensor]


class Norm(NamedTuple):
    """The norm in which noise is measured, for a gradient of all trained parameters.

    Attributes:
        kind: ``"euclidean"`` or ``"adam"``. With ``"adam"``, each coordinate is divided by sqrt(v) + eps, as in Adam's
            steps.
        scales: the factor for the gradient of each trained parameter; None stands for 1.
    """

    kind: str
    scales: dict[nn.Parameter, Tensor | None]

    @classmethod
    def of(cls, op: str, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Norm:
        """Returns the norm over the model's parameters that require a gradient and, if given, ``optimizer`` trains.

        Raises:
            ValueError: If there is no such parameter, or the optimizer has parameters of another model. The message
                reads ``op: requirement, got actual``.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError(f"{op}: expected a model with trainable parameters, got none that requires a gradient")
        if optimizer is None:
            return cls("euclidean", dict.fromkeys(parameters))
        if not hasattr(optimizer, "param_groups"):
            raise ValueError(f"{op}: expected optimizer to be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        unknown = len(groups.keys() - set(model.parameters()))
        if unknown:
            raise ValueError(f"{op}: expected an optimizer of this model, got {unknown} parameters of another")
        trained = [parameter for parameter in parameters if parameter in groups]
        if not trained:
            raise ValueError(f"{op}: expected an optimizer of trainable parameters, got none that requires a gradient")
        states = {parameter: optimizer.state.get(parameter, {}) for parameter in trained}
        stepped = [parameter for parameter, state in states.items() if state]
        if not stepped or not all(_is_adam(states[parameter], groups[parameter]) for parameter in stepped):
            return cls("euclidean", dict.fromkeys(trained))
        return cls("adam", {parameter: _adam_scale(states[parameter], groups[parameter]) for parameter in stepped})

    def squared(self, gradients: Gradients) -> float:
        return math.fsum(self.squared_of(parameter, gradient) for parameter, gradient in gradients.items())

    def squared_of(self, parameter: nn.Parameter, gradient: Tensor) -> float:
        """Returns the squared norm of one parameter's gradient; 0 if the parameter is not trained."""
        if parameter not in self.scales:
            return 0.0
        scale = self.scales[parameter]
        scaled = gradient if scale is None else gradient * scale
        return squared_norm(scaled)


def _is_adam(state: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    return "exp_avg_sq" in state and "step" in state and "betas" in group


def _adam_scale(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    beta = group["betas"][1]
    square = state.get("max_exp_avg_sq", state["exp_avg_sq"]).float()
    corrected: Tensor = square / (1 - beta ** float(state["step"]))
    scale: Tensor = 1 / (corrected.sqrt() + group["eps"])
    return scale


class Estimate(NamedTuple):
    """A mean and its relative standard error."""

    mean: float
    error: float


def batch_noise(gradients: Iterable[Gradients], norm: Norm) -> Estimate:
    """Estimates the noise from the choice of the batch: the mean of |g - g'|² / 2 over neighboring batches.

    Args:
        gradients: the gradients of one batch after another. At most two are in memory at a time.
    """
    values: list[float] = []
    last: Gradients | None = None
    for gradient in gradients:
        if last is not None:
            values.append(norm.squared(difference(gradient, last)) / 2)
        last = gradient
    mean = statistics.fmean(values)
    # The coordinates are many but not independent: estimates from one pair of batches were seen to be off by half.
    spread = statistics.stdev(values) / mean if len(values) > 1 and mean > 0 else 0.0
    return Estimate(mean, max(spread, 0.5) / math.sqrt(len(values)))


def noise_of_halves(whole: Gradients, one: Gradients, other: Gradients, norm: Norm) -> Estimate:
    """Estimates the same noise from one batch and its two halves: |h - h'|² |g|² / |h + h'|².

    The estimate holds for losses that are means and for losses that are sums over the samples.
    """
    together = norm.squared({parameter: gradient + other[parameter] for parameter, gradient in one.items()})
    scale = norm.squared(whole) / together if together else 0.25
    return Estimate(scale * norm.squared(difference(one, other)), 0.5)


def difference(one: Gradients, other: Gradients) -> dict[nn.Parameter, Tensor]:
    return {parameter: gradient - other[parameter] for parameter, gradient in one.items()}


class Errors(NamedTuple):
    """The squared errors of a pruned gradient p and another draw p' against the exact gradient g, summed over calls."""

    error2: float = 0.0  # |p - g|²
    bias2: float = 0.0  # <p - g, p' - g>; 0 for an unbiased method, |p - g|² for a method without random draws
    exact2: float = 0.0  # |g|²
    noise: float = 0.0  # |p - g|² in the norm of the weight gradient

    def __add__(self, other: tuple[float, ...]) -> Errors:  # type: ignore[override]
        return Errors(*(one + another for one, another in zip(self, other, strict=True)))

    @property
    def error(self) -> float:
        """The relative error |p - g| / |g|."""
        return math.sqrt(self.error2 / self.exact2) if self.exact2 else math.nan

    @property
    def bias(self) -> float:
        """An estimate of the relative bias |E p - g| / |g|."""
        return math.sqrt(max(self.bias2, 0.0) / self.exact2) if self.exact2 else math.nan


def errors(
    ways: Sequence[Products], methods: Sequence[str], seed: int, squared: Callable[[Tensor], float] | None = None
) -> Iterator[Errors]:
    """Measures the errors of several prunings of one gradient, one after the other.

    Args:
        ways: the products, which differ only in their pruning.
        methods: the method of each of them.
        seed: the seed of the draws. PyTorch's generators are not used.
        squared: the squared norm for ``Errors.noise``. With None, the noise is 0.
    """
    with torch.no_grad():
        exact = ways[0].exact()
        exact2 = squared_norm(exact)
        for products, method in zip(ways, methods, strict=True):
            one, two = (torch.full((1,), 2 * seed + number, device=exact.device) for number in (0, 1))
            error = products.dense(one) - exact
            if method in UNBIASED_METHODS:
                bias2 = 0.0
            elif method in METHODS_THAT_DRAW:
                bias2 = float((error.double() * (products.dense(two) - exact).double()).sum())
            else:
                bias2 = squared_norm(error)
            yield Errors(squared_norm(error), bias2, exact2, 0.0 if squared is None else squared(error))


def squared_norm(values: Tensor) -> float:
    wide = torch.float64 if values.is_cpu or values.dtype == torch.float64 else torch.float32
    return float(torch.linalg.vector_norm(values, dtype=wide)) ** 2


def amplifications(
    layers: Iterable[nn.Module], norm: Norm, loss: Callable[[], Tensor], make_error: Callable[[Any, Tensor], Tensor]
) -> dict[nn.Module, float]:
    """Measures how much the noise in each layer's data gradient adds to the noise of the gradient of all parameters.

    An error e of a data gradient passes through the rest of the backward, which is a linear map J. So one backward that
    starts with e at the layer's input gives |J e|² / |e|². This ratio is the same for a batch and for a part of it.

    Args:
        loss: a function that runs the forward and returns the loss.
        make_error: a function of the layer and its output gradient that returns an error of the data gradient, with the
            shape of the input.

    Returns:
        |J e|² / |e|² of every layer that was called. It is 0 if the data gradient reaches no trained parameter, and NaN
        if the error was zero.
    """
    edges: list[tuple[nn.Module, GradientEdge]] = []
    found: dict[int, Tensor] = {}

    def after_forward(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        input = (*args, *kwargs.values())[0]
        if output.is_nested or not (output.requires_grad and input.requires_grad):
            return
        index = len(edges)
        edges.append((layer, get_gradient_edge(input)))
        shape, dtype = input.shape, input.dtype

        def receive(gradient: Tensor) -> None:
            if index not in found:  # the backwards below run this hook again
                found[index] = cropped(make_error(layer, gradient.detach()), shape).to(dtype)

        hook: Any = output.register_hook
        hook(receive)

    trained = list(norm.scales)
    with Handles(layer.register_forward_hook(Hook(after_forward), with_kwargs=True) for layer in layers):
        value = loss()
    torch.autograd.grad(value, trained, retain_graph=True, allow_unused=True)
    sums = {layer: [0.0, 0.0] for layer, _ in edges}
    unreached = set(sums) - {edges[index][0] for index in found}
    for index in sorted(found):
        layer, edge = edges[index]
        error = found.pop(index)
        gradients = torch.autograd.grad([edge], trained, [error], retain_graph=True, allow_unused=True)
        reached = {parameter: g.to_dense() for parameter, g in zip(trained, gradients, strict=True) if g is not None}
        sums[layer][0] += norm.squared(reached)
        sums[layer][1] += squared_norm(error)
        found[index] = error.new_empty(0)
    ratios = {layer: out / into if into else math.nan for layer, (out, into) in sums.items()}
    return ratios | dict.fromkeys(unreached, 0.0)


def cropped(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Crops the padding from a data gradient if the layer pads its input itself (``padding_mode="circular"``)."""
    if gradient.shape != shape and gradient.numel() != math.prod(shape):
        for dim, size in enumerate(shape[-2:], gradient.ndim - 2):
            gradient = gradient.narrow(dim, (gradient.shape[dim] - size) // 2, size)
    return gradient.reshape(shape)


def samples_of(batch: Any) -> int | None:
    """Returns the number of samples in a batch, or None if its tensors, except scalars, differ in their first size."""
    lengths = {tensor.shape[0] for tensor in tensors_of(batch) if tensor.ndim}
    return lengths.pop() if len(lengths) == 1 else None


def part_of(batch: Any, start: int, stop: int) -> Any:
    """Returns the samples from ``start`` to ``stop`` of a nested batch. Values that are not tensors stay unchanged."""
    if isinstance(batch, Tensor):
        return batch[start:stop].detach().requires_grad_(batch.requires_grad) if batch.ndim else batch
    if isinstance(batch, Mapping):
        parts = {key: part_of(value, start, stop) for key, value in batch.items()}
        if type(batch) is dict or not hasattr(batch, "update"):
            return parts
        part: Any = copy.copy(batch)  # keeps the attributes of a tokenizer's batch
        part.update(parts)
        return part
    if isinstance(batch, (tuple, list)):
        values = [part_of(value, start, stop) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def tensors_of(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_of(value)

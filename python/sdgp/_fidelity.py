# SPDX-License-Identifier: BSD-3-Clause
"""Measures what pruning does to one layer's data gradient.

The measurements are sums that can be added over calls and steps. The metrics are computed from the sums. Let g be the
exact data gradient, p and p' two independent draws of the pruned one, and x the output gradient:

    cosine   <p, g> / |p| |g|
    error    |p - g| / |g|
    bias     sqrt(<p - g, p' - g> / |g|²): the error that remains after averaging over infinitely many draws. It equals
             the error if the method draws no random numbers, and is about 0 if the method is unbiased.
    l1_kept  Σ|x| over the values that stay / Σ|x|;  l2_kept: the same for the Euclidean norm
    zeros    the share of zeros in x
    density  the share of nonzeros in the pruned x
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._layer import PruningLayer
from ._pattern import METHODS_THAT_DRAW, Pruning
from ._step import stand_in

METRICS = ("cosine", "error", "bias", "l1_kept", "l2_kept", "zeros", "density")


class Sums(NamedTuple):
    exact2: float  # |g|²
    pruned2: float  # |p|²
    both: float  # <p, g>
    error2: float  # |p - g|²
    bias2: float  # <p - g, p' - g>
    l1: float
    l1_kept: float
    l2: float  # squared
    l2_kept: float  # squared
    zeros: float
    nonzeros: float  # after pruning
    values: float


def measure(
    layer: PruningLayer, pruning: Pruning, weight: Tensor | None, grad_output: Tensor, shape: Tensor, seed: int
) -> Tensor:
    """Returns the ``Sums`` of one call as a tensor on the gradient's device, without synchronizing with the device.

    Args:
        layer: the layer that was called.
        pruning: the settings that are judged.
        weight: the weight of the call. None: the layer's weight now.
        grad_output: the output gradient of the call.
        shape: a tensor on the meta device with the shape and strides of the call's input.
        seed: the seed of the draws, below 2^62. PyTorch's generators are not used.
    """
    samples = _samples(layer, grad_output)
    grad_output, shape = grad_output[:samples], shape[:samples]
    input = stand_in(shape, grad_output)

    def data_gradient(grad_output: Tensor) -> Tensor:
        gradient = layer.products(grad_output, input, weight).exact()
        return gradient if gradient.dtype == torch.float64 else gradient.float()

    def draw(number: int) -> Tensor:
        return layer.prune(grad_output, pruning, torch.full((1,), 2 * seed + number, device=grad_output.device))

    with torch.no_grad():
        exact = data_gradient(grad_output)
        kept = draw(0)
        pruned = data_gradient(kept)
        error = pruned - exact
        other = data_gradient(draw(1)) - exact if pruning.method in METHODS_THAT_DRAW else error
        values = grad_output if grad_output.dtype == torch.float64 else grad_output.float()
        absolute, stays = values.abs(), kept != 0
        left = torch.where(stays, absolute, 0)
        sums = (
            exact.square().sum(),
            pruned.square().sum(),
            (pruned * exact).sum(),
            error.square().sum(),
            (error * other).sum(),
            absolute.sum(),
            left.sum(),
            absolute.square().sum(),
            left.square().sum(),
            (values == 0).sum(),
            stays.sum(),
            torch.full((), values.numel(), device=values.device),
        )
        return torch.stack([value.double() for value in sums])


def add(calls: Sequence[Sequence[float]]) -> Sums:
    """Adds the sums of several calls of a layer."""
    return Sums(*(math.fsum(column) for column in zip(*calls, strict=True)))


def metrics(sums: Sums) -> dict[str, float]:
    """Returns the metrics by name, as the module docstring defines them. A metric that would be 0 / 0 is NaN."""
    return {
        "cosine": _ratio(sums.both, math.sqrt(sums.pruned2) * math.sqrt(sums.exact2)),
        "error": math.sqrt(_ratio(sums.error2, sums.exact2)),
        "bias": math.sqrt(max(_ratio(sums.bias2, sums.exact2), 0.0)),
        "l1_kept": _ratio(sums.l1_kept, sums.l1),
        "l2_kept": math.sqrt(_ratio(sums.l2_kept, sums.l2)),
        "zeros": _ratio(sums.zeros, sums.values),
        "density": _ratio(sums.nonzeros, sums.values),
    }


def _samples(layer: PruningLayer, grad_output: Tensor) -> int:
    """Returns how many of the first samples to measure: a quarter of the batch, because more would add little."""
    samples = grad_output.shape[0]
    if grad_output.ndim == (3 if isinstance(layer, nn.Conv2d) else 1):
        return samples  # without a batch dimension: these are channels or features
    return max(-(-samples // 4), min(samples, 64 if grad_output.ndim == 2 else 1))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan

# SPDX-License-Identifier: BSD-3-Clause
"""Layers with pruned weight gradients, and what these gradients must be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import gradients
from torch import Tensor, nn

import sdgp

FORCED = ("pruned", "dense", "sparse")
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 12), (3, 7, 16)),
    "conv2d": (lambda: nn.Conv2d(4, 12, 3, padding=1), (2, 4, 5, 7)),
}
layers = pytest.mark.parametrize("name", LAYERS)
forced = pytest.mark.parametrize("backend", FORCED)


def make(name: str, *settings: Any, **more: Any) -> tuple[Any, Any, Tensor]:
    """Makes a plain layer, its converted twin and an input."""
    build, shape = LAYERS[name]
    plain = build()
    return plain, sdgp.convert(copy.deepcopy(plain), *settings, **more), torch.randn(shape, requires_grad=True)


def prune_rows(grad_output: Tensor, n: int, m: int, method: str) -> Tensor:
    """Prunes along the rows of a linear layer's gradient. May draw."""
    rows = grad_output.reshape(-1, grad_output.shape[-1])
    return sdgp.prune_nm(rows.t(), n, m, -1, method).t().reshape(grad_output.shape)


def prune_pixels(grad_output: Tensor, n: int, m: int, method: str) -> Tensor:
    """Prunes along the output pixels of a convolution's gradient. May draw."""
    return sdgp.prune_nm(grad_output.flatten(2), n, m, -1, method).view_as(grad_output)


def exact(plain: nn.Module, x: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """Returns the gradients of the plain layer."""
    x = x.detach().requires_grad_()
    named = {"input": x, **dict(plain.named_parameters())}
    return dict(zip(named, gradients(plain(x), grad_output, *named.values()), strict=True))


def large(name: str, *settings: Any, **more: Any) -> tuple[Any, Tensor, Tensor]:
    """Makes a layer that is large enough to be measured, its input and its output's gradient."""
    if name == "linear":
        layer: nn.Module = sdgp.Linear(256, 256)
        x, grad_output = torch.randn(256, 256), torch.randn(256, 256)
    else:
        layer = sdgp.Conv2d(32, 32, 3, padding=1)
        x, grad_output = torch.randn(8, 32, 16, 16), torch.randn(8, 32, 16, 16)
    return sdgp.convert(layer, *settings, **more), x.requires_grad_(), grad_output

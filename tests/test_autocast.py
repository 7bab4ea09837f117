# SPDX-License-Identifier: BSD-3-Clause
"""Tests the layers in mixed precision: PyTorch's results in the forward, the closed form in the backward."""

from __future__ import annotations

import copy

import pytest
import torch
from compare import close, gradients
from samples import METHODS
from torch import Tensor, nn

import sdgp

LAYERS = {
    "linear": (nn.Linear(16, 12), -1, (3, 5, 16)),
    "conv2d": (nn.Conv2d(4, 12, 3, stride=2, padding=1), 1, (2, 4, 8, 8)),
    "conv2d without a bias": (nn.Conv2d(4, 12, 3, bias=False), 1, (2, 4, 8, 8)),
}


def run(layer: nn.Module, dtype: torch.dtype, x: Tensor, backward_inside: bool) -> tuple[Tensor, list[Tensor]]:
    """Returns the output and the gradients of the input and the Parameters. The output is its own output gradient."""
    with torch.autocast("cpu", dtype):
        output = layer(x)
        if backward_inside:
            return output, gradients(output, output.detach(), x, *layer.parameters())
    return output, gradients(output, output.detach(), x, *layer.parameters())


@pytest.mark.parametrize("backend", ["pruned", "sparse"])
@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LAYERS)
def test_backward_is_the_closed_form(
    name: str, method: str, dtype: torch.dtype, backward_inside: bool, backend: str
) -> None:
    dense, dim, shape = LAYERS[name]
    layer = sdgp.convert(copy.deepcopy(dense), "2:4", method, backend=backend)
    x = torch.randn(shape, requires_grad=True)
    exact, expected = run(dense, dtype, x, backward_inside)
    torch.manual_seed(1)
    output, actual = run(layer, dtype, x, backward_inside)
    assert output.dtype == dtype
    assert torch.equal(output, exact)
    torch.manual_seed(1)
    pruned = sdgp.prune_nm(output.detach(), 2, 4, dim, method)
    low = x.detach().to(dtype).requires_grad_()
    (expected[0],) = gradients(copy.deepcopy(dense).to(dtype)(low), pruned, low)
    for got, wanted in zip(actual, expected, strict=True):
        assert got.dtype == torch.float32
        close(got.to(dtype), wanted.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_trains(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 8))
    twin = sdgp.convert(copy.deepcopy(model), "2:4", backend="pruned")
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    for each in (model, twin):
        with torch.autocast("cpu", dtype):
            loss = each(x).float().square().sum()
        loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in twin.parameters())
    for actual, expected in zip(twin[3].parameters(), model[3].parameters(), strict=True):
        assert torch.equal(actual.grad, expected.grad)  # no pruning between the loss and the last layer


def test_autocast_leaves_float64_alone() -> None:
    layer = sdgp.Linear(16, 8, dtype=torch.float64, backend="pruned")
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(torch.randn(4, 16, dtype=torch.float64, requires_grad=True))
    assert output.dtype == torch.float64


def test_a_gradient_of_another_precision() -> None:
    layer = sdgp.Linear(16, 8, dtype=torch.bfloat16, method="magnitude", backend="pruned")
    x = torch.randn(4, 16, dtype=torch.bfloat16, requires_grad=True)
    (layer(x).float() * torch.randn(4, 8)).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == layer.weight.grad.dtype == torch.bfloat16

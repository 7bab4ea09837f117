# SPDX-License-Identifier: BSD-3-Clause
"""Tests calls that are unusual but legal: undefined and sparse gradients, odd biases, subclasses and tracers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils.checkpoint import checkpoint

import sdgp

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 16), (8, 16)),
    "conv2d": (lambda: nn.Conv2d(16, 16, 3, padding=1), (2, 16, 4, 4)),
}


class Blocked(torch.autograd.Function):
    """a + b, without a gradient for a."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


@pytest.mark.parametrize("backend", ["dense", "sparse", "pruned"])
@pytest.mark.parametrize("name", LAYERS)
def test_an_undefined_gradient_stays_undefined(name: str, backend: str) -> None:
    make, shape = LAYERS[name]
    layer = sdgp.convert(make(), "2:4", "magnitude", backend=backend, weight_grad="2:4")
    x = torch.randn(shape, requires_grad=True)
    output = layer(x)
    other = torch.zeros_like(output, requires_grad=True)
    Blocked.apply(output, other).sum().backward()
    assert x.grad is None
    assert all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("backend", ["auto", "sparse", "dense", "pruned"])
def test_undefined_and_defined_gradients_in_turn(backend: str, reentrant: bool | None, autocast: bool) -> None:
    """Square layers that are large enough for auto, before and after its first measurement."""
    plain = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    layers = sdgp.convert(copy.deepcopy(plain), "4:4", "magnitude", backend=backend, weight_grad="4:4")
    values = torch.randn(512, 256)

    def output(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)

    def gradients(model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        x = values.clone().requires_grad_()
        y = output(model, x)
        Blocked.apply(y, torch.zeros_like(y, requires_grad=True)).float().sum().backward()
        # A reentrant checkpoint itself turns a missing gradient into zeros.
        assert reentrant or all(tensor.grad is None for tensor in (x, *model.parameters()))
        output(model, x).float().square().sum().backward()
        return [tensor.grad for tensor in (x, *model.parameters())]

    with sdgp.Chooser(rounds=1):
        for _ in range(3):
            for one, other in zip(gradients(layers), gradients(plain), strict=True):
                torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * other.abs().max().item())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pause_inside_a_checkpoint_inside_a_pause(reentrant: bool) -> None:
    layer = sdgp.convert(nn.Linear(16, 16), "2:4", "magnitude", backend="dense")
    x, gradient = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)

    def body(x: Tensor) -> Tensor:
        with sdgp.paused(layer):
            hidden = layer(x)
        return layer(hidden)

    with sdgp.paused(layer):
        output = checkpoint(body, x, use_reentrant=reentrant)
    output.backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ layer.weight @ layer.weight)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_small_nested_inputs() -> None:
    layer = sdgp.convert(nn.Linear(16, 16))
    nested = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)], requires_grad=True)
    for _ in range(2):
        layer(torch.randn(4, 16, requires_grad=True))  # leaves a note for the next call
        result = layer(nested)
        assert result.is_nested


@pytest.mark.parametrize("shape", [(1, 16), (8, 16), (8, 1), (1,), ()])
def test_biases_of_any_shape(shape: tuple[int, ...]) -> None:
    plain = nn.Linear(16, 16)
    plain.bias = nn.Parameter(torch.randn(shape))
    layer = sdgp.convert(copy.deepcopy(plain), "2:4", backend="dense")
    x = torch.randn(8, 16)
    plain(x).square().sum().backward()
    layer(x.clone().requires_grad_()).square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("name", LAYERS)
def test_expanded_weights(name: str) -> None:
    make, shape = LAYERS[name]
    plain, x = make(), torch.randn(shape)
    layer = sdgp.convert(copy.deepcopy(plain))
    for module in (plain, layer):
        call_for_per_sample_grads(module)(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad_sample, plain.weight.grad_sample)
    forced = sdgp.convert(copy.deepcopy(plain), backend="pruned")
    with pytest.raises(ValueError, match=r'backend="pruned" expected plain tensors, got weight of type ExpandedWeight'):
        call_for_per_sample_grads(forced)(x.requires_grad_())


@pytest.mark.parametrize("backend", ["pruned", "dense"])
def test_symbolic_weights(backend: str) -> None:
    layer = sdgp.convert(nn.Linear(16, 16), "2:4", "magnitude", backend=backend)
    parameters, x = dict(layer.named_parameters()), torch.randn(8, 16, requires_grad=True)

    def gradients(parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
        loss = torch.func.functional_call(layer, parameters, (x,)).square().sum()
        return torch.autograd.grad(loss, [*parameters.values(), x])

    traced = make_fx(gradients, tracing_mode="symbolic")(parameters, x)
    for one, other in zip(traced(parameters, x), gradients(parameters, x), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_sparse_gradients(backend: str) -> None:
    layer = sdgp.convert(nn.Linear(16, 16, bias=False), "2:4", "magnitude", backend=backend)
    x, index = torch.randn(8, 16, requires_grad=True), torch.arange(8).view(8, 1)
    found = []
    for sparse in (False, True):
        torch.gather(layer(x), 1, index, sparse_grad=sparse).square().sum().backward()
        found.append((x.grad, layer.weight.grad))
        x.grad = layer.weight.grad = None
    for dense, sparse_too in zip(*found, strict=True):
        assert torch.equal(dense, sparse_too)

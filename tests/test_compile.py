# SPDX-License-Identifier: BSD-3-Clause
"""The layers under torch.compile: whole training steps in one graph, drawn anew at each call."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from compare import close, gradients
from torch import Tensor, nn

import sdgp


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["pruned", "sparse"])
@pytest.mark.parametrize("method", ["magnitude", "rescale", "rescale_group"])
def test_compiled_training_step(method: str, backend: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 12), nn.ReLU(), nn.Linear(12, 4)
    )
    sdgp.convert(model, "2:4", method, backend=backend)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        return model(x).square().mean()

    expected = gradients(step(x), torch.tensor(1.0), x, *model.parameters())
    actual = gradients(torch.compile(step, fullgraph=True)(x), torch.tensor(1.0), x, *model.parameters())
    for got, wanted in zip(actual, expected, strict=True):
        close(got, wanted)


@pytest.mark.parametrize("backend", ["pruned", "sparse"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_mvue(dynamic: bool, backend: str) -> None:
    layer = sdgp.Linear(16, 32, backend=backend)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for batch in (3, 5):
        x = torch.randn(batch, 16, requires_grad=True)
        output = compiled(x)
        close(output, layer(x))
        output.sum().backward()
        assert x.grad is not None
        # Each row of the gradient is a sum of at most 16 of the weight's 32 rows: not the exact one.
        assert not torch.allclose(x.grad, layer.weight.sum(0).expand(batch, -1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_sparse_conv2d(dynamic: bool, memory_format: torch.memory_format) -> None:
    layer = sdgp.Conv2d(4, 12, 3, stride=2, padding=1, groups=2, method="magnitude", backend="sparse")
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for batch in (2, 3):
        x = torch.randn(batch, 4, 9, 9).contiguous(memory_format=memory_format).requires_grad_()
        grad_output = torch.randn(batch, 12, 5, 5)
        expected = gradients(layer(x), grad_output, x, *layer.parameters())
        for got, wanted in zip(gradients(compiled(x), grad_output, x, *layer.parameters()), expected, strict=True):
            close(got, wanted)


@pytest.mark.filterwarnings("ignore:.*autocast")
def test_compiled_autocast() -> None:
    layer = sdgp.Linear(16, 8, method="magnitude", backend="pruned")

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x).float().square().sum()

    x = torch.randn(4, 16, requires_grad=True)
    (expected,) = gradients(step(x), torch.tensor(1.0), x)
    (actual,) = gradients(torch.compile(step, fullgraph=True)(x), torch.tensor(1.0), x)
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", ["pruned", "sparse"])
def test_compiled_mvue_is_unbiased(backend: str) -> None:
    layer = sdgp.Linear(16, 32, backend=backend)
    compiled = torch.compile(layer, fullgraph=True)
    x, grad_output = torch.randn(500, 16, requires_grad=True), torch.randn(1, 32)
    draws = torch.stack([gradients(compiled(x), grad_output.expand(500, -1), x)[0] for _ in range(40)])
    assert not any(torch.equal(first, second) for first, second in itertools.pairwise(draws))
    draws = draws.flatten(0, 1).double()
    error = (draws.mean(0) - (grad_output @ layer.weight).detach()[0]).abs()
    assert (error <= 5 * draws.std(0) / len(draws) ** 0.5).all()


def test_paused_after_compilation() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 12))
    sdgp.convert(model, "1:4", "magnitude", backend="pruned")
    compiled = torch.compile(model, fullgraph=True)
    x, grad_output = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(2, 12)

    def gradient(model: nn.Module) -> Tensor:
        return gradients(model(x), grad_output, x)[0]

    pruned = gradient(model)
    close(gradient(compiled), pruned)
    with sdgp.paused(model):
        exact = gradient(model)
        close(gradient(compiled), exact)
    assert not torch.allclose(exact, pruned)
    close(gradient(compiled), pruned)

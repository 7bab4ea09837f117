# SPDX-License-Identifier: BSD-3-Clause
"""Tests that whoever looks at layers with parametrized weights does not change the training.

To compute such a weight may change the buffers of its parametrization or draw random numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import sdgp


class DropWeights(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return F.dropout(weight, 0.1)


def parametrized(kind: str) -> nn.Module:
    layers = [nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 16)]
    model = sdgp.convert(nn.Sequential(*layers), "2:4", "magnitude", backend="dense", weight_grad="2:4")
    for layer in (model[0], model[2], model[3]):
        if kind == "spectral_norm":
            spectral_norm(layer)
        else:
            parametrize.register_parametrization(layer, "weight", DropWeights())
    return model


def train(kind: str, begin: Callable[[nn.Module], Callable[[], object]]) -> list[Tensor]:
    torch.manual_seed(0)
    model = parametrized(kind)
    look = begin(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 4, 4, 4)).square().mean().backward()
        optimizer.step()
        look()
    return [*model.state_dict().values(), torch.get_rng_state()]


def watch(model: nn.Module) -> Callable[[], object]:
    watch = sdgp.watch(model, every=1)
    return lambda: watch["3"]


LOOKS: dict[str, Callable[[nn.Module], Callable[[], object]]] = {
    "watch": watch,
    "report": lambda model: lambda: sdgp.report(model),
    "profile": lambda model: lambda: sdgp.profile(model, torch.ones(4, 4, 4, 4), rounds=1),
    "schedule": lambda model: sdgp.Schedule(model, patterns={0: "2:4"}).step,
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("kind", ["spectral_norm", "dropout"])
def test_looking_changes_nothing(kind: str, look: str) -> None:
    expected, found = (train(kind, begin) for begin in (lambda model: lambda: None, LOOKS[look]))
    assert all(map(torch.equal, expected, found))


def test_watch_measures_with_the_weight_of_the_forward() -> None:
    torch.manual_seed(0)
    layer = sdgp.convert(nn.Linear(8, 8, bias=False), "2:4", "magnitude", backend="dense")
    parametrize.register_parametrization(layer, "weight", DropWeights())
    watch = sdgp.watch(layer, every=1)
    x = torch.eye(8, requires_grad=True)
    output = layer(x)
    grad_output = torch.randn(8, 8)
    (pruned,) = torch.autograd.grad(output, x, grad_output)
    exact = grad_output @ output.detach().t()  # the output is the transposed weight
    assert watch["(model)"]["cosine"][0] == pytest.approx(F.cosine_similarity(pruned.flatten(), exact.flatten(), 0))

# SPDX-License-Identifier: BSD-3-Clause
"""Tests how the product of a pruned weight gradient is chosen, beside that of the data gradient."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import Timer, close, gradients
from torch import Tensor
from weight_grads import exact, large, layers, make, prune_pixels, prune_rows

import sdgp
from sdgp._decision import Site
from sdgp._pattern import Pruning


class Told:
    """A timer that decides which of the two sparse products wins. The data gradient is measured first."""

    def __init__(self, data_wins: bool, weight_wins: bool) -> None:
        times = [(1.0, 9.0) if wins else (9.0, 1.0) for wins in (data_wins, weight_wins)]
        self._times = iter([ms for pair in times for ms in pair])

    def __call__(self, call: Callable[[], object], device: torch.device) -> float:
        call()
        return next(self._times)


@layers
@pytest.mark.parametrize("backend", ["auto", "pruned"])
@pytest.mark.parametrize("data_wins", [True, False])
@pytest.mark.parametrize("weight_wins", [True, False])
def test_each_product_is_measured_and_chosen_by_itself(
    name: str, backend: str, data_wins: bool, weight_wins: bool
) -> None:
    layer, x, grad_output = large(name, "1:4", "magnitude", backend=backend, weight_grad=("2:4", "magnitude"))
    plain = sdgp.revert(copy.deepcopy(layer))
    prunes = backend == "pruned"
    other = "dense" if prunes else "exact"
    dim = -1 if name == "linear" else 1
    prune = prune_rows if name == "linear" else prune_pixels
    with sdgp.Chooser(timer=Told(data_wins, weight_wins), rounds=1) as chooser:
        for _ in range(2):
            found = gradients(layer(x), grad_output, x, layer.weight, layer.bias)
    assert len(chooser) == 2
    data, weight = sdgp.report(layer)
    assert (data.gradient, data.pattern, data.product) == ("data", "1:4", "sparse" if data_wins else other)
    assert (weight.gradient, weight.pattern, weight.product) == ("weight", "2:4", "sparse" if weight_wins else other)
    assert (data.ms, weight.ms) == (1.0, 1.0)
    assert (layer.decision.product, layer.weight_decision.product) == (data.product, weight.product)
    assert (layer.prunes_data, layer.prunes_weight) == (prunes or data_wins, prunes or weight_wins)
    of_data = sdgp.prune_nm(grad_output, 1, 4, dim) if layer.prunes_data else grad_output
    of_weight = prune(grad_output, 2, 4, "magnitude") if layer.prunes_weight else grad_output
    close(found[0], exact(plain, x, of_data)["input"])
    close(found[1], exact(plain, x, of_weight)["weight"])
    close(found[2], exact(plain, x, grad_output)["bias"])


def test_layer_that_is_known_to_be_exact_is_the_plain_one() -> None:
    layer, x, grad_output = large("linear", "2:4", weight_grad="4:16")
    plain = sdgp.revert(copy.deepcopy(layer))(x).grad_fn.name()
    with sdgp.Chooser(timer=Told(False, False), rounds=1):
        assert layer(x).grad_fn.name() != plain  # not measured yet
        gradients(layer(x), grad_output, x)
        assert layer(x).grad_fn.name() != plain  # the weight gradient is not measured yet
        gradients(layer(x), grad_output, layer.weight)
        assert layer(x).grad_fn.name() == plain
        assert layer.plain_for is not None


@pytest.mark.parametrize("first", ["data", "weight"])
def test_call_that_needs_other_gradients_is_decided_anew(first: str) -> None:
    """A call that needs the other gradient must be decided anew: its own calls are still unknown."""
    layer, x, grad_output = large("linear", "2:4", weight_grad="4:16")
    with sdgp.Chooser(timer=Told(False, False), rounds=1):
        for gradient in (first, *({"data", "weight"} - {first})):
            layer.weight.requires_grad_(gradient == "weight")
            inputs = x.detach().requires_grad_(gradient == "data")
            for _ in range(2):
                layer(inputs).backward(grad_output)
    assert layer.decision.exact_ms == layer.weight_decision.exact_ms == 1.0


def test_small_under_auto() -> None:
    _, layer, x = make("linear", "2:4", weight_grad="4:16")
    layer(x).sum().backward()
    assert [row.product for row in sdgp.report(layer)] == ["plain", "plain"]
    assert all("too small" in row.why for row in sdgp.report(layer))
    assert "_Linear" not in layer(x).grad_fn.name()


def test_chooser_state_with_both_gradients_and_of_before() -> None:
    layer, x, grad_output = large("linear", "2:4", weight_grad="4:16", backend="pruned")
    with sdgp.Chooser(timer=Timer(1.0, 9.0), rounds=1) as first:
        gradients(layer(x), grad_output, x, layer.weight)
    state = json.loads(json.dumps(first.state_dict()))
    assert sorted(json.loads(site)["gradient"] for site in state) == ["data", "weight"]
    second = sdgp.Chooser()
    second.load_state_dict(state)
    assert second.state_dict() == first.state_dict()
    old = {}
    for key, decision in state.items():
        site = json.loads(key)
        if site.pop("gradient") == "data":
            old[json.dumps(site)] = decision
    third = sdgp.Chooser()
    third.load_state_dict(old)
    with third:
        assert third.foresee(site_of(layer, x), 2**40).product == "sparse"


def site_of(layer: Any, x: Tensor) -> Site:
    """Returns the site of a layer's data gradient."""
    return Site("linear", x.device, x.dtype, torch.get_num_threads(), layer.pruning.data, layer.weight.shape, True, 16)


def test_device_without_a_sparse_weight_gradient() -> None:
    cuda, auto = torch.device("cuda", 0), Pruning.parse("conv2d", "2:4", "mvue", "auto")
    needed = "a cpu for the weight gradient of a convolution, got cuda:0"
    assert sdgp._rules.obstacle("conv2d", "weight", auto, cuda, torch.half) == needed
    site = Site("conv2d", cuda, torch.half, 1, Pruning.parse("conv2d", "2:4", "mvue", "pruned"), (8, 8, 3, 3), True, 9)
    decision = sdgp.Chooser().foresee(site._replace(gradient="weight"), 2**40)
    assert decision == sdgp.Decision("dense", f"a sparse product needs {needed}")

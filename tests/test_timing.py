# SPDX-License-Identifier: BSD-3-Clause
"""Tests how a chooser times products, and by how much one must win."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sdgp
from sdgp._autograd import LinearProducts
from sdgp._pattern import Pruning
from sdgp._semi_structured import DEFAULT, Algorithm


class Named:
    """A data gradient whose products record their name, check their seed and advance a fake clock."""

    def __init__(self, **milliseconds: float) -> None:
        self.grad_output, self.work = torch.randn(4, 4), 2**40
        self.milliseconds, self.calls, self.now = milliseconds, [], 0.0

    def obstacle(self) -> None:
        return None

    def exact(self) -> Tensor:
        return self._call("exact", None)

    def dense(self, seed: Tensor | None = None) -> Tensor:
        return self._call("dense", seed)

    def sparse(self, seed: Tensor | None = None, algorithm: Algorithm = DEFAULT) -> Tensor:
        return self._call("sparse", seed)

    def time(self, call: Callable[[], object], device: torch.device) -> float:
        before = self.now
        call()
        return self.now - before

    def _call(self, name: str, seed: Tensor | None) -> Tensor:
        assert not torch.is_grad_enabled()
        assert (seed is None) == (name == "exact")  # exact draws no seed
        self.calls.append(name)
        self.now += self.milliseconds.get(name, 1.0)
        return torch.empty(0)


def pruning(backend: str) -> Pruning:
    return Pruning.parse("linear", "2:4", "mvue", backend)


def test_measuring_times_both_products_in_turn() -> None:
    for backend, rival in (("auto", "exact"), ("pruned", "dense")):
        products = Named()
        decision = sdgp.Chooser(timer=products.time).measure(products, pruning(backend), rounds=3)
        assert products.calls == ["sparse", rival] * 4  # the first round warms up
        assert decision.sparse_ms == pytest.approx(1.0)
        assert getattr(decision, f"{rival}_ms") == pytest.approx(1.0)
        assert decision.ms == getattr(decision, f"{decision.product}_ms")


def test_a_known_time_is_not_measured_again() -> None:
    products = Named(sparse=0.9)
    decision = sdgp.Chooser(timer=products.time).measure(products, pruning("auto"), 3, 2.0)
    assert products.calls == ["sparse"] * 4
    assert (decision.product, decision.exact_ms) == ("sparse", 2.0)
    assert decision.sparse_ms == pytest.approx(0.9)


def test_the_shortest_of_the_rounds_counts() -> None:
    times = iter([3.0, 5.0, 90.0, 6.0, 2.0, 4.0])
    measuring = sdgp.Chooser(timer=lambda call, device: next(times), rounds=3)
    assert measuring.measure_all(Named(), ["sparse", "exact"]) == {"sparse": 2.0, "exact": 4.0}


def test_the_clock_of_a_chooser_of_its_own() -> None:
    products = LinearProducts(torch.randn(64, 64), torch.randn(64, 64), pruning("pruned"))
    found = sdgp.Chooser(rounds=2).measure_all(products, ("exact", "dense", "sparse"))
    assert list(found) == ["exact", "dense", "sparse"]
    assert all(0 < ms < 1000 for ms in found.values())


@pytest.mark.parametrize(
    ("backend", "other_ms", "sparse_ms", "sparse"),
    [
        ("pruned", 1.0, 0.9, True),
        ("pruned", 1.0, 0.97, False),  # within measurement noise
        ("auto", 10.0, 9.0, True),
        ("auto", 10.0, 9.7, False),
        ("auto", 0.5, 0.4, False),  # saves less than the call overhead of a layer that may prune
        ("auto", 0.5, 0.3, True),
    ],
)
def test_by_how_much_sparse_must_win(backend: str, other_ms: float, sparse_ms: float, sparse: bool) -> None:
    products = Named(sparse=sparse_ms, exact=other_ms, dense=other_ms)
    decision = sdgp.Chooser(timer=products.time).measure(products, pruning(backend))
    rival = {"auto": "exact", "pruned": "dense"}[backend]
    assert decision.product == ("sparse" if sparse else rival)
    assert getattr(decision, f"{rival}_ms") == pytest.approx(other_ms)
    assert decision.sparse_ms == pytest.approx(sparse_ms)
    assert {"exact": decision.dense_ms, "dense": decision.exact_ms}[rival] is None


def test_margin_and_calls_are_arguments() -> None:
    for limits, product in (({}, "exact"), ({"margin": 1.0}, "sparse"), ({"margin": 1.0, "calls_ms": 1.0}, "exact")):
        products = Named(sparse=9.8, exact=10.0)
        decision = sdgp.Chooser(timer=products.time, **limits).measure(products, pruning("auto"))
        assert decision.product == product

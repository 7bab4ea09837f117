# SPDX-License-Identifier: BSD-3-Clause
"""Tests that products are timed only if their kernels run and a clock may decide. Otherwise a static rule decides."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import sdgp


class Clock:
    """A timer that counts its calls."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, call: Callable[[], object], device: torch.device) -> float:
        self.count += 1
        call()
        return 1.0


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def make(pattern: str = "4:32", backend: str = "auto") -> nn.Module:
    torch.manual_seed(0)
    return sdgp.convert(nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)), pattern, backend=backend)


def step(model: nn.Module, rows: int = 512) -> None:
    model(torch.randn(rows, 512, requires_grad=True)).square().mean().backward()


PLACES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "fake tensors": FakeTensorMode,
    "a dispatch mode": Passing,
    "FlopCounterMode": lambda: FlopCounterMode(display=False),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("backend", ["auto", "pruned"])
def test_nothing_is_timed_or_kept(place: str, backend: str) -> None:
    clock = Clock()
    with sdgp.Chooser(timer=clock) as chooser:
        with PLACES[place]():
            model = make(backend=backend)
            step(model)
        assert clock.count == len(chooser) == 0
        assert all("static rule" in row.why for row in sdgp.report(model))
        model = make(backend=backend)
        step(model)  # a real step
        assert clock.count > 0
        assert all(row.ms == 1.0 for row in sdgp.report(model))
        known = clock.count
        with PLACES[place]():
            model = make(backend=backend)
            step(model)
        assert clock.count == known


def test_measuring_is_not_counted_as_flops() -> None:
    def flops(model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            step(model)
        return int(counter.get_total_flops())

    plain = flops(sdgp.revert(make()))
    with sdgp.Chooser():
        assert flops(make("2:4")) == plain


@pytest.mark.parametrize("backend", ["auto", "pruned"])
@pytest.mark.parametrize("pattern", ["2:4", "4:32"])
def test_deterministic_algorithms_take_the_static_rule(pattern: str, backend: str) -> None:
    def gradient(sparse_wins: bool) -> Tensor:
        times = iter((1.0, 9.0) * 99 if sparse_wins else (9.0, 1.0) * 99)
        with sdgp.Chooser(timer=lambda call, device: next(times)) as chooser:
            step(make(pattern, backend))  # measured before determinism is on
            assert len(chooser) == 1
            torch.use_deterministic_algorithms(True)
            try:
                torch.manual_seed(0)
                x = torch.randn(512, 512, requires_grad=True)
                model = make(pattern, backend)
                model(x).square().sum().backward()
            finally:
                torch.use_deterministic_algorithms(False)
        expected = "sparse" if pattern == "4:32" else "exact" if backend == "auto" else "dense"
        assert {row.product for row in sdgp.report(model)} == {expected}
        assert x.grad is not None
        return x.grad

    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # a warning of compiled autograd
@pytest.mark.parametrize("backend", ["auto", "pruned", "sparse"])
def test_compiled_autograd_times_nothing(backend: str) -> None:
    clock, x = Clock(), torch.randn(512, 512, requires_grad=True)
    with sdgp.Chooser(timer=clock) as chooser:
        model = sdgp.convert(make(), "2:4", "magnitude", backend=backend)
        (eager,) = torch.autograd.grad(model(x).square().mean(), x)
        chooser.forget()
        clock.count, loss = 0, model(x).square().mean()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        assert clock.count == len(chooser) == 0
    torch.testing.assert_close(x.grad, eager)


def test_images_of_varying_size_share_measurements() -> None:
    clock, sizes = Clock(), random.Random(0)
    torch.manual_seed(0)
    model = sdgp.convert(nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)))
    with sdgp.Chooser(timer=clock, rounds=1) as chooser:
        for _ in range(10):
            height, width = sizes.randrange(48, 112), sizes.randrange(48, 112)
            model(torch.randn(2, 32, height, width, requires_grad=True)).square().mean().backward()
        known = len(chooser)
        assert 1 <= known <= 8
        for height in range(48, 112, 7):
            model(torch.randn(2, 32, height, height + 5, requires_grad=True)).square().mean().backward()
        assert len(chooser) <= known + 2


def test_chooser_forgets_the_oldest_beyond_its_limit() -> None:
    with sdgp.Chooser(timer=Clock(), rounds=1, limit=2) as chooser:
        for rows in (256, 512, 1024, 2048):
            step(make(), rows)
        assert len(chooser) == 2
        sizes = [json.loads(key)["values"] for key in chooser.state_dict()]
        assert sizes == [19, 20]


def test_product_that_fails_while_it_is_timed_leaves_the_step_exact() -> None:
    def timer(call: Callable[[], object], device: torch.device) -> float:
        raise torch.OutOfMemoryError("no memory for that")

    with sdgp.Chooser(timer=timer) as chooser:
        model = make()
        step(model)
        step(model)
    for row in sdgp.report(model):
        assert (row.product, "no memory for that" in row.why) == ("exact", True)
    assert len(chooser) == 1

# SPDX-License-Identifier: BSD-3-Clause
"""Tests sdgp.advise: its arguments and its errors, and that it keeps the model unchanged."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from advice import Slower, Told, batches, loss, net
from torch import Tensor, nn

import sdgp
from sdgp._choose import current_chooser
from sdgp._decision import Products
from sdgp._pattern import Pruning
from sdgp._plan import Interval
from sdgp._steps import Steps

pytestmark = pytest.mark.usefixtures("told")

X = torch.ones(4, 32)
REALIZED = Steps.realized  # the fixture replaces it


def compiled_in_place() -> nn.Module:
    model = net()
    model.compile()
    return model


def test_layers_of_the_same_shapes_are_timed_once() -> None:
    class Counting(Told):
        count = 0

        def measure(
            self, products: Products, pruning: Pruning, rounds: int | None = None, exact_ms: float | None = None
        ) -> sdgp.Decision:
            self.count += 1
            return super().measure(products, pruning, rounds, exact_ms)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), *(nn.Linear(64, 64) for _ in range(3)))
    with Counting() as chooser:
        plan = sdgp.advise(model, *batches(), loss=loss, patterns=("8:16", "4:16"), methods=("mvue",))
    data = 2  # patterns of the three equal layers; the first layer has no data gradient
    weight = 2 + 2  # patterns of the three equal layers, and of the first layer
    assert chooser.count == data + weight
    assert sum(row.saved_ms > 0 for row in plan.candidates) == 3 * data + 3 * 2 + 2


def state(model: nn.Module) -> tuple[Any, ...]:
    layers = [(type(layer), dict(vars(layer)), dict(layer._forward_hooks)) for layer in model.modules()]
    return layers, [parameter.grad for parameter in model.parameters()], torch.get_rng_state().tolist()


@pytest.mark.parametrize("converted", [False, True])
def test_leaves_everything_as_it_was(converted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdgp._plan.STEPS_PER_NOISE", 0.01)
    model = nn.Sequential(net(), nn.Dropout(0.5), nn.BatchNorm1d(64))
    if converted:
        sdgp.convert(model, "1:4", "random", backend="pruned", filter=lambda module, name: name != "0.2")
    pair = batches()
    loss(model, pair[0]).backward()
    means, before = model[2].running_mean.clone(), str(state(model))
    plan = sdgp.advise(model, *pair, loss=loss)
    assert plan.pays
    assert torch.equal(model[2].running_mean, means)
    assert str(state(model)) == before


def test_patterns_by_device_and_width() -> None:
    """A GPU must get no groups wider than its 2:4 tensor cores take, and a layer of few features no groups of 32."""
    assert sdgp._advise._default_patterns(nn.Linear(8, 8, device="meta")) == [(2, 4), (1, 4)]
    model = nn.Sequential(nn.Linear(32, 128), nn.Linear(128, 16))
    with Slower():
        rows = sdgp.advise(model, *[(x, y % 16) for x, y in batches()], loss=loss).candidates
    tried = {(row.layer, row.gradient): row.pattern for row in rows if row.sparse_ms is not None}
    assert tried == {("0", "weight"): "4:32", ("1", "data"): "2:16", ("1", "weight"): "4:32"}


def test_batches_of_any_kind() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = net()

        def forward(self, input: Tensor, scale: float) -> Tensor:
            output: Tensor = scale * self.layers(input)
            return output

    x = batches()[0][0]
    assert sdgp.advise(Named(), {"input": x, "scale": 2.0}).candidates
    assert sdgp.advise(Named(), (x, 2.0), [x, 1.0]).candidates
    assert list(sdgp.advise(nn.Linear(64, 64), x.repeat(1, 2).requires_grad_())) == [""]


def test_what_lies_outside_the_model_is_kept() -> None:
    model, pair = net(), batches()
    scale = torch.ones((), requires_grad=True)
    optimizer = torch.optim.SGD([*model.parameters(), scale])
    pair[0][0].requires_grad_()
    with pytest.raises(ValueError, match=r"^advise: expected an optimizer of this model, got 1 parameters of another"):
        sdgp.advise(model, *pair, loss=loss, optimizer=optimizer)
    sdgp.advise(model, *pair, loss=loss)
    assert pair[0][0].grad is None


class Counting(nn.Module):
    """A model with a buffer that each forward assigns anew."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = net()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        output: Tensor = self.layers(x)
        return output


def test_buffers_that_are_assigned_anew_are_kept() -> None:
    model = Counting()
    before = model.count
    sdgp.advise(model, *batches(), loss=loss)
    assert model.count is before
    assert model.count == 0


def test_batches_of_another_size_are_left_out() -> None:
    model, pair = net(), batches(3)
    short = pair[1][0][:64], pair[1][1][:64]
    one = sdgp.advise(model, pair[0], short, pair[2], loss=loss)
    two = sdgp.advise(model, pair[0], pair[2], loss=loss)
    assert [row.noise for row in one.candidates] == pytest.approx([row.noise for row in two.candidates])


def test_an_optimizer_that_steps_in_backward_is_refused() -> None:
    model = net()
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match=r"^advise: expected an optimizer that steps after backward"):
        sdgp.advise(model, *batches(), loss=loss)


@pytest.mark.parametrize(
    ("arguments", "settings", "requirement", "got"),
    [
        ((3, 1), {}, "nn.Module", "int"),
        ((net(),), {}, "batch", "none"),
        ((net(), X), {"rounds": 0}, "rounds >= 1", "0"),
        ((net(), X), {"patterns": ()}, "pattern", "none"),
        ((net(), X), {"methods": ("best",)}, "mvue", "'best'"),
        ((nn.BatchNorm1d(8), X), {}, "layers to prune", "none"),
        ((nn.ReLU(), 1), {}, "trainable parameters", "none"),
        ((net().requires_grad_(False), 1), {}, "trainable parameters", "none"),
        ((net(), torch.ones(1, 32)), {}, "several batches of one size, or one of at least two samples", "one of 1"),
        ((net(), {"x": X, "y": X[0]}), {}, "at least two samples", "one whose tensors share no"),
        ((net(), torch.ones(4, 32), torch.ones(4, 32)), {}, "batches whose gradients differ", "a variance of 0"),
        ((torch.compile(net()), torch.ones(4, 32)), {}, "a model that is not compiled", "a compiled one"),
        ((compiled_in_place(), torch.ones(4, 32)), {}, "a model that is not compiled", "a compiled one"),
        ((net(), (X, X)), {}, "a batch that holds the arguments of the model, or loss=", ".*positional"),
        ((net(), torch.utils.data.DataLoader([X])), {}, "batches", "a DataLoader"),
        ((net(), X), {"patterns": "8:16"}, "lists of patterns and methods", "'8:16'"),
        ((net(), torch.full((4, 32), math.nan)), {}, "finite loss", "nan"),
        ((net(), torch.ones(4, 32)), {"loss": lambda model, x: model(x)}, "scalar tensor", r"shape \(4, 64\)"),
        ((net(), torch.ones(4, 32)), {"loss": lambda model, x: 1.0}, "scalar tensor", "float"),
        ((net(), X), {"filter": lambda module, name: None}, "filter to return a bool", "None"),
        ((net(), 1), {"optimizer": torch.optim.SGD(net().parameters())}, "optimizer of this model", "6 parameters"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(arguments: tuple[Any, ...], settings: dict[str, Any], requirement: str, got: str) -> None:
    with pytest.raises(ValueError, match=f"^advise: expected .*{requirement}.*, got {got}"):
        sdgp.advise(*arguments, **settings)


def test_float64_and_older_weight_wrappers() -> None:
    model = net().double()
    pair = [(x.double(), y) for x, y in batches()]
    assert sdgp.advise(model, *pair, loss=loss).pays
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.Sequential(net(), nn.utils.weight_norm(nn.Linear(64, 64)))
    assert any(row.layer == "1" for row in sdgp.advise(model, *batches(), loss=loss).candidates)


def test_a_loss_that_refuses_a_part_of_the_batch() -> None:
    def strict(model: nn.Module, batch: Any) -> Tensor:
        if len(batch[0]) != 8192:
            raise ValueError("expected 8192 samples")
        return loss(model, batch)

    assert sdgp.advise(net(), *batches(), loss=strict).pays
    with pytest.raises(ValueError, match=r"advise: expected several batches, or one whose halves .*: expected 8192"):
        sdgp.advise(net(), batches()[0], loss=strict)


def test_a_failed_measurement_is_the_reason() -> None:
    class Failing(Told):
        def measure(
            self, products: Products, pruning: Pruning, rounds: int | None = None, exact_ms: float | None = None
        ) -> sdgp.Decision:
            raise RuntimeError("out of memory")

    with Failing():
        plan = sdgp.advise(net(), *batches(), loss=loss)
    assert plan.verdict == "nothing pays here: no time was measured: out of memory"
    assert all(row.sparse_ms is None for row in plan.candidates)


def test_a_frozen_narrow_layer_is_not_too_small() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 8).requires_grad_(False))
    plan = sdgp.advise(
        model, *torch.randn(2, 8192, 32), loss=lambda model, x: model(x).square().mean(), patterns=["4:16"]
    )
    assert "exact (1): 8 output channels per group, fewer than m = 16" in str(plan)


def test_several_gpus_raise_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    sdgp.advise(net(), *batches(), loss=loss)


def test_generators_of_python_and_numpy_come_back() -> None:
    def drawing(model: nn.Module, batch: Any) -> Tensor:
        return loss(model, batch) * (1 + 1e-3 * random.random() + 1e-3 * np.random.rand())

    random.seed(0)
    np.random.seed(0)
    expected = random.random(), np.random.rand()
    random.seed(0)
    np.random.seed(0)
    sdgp.advise(net(), *batches(), loss=drawing)
    assert (random.random(), np.random.rand()) == expected


def test_whole_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain and pruned steps take turns; the shortest times and the ratios of the pairs count."""
    model, times = net(), iter([10, 7, 20, 14, 12, 7, 11, 11, 10, 8])
    kinds: list[type[nn.Module]] = []

    def seconds(call: Any, device: torch.device) -> float:
        before = len(calls)
        call()
        if not steps:
            return 0.010
        kinds.append(calls[before])
        return next(times) / 1e3

    def noticed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(type(model[4]))
        return loss(model, batch)

    def realized(self: Steps, pruned: Any, expected: float) -> Interval:
        steps.append(expected)
        return REALIZED(self, pruned, expected)

    calls: list[type[nn.Module]] = []
    steps: list[float] = []
    monkeypatch.setattr("sdgp._plan.STEPS_PER_NOISE", 0.01)
    monkeypatch.setattr("sdgp._steps.Steps.realized", realized)
    monkeypatch.setattr("sdgp._steps.seconds", seconds)
    plan = sdgp.advise(model, *batches(), loss=noticed)
    assert kinds == 5 * [nn.Linear, sdgp.Linear]
    assert plan.saved == pytest.approx(1 - 7 / 10)
    assert plan._realized[1:] == pytest.approx((0 / steps[0], (1 - 7 / 12) / steps[0]))
    assert len(steps) == 1
    known = len(current_chooser())
    assert known > 0
    sdgp.convert(model, plan)
    loss(model, batches()[0]).backward()
    assert len(current_chooser()) == known  # training measures nothing again


def test_times_of_a_busy_machine_give_no_verdict() -> None:
    class Busy(Told):
        def measure(
            self, products: Products, pruning: Pruning, rounds: int | None = None, exact_ms: float | None = None
        ) -> sdgp.Decision:
            return sdgp.Decision("sparse", "", exact_ms=1e6, sparse_ms=1.0)

    with Busy(), pytest.raises(ValueError, match="advise: expected an idle machine"):
        sdgp.advise(net(), *batches(), loss=loss)

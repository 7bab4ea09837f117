# SPDX-License-Identifier: BSD-3-Clause
"""sdgp.advise: what it measures and chooses, that it leaves the model alone, and convert taking its plan."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdgp
from sdgp._autograd import LinearProducts
from sdgp._decision import Products
from sdgp._pattern import Pruning

SPARSE_MS = {"8:16": 0.8, "2:4": 0.8, "4:16": 0.6, "1:4": 0.6, "4:32": 0.3}  # where the exact product takes 1
DEFAULT = ("8:16", "4:16", "4:32")


class Told(sdgp.Chooser):
    """Finds what it is told: a sparse product takes what its pattern says."""

    def measure(self, products: Products, pruning: Pruning, rounds: int | None = None) -> sdgp.Decision:
        assert products.exact().shape == products.sparse().shape
        assert rounds in (5, None)  # None: in a backward
        return sdgp.Decision("sparse", "", exact_ms=1.0, sparse_ms=SPARSE_MS[str(pruning.pattern)])


class Slower(sdgp.Chooser):
    def measure(self, products: Products, pruning: Pruning, rounds: int | None = None) -> sdgp.Decision:
        return sdgp.Decision("exact", "", exact_ms=1.0, sparse_ms=2.0)


@pytest.fixture(autouse=True)
def _told() -> Iterator[None]:
    with Told():
        yield


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64))


def batch() -> Tensor:
    """Of a size at which no data gradient is too small."""
    return torch.randn(4096, 32)


def loss(output: Tensor) -> Tensor:
    return output.square().mean()


def test_chooses_the_fastest_that_the_limits_allow() -> None:
    model, x = net(), batch()
    plan = sdgp.advise(model, x, loss=loss, methods=("mvue", "magnitude"), max_error=0.5, max_bias=0.2)
    assert plan == {"2": ("8:16", "mvue"), "4": ("8:16", "mvue")}
    rows = {(row.layer, row.pattern, row.method): row for row in plan.candidates}
    assert len(rows) == len(plan.candidates) == 2 * 3 * 2
    assert rows["4", "8:16", "mvue"].error < 0.5 < rows["4", "4:16", "mvue"].error < rows["4", "4:32", "mvue"].error
    assert rows["4", "8:16", "magnitude"].bias == rows["4", "8:16", "magnitude"].error > 0.2
    assert [rows["2", pattern, "mvue"].saved_ms for pattern in DEFAULT] == pytest.approx([0.2, 0.4, 0.7])
    assert rows["2", "8:16", "mvue"].shape == "(4096, 64)"
    assert plan.saved_ms == pytest.approx(0.4)
    assert plan.step_ms > 0
    fastest = sdgp.advise(model, x, loss=loss, methods=("mvue", "magnitude"), max_error=9.0, max_bias=9.0)
    assert {pattern for pattern, _ in fastest.values()} == {"4:32"}


def test_errors_are_those_of_the_data_gradient() -> None:
    model, x = net().eval(), torch.randn(64, 32)  # of more samples, a quarter
    plan = sdgp.advise(model, x, loss=loss, patterns=("1:4",), methods=("magnitude",), max_error=9.0, max_bias=9.0)
    hidden = model[:4](x).detach().requires_grad_()
    (exact,) = torch.autograd.grad(loss(model[4](hidden)), hidden)
    last = sdgp.convert(copy.deepcopy(model[4]), "1:4", "magnitude", backend="pruned")
    (pruned,) = torch.autograd.grad(loss(last(hidden)), hidden)
    row = next(row for row in plan.candidates if row.layer == "4")
    assert row.error == pytest.approx(((pruned - exact).norm() / exact.norm()).item(), rel=1e-4)


def parameter_gradient(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad()
    loss(model(x)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_the_curve_holds_errors_of_whole_backwards() -> None:
    model, x = net().eval(), batch()
    settings = {"patterns": ("2:4", "4:32"), "methods": ("magnitude",), "max_error": 0.5, "max_bias": 9.0}
    plan = sdgp.advise(model, x, loss=loss, **settings)
    assert set(plan.values()) == {("2:4", "magnitude")}
    exact = parameter_gradient(model, x)
    for limit in (plan.max_error, plan.curve[-1].max_error):
        point = next(point for point in plan.curve if point.max_error == limit)
        other = sdgp.advise(model, x, loss=loss, **settings | {"max_error": limit})
        twin = sdgp.convert(copy.deepcopy(model), other, backend="dense")
        error = (parameter_gradient(twin, x) - exact).norm() / exact.norm()
        assert point.error == pytest.approx(error.item(), rel=1e-3)
        assert point.saved_ms == pytest.approx(other.saved_ms)
    assert plan.curve[0] == (0.0, 0.0, 0.0)
    assert plan.error == next(point.error for point in plan.curve if point.max_error == 0.5)
    assert [point.max_error for point in plan.curve] == sorted({point.max_error for point in plan.curve})


def state(model: nn.Module) -> tuple[Any, ...]:
    layers = [(type(layer), dict(vars(layer)), dict(layer._forward_hooks)) for layer in model.modules()]
    return layers, [parameter.grad for parameter in model.parameters()], torch.get_rng_state().tolist()


@pytest.mark.parametrize("converted", [False, True])
def test_leaves_everything_as_it_was(converted: bool) -> None:
    model = nn.Sequential(net(), nn.BatchNorm1d(64))
    if converted:
        sdgp.convert(model, "1:4", "random", backend="pruned", filter=lambda module, name: name != "0.2")
    model(batch()).sum().backward()
    means, before = model[1].running_mean.clone(), str(state(model))
    plan = sdgp.advise(model, torch.ones(8, 32), loss=loss)
    assert set(plan) <= {"0.0", "0.2", "0.4"}
    assert torch.equal(model[1].running_mean, means)
    after = state(model)
    assert str(after) == before


def test_convert_takes_a_plan_and_its_json() -> None:
    model = net()
    plan = {"2": ("1:4", "mvue"), "4": ["4:8", "random"]}
    sdgp.convert(model, json.loads(json.dumps(plan)), backend="pruned")
    assert [(row.pattern, row.method, row.backend) for row in sdgp.report(model)] == [
        ("", "", ""),
        ("1:4", "mvue", "pruned"),
        ("4:8", "random", "pruned"),
    ]
    assert sdgp.report(model)[0].note == "plain: not in the plan"
    sdgp.convert(model, {})
    assert [row.note for row in sdgp.report(model)] == ["plain: not in the plan"] * 3
    layer = nn.Linear(64, 64)
    assert list(sdgp.advise(layer, batch().repeat(1, 2).requires_grad_())) == [""]
    assert isinstance(sdgp.convert(layer, {"": ("2:4", "mvue")}), sdgp.Linear)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"5": ("2:4", "mvue")}, r"convert: expected .*layers of this model, got '5'; .*wrapper"),
        ({"2": "2:4"}, r"convert: expected .*\(pattern, method, weight_grad\), got '2:4' for 2"),
        ({"2": ["2:4"]}, r"convert: expected .*\(pattern, method, weight_grad\), got \['2:4'\] for 2"),
        ({"2": ("2:4", "mvue", "4:16", 1)}, r"convert: expected .*\(pattern, method, weight_grad\), got .* for 2"),
        ({"2": ("2:4", "mvue", "16:4")}, r"convert: expected weight_grad to be a pattern, .*, got '16:4'"),
        ({"5": ("2:4", "mvue"), "6": ("2:4", "mvue")}, r"convert: expected .*layers of this model, got '5', '6'"),
        ({"2": ("5:4", "mvue")}, r'pattern: expected "n:m" .*, got \'5:4\''),
        ({"2": ("2:4", "best")}, r"convert: expected .*mvue, got 'best'"),
    ],
    ids=str,
)
def test_bad_plans(plan: Any, message: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=f"^{message}"):
        sdgp.convert(model, plan)
    assert type(model[2]) is nn.Linear


def test_why_a_layer_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(net(), nn.Linear(64, 2), nn.Bilinear(2, 2, 8))
    model.forward = lambda x: model[1](model[0](x))
    plan = sdgp.advise(model, batch(), patterns=("1:4",), max_error=0.1, filter=lambda module, name: name != "0.2")
    text = str(plan)
    assert not plan
    for layer, why in {
        "0.0": "no data gradient",
        "0.2": "filter",
        "0.4": "error > 0.1",
        "1": "2 output channels",
        "2": "not Bilinear",
    }.items():
        assert re.search(rf"^{layer} +\|[^|]*\| plain: [^|]*{re.escape(why)}", text, re.MULTILINE), (layer, text)
    assert "has bias > 0.1" in str(sdgp.advise(net(), batch(), patterns=("1:4",), methods=("magnitude",), max_bias=0.1))
    with Slower():
        assert "plain: sparse is not faster" in str(sdgp.advise(net(), batch()))
    monkeypatch.setattr(LinearProducts, "obstacle", lambda _: "a GPU, got none")
    without = sdgp.advise(net(), batch())
    assert "plain: no sparse product" in str(without)
    assert {row.sparse_ms for row in without.candidates} == {None}


def test_patterns_of_another_device_than_a_cpu() -> None:
    """A GPU's 2:4 tensor cores take no wider groups."""
    assert sdgp._advise._patterns_for(nn.Linear(8, 8)) == [(8, 16), (4, 16), (4, 32)]
    assert sdgp._advise._patterns_for(nn.Linear(8, 8, device="meta")) == [(2, 4), (1, 4), (4, 32)]


def test_too_small_layers_save_nothing() -> None:
    assert not sdgp.advise(net(), torch.randn(2048, 32))


def test_several_batches_and_calls() -> None:
    layer = nn.Linear(64, 64)
    model = nn.Sequential(nn.Linear(32, 64), layer, nn.Tanh(), layer)
    plan = sdgp.advise(model, batch(), (batch(),), patterns=("2:4",))
    (row,) = plan.candidates
    assert (row.layer, row.exact_ms, row.sparse_ms, row.saved_ms) == pytest.approx(("1", 2.0, 1.6, 0.4))


def test_table() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 64))
    head, _, _, layer, step = str(sdgp.advise(model, batch(), patterns=("2:4",))).splitlines()
    assert head.split(" | ")[0].strip() == "layer"
    pattern = r"1 +\| \(4096, 64\) \| 2:4 mvue +\| 1\.000 +\| 0\.800 +\| 0\.200 +\| 0\.\d{3} \| 0\.\d{3} \| 0\.\d{3}"
    assert re.fullmatch(pattern, layer), layer
    assert re.fullmatch(
        r"step: exact \d+\.\d\d ms, 0\.20 ms \(\d+\.\d%\) saved by 1 layers at max_error=0\.75; error of the "
        r"parameters' gradient 0\.\d{3}",
        step,
    )


@pytest.mark.parametrize(
    ("arguments", "settings", "requirement", "got"),
    [
        ((3, 1), {}, "nn.Module", "int"),
        ((net(),), {}, "batch", "none"),
        ((net(), 1), {"rounds": 0}, "rounds >= 1", "0"),
        ((net(), 1), {"patterns": ()}, "pattern", "none"),
        ((net(), 1), {"methods": ("best",)}, "mvue", "'best'"),
        ((nn.ReLU(), 1), {}, "layers to prune", "none"),
    ],
    ids=["module", "batches", "rounds", "patterns", "methods", "layers"],
)
def test_errors(arguments: tuple[Any, ...], settings: dict[str, Any], requirement: str, got: str) -> None:
    with pytest.raises(ValueError, match=f"^advise: expected .*{requirement}.*, got {got}"):
        sdgp.advise(*arguments, **settings)

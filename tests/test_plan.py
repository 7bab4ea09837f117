# SPDX-License-Identifier: BSD-3-Clause
"""Tests the plan of sdgp.advise: what it chooses, its verdicts, and convert with it."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from advice import Slower, batches, loss, net
from torch import nn

import sdgp
from sdgp._autograd import LinearProducts, LinearWeightProducts
from sdgp._plan import Candidate, Interval, Plan, net_saving

pytestmark = pytest.mark.usefixtures("told")


def row(layer: str, gradient: str, pattern: str, saved_ms: float, noise: float, **changes: Any) -> Candidate:
    values = {"shape": "(8, 8)", "method": "mvue", "exact_ms": 9.0, "sparse_ms": 1.0, "error": 0.5, "bias": 0.0}
    return Candidate(layer, gradient, pattern=pattern, saved_ms=saved_ms, noise=noise, **values | changes)


def test_chooses_what_saves_most_time_to_the_same_loss() -> None:
    rows = [
        row("a", "data", "8:16", 10, 0.001),
        row("a", "data", "4:16", 15, 0.002),  # saves 5 % more for 0.3 % more steps
        row("a", "data", "4:32", 18, 0.150),  # saves 3 % more for 15 % more steps
        row("a", "weight", "8:16", 2, 0.030),  # saves 2 % for 3 % more steps
        row("b", "weight", "8:16", 4, 0.0),
        row("c", "data", "8:16", 0, 0.0),
        row("d", "data", "8:16", 5, math.nan),
    ]
    plan = Plan(rows, {"a": "", "b": "", "c": "", "d": ""}, 100.0)
    assert plan == {"a": ("4:16", "mvue"), "b": ("1:1", "mvue", "8:16")}
    assert (plan.saved, plan.noise) == pytest.approx((0.19, 0.002))
    assert plan.limit == pytest.approx(0.45)  # five gradients of 9 ms
    assert plan.net == pytest.approx(net_saving(0.19, 0.002, 1.0)) == pytest.approx(1 - 0.81 * 1.002)
    nets = [point.net for point in plan.curve]
    assert nets == sorted(nets)
    assert plan.curve[0] == (0, 0, 0)
    assert nets[-1] == pytest.approx(plan.net)


def test_a_plan_that_measures_noisier_than_its_parts_is_chosen_anew() -> None:
    rows = [row("a", "data", "8:16", 10, 0.03), row("b", "data", "8:16", 10, 0.09)]
    plan = Plan(rows, {}, 100.0)
    assert set(plan) == {"a", "b"}
    assert plan.take_measured(0.12)
    assert not plan.take_measured(0.24)  # twice the noise: b now costs 18 %
    assert set(plan) == {"a"}
    assert plan.take_measured(0.06)
    assert plan.noise == pytest.approx(0.06)
    assert plan.take_measured(0.6) is False
    assert not plan
    assert plan.verdict.startswith("nothing pays here: the best of 2 candidates takes 10.0% off a step and costs 60.0%")


def test_steps_that_save_less_than_their_products() -> None:
    rows = [row("a", "data", "8:16", 10, 0.03), row("b", "data", "8:16", 10, 0.09)]
    plan = Plan(rows, {}, 100.0, noise_error=0.1)
    plan.take_realized(Interval(0.9, 0.7, 1.0))
    assert set(plan) == {"a", "b"}
    assert plan.saved == pytest.approx(0.18)
    by_noise, by_time = 0.82 * 0.12 * 0.2, 0.2 * 0.2 * 1.12
    assert plan.net - plan.net_low == pytest.approx(math.hypot(by_noise, by_time))
    assert plan.net_high - plan.net == pytest.approx(math.hypot(by_noise, 0.2 * 0.1 * 1.12))
    assert "the chosen products save 20% of a step; whole steps take 18% [14%, 20%] less time" in str(plan)
    plan.take_realized(Interval(0.5, 0.5, 0.5))  # b now saves 5 % for 9 % more steps
    assert set(plan) == {"a"}
    assert plan.saved == plan.curve[-1].saved == pytest.approx(0.05)
    plan.take_realized(Interval(0.2, 0.1, 0.3))
    assert plan.verdict.startswith("nothing pays here: the best of 2 candidates takes 2.0% off a step and costs 3.0%")
    plan.take_realized(Interval(-0.1, -0.2, 0.1))
    assert plan.verdict.startswith("nothing pays here: sparse products are faster, but whole steps with them take")
    assert "whole steps are not faster" in str(plan)
    assert "noise costs more" not in str(plan)


def test_a_saving_below_one_percent_does_not_pay() -> None:
    plan = Plan([row("a", "data", "8:16", 0.9, 0.0)], {"a": ""}, 100.0)
    assert not plan.pays
    assert plan.verdict == "nothing pays here: pruning could save 0.9% of the time to the same loss"


def test_unknown_noise_is_not_called_costly() -> None:
    unknown = [row("a", "data", "8:16", 5, math.nan), row("b", "data", "8:16", 4, math.nan)]
    plan = Plan(unknown, {"a": "", "b": ""}, 100.0)
    assert plan.verdict == "nothing pays here: the noise of all 2 candidates that save time is unknown"
    assert "exact (2): its noise is unknown" in str(plan)
    known = row("c", "data", "8:16", 5, 0.5)
    for rows in ([*unknown, known], [known, *unknown]):
        assert "costs 50.0% more steps (c, data gradient, 8:16)" in Plan(rows, dict.fromkeys("abc", ""), 100.0).verdict


def test_a_choice_that_saves_too_little() -> None:
    plan = Plan([row("a", "data", "8:16", 0.5, 0.0)], {"a": ""}, 100.0)
    assert str(plan) == (
        "exact (1): saves too little\n"
        "the products that pruning can shorten take 9% of a step\n"
        "nothing pays here: pruning could save 0.5% of the time to the same loss"
    )


def test_a_verdict_with_a_wide_interval() -> None:
    plan = Plan([row("a", "data", "8:16", 10, 0.05)], {"a": ""}, 100.0, noise_error=0.1)
    assert plan.verdict.startswith("it pays: ")
    plan = Plan([row("a", "data", "8:16", 10, 0.05)], {"a": ""}, 100.0, noise_error=1.0)
    assert plan.net_low < 0
    assert plan.verdict.startswith("it may pay: ")


def test_verdicts_of_an_empty_plan() -> None:
    with Slower():
        plan = sdgp.advise(net(), *batches(), loss=loss)
    assert (plan.pays, plan.saved, plan.noise, plan.net) == (False, 0, 0, 0)
    assert plan.verdict == repr(plan) == "nothing pays here: no sparse product is faster than the exact one"
    assert "exact (5): sparse is not faster" in str(plan)
    small = sdgp.advise(net(), *[(x[:256], y[:256]) for x, y in batches()], loss=loss)
    assert small.verdict == "nothing pays here: every layer is too small at this batch size"
    assert "the largest layer is too small to gain: use a batch 16 times as large" in small.notes


def test_no_sparse_product(monkeypatch: pytest.MonkeyPatch) -> None:
    for products in (LinearProducts, LinearWeightProducts):
        monkeypatch.setattr(products, "obstacle", lambda _: "a GPU, got none")
    plan = sdgp.advise(net(), *batches(), loss=loss)
    assert plan.verdict == "nothing pays here: a sparse product needs a GPU, got none"
    assert {row.sparse_ms for row in plan.candidates} == {None}


def test_convert_takes_a_plan_and_its_json() -> None:
    plan = Plan([row("2", "data", "8:16", 1, 0), row("4", "weight", "4:16", 1, 0, method="random")], {}, 10.0)
    assert plan == {"2": ("8:16", "mvue"), "4": ("1:1", "mvue", ("4:16", "random"))}
    model = sdgp.convert(net(), json.loads(json.dumps(plan)), backend="pruned")
    assert [(row.gradient, row.pattern, row.method) for row in sdgp.report(model)] == [
        ("data", "", ""),
        ("data", "8:16", "mvue"),
        ("data", "1:1", "mvue"),
        ("weight", "4:16", "random"),
    ]
    assert sdgp.report(model)[0].note == "plain: not in the plan"
    loss(model, batches()[0]).backward()
    assert sdgp.report(model)[2].product == "exact"
    sdgp.convert(model, {})
    assert [row.note for row in sdgp.report(model)] == ["plain: not in the plan"] * 3


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
        ({"2": ("2:4", "best")}, r"convert: expected .*unstructured, got 'best'"),
    ],
    ids=str,
)
def test_bad_plans(plan: Any, message: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=f"^{message}"):
        sdgp.convert(model, plan)
    assert type(model[2]) is nn.Linear


def test_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdgp._plan.STEPS_PER_NOISE", 0.01)
    model = nn.Sequential(net(), nn.Linear(64, 64), nn.Linear(64, 2), nn.Bilinear(2, 2, 8))
    model.forward = lambda x: model[2](model[1](model[0](x)))
    plan = sdgp.advise(model, *[(x, y % 2) for x, y in batches()], loss=loss, filter=lambda _, name: name != "1")
    text = str(plan)
    assert text.splitlines()[0].split(" | ")[0].strip() == "layer"
    chosen = plan.chosen[0]
    pruned_to = f"{chosen.pattern} {chosen.method}"
    cells = rf"{chosen.layer} +\| {chosen.gradient} +\| \(8192, 64\) \| {pruned_to} +\| 1\.00 +\| 0\.\d\d"
    assert re.search(rf"^{cells}", text, re.MULTILINE), text
    assert "exact (1): filter returned False" in text
    assert (
        "exact (1): nn.Linear, nn.Conv2d, transformers' Conv1D and torchao's Float8Linear are converted, not Bilinear"
        in text
    )
    assert text.splitlines()[-1] == plan.verdict

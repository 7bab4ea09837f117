# SPDX-License-Identifier: BSD-3-Clause
"""Tests sdgp.Schedule: exact units, patterns, what it leaves unchanged, and resuming from a state_dict."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdgp


def small(**settings: Any) -> nn.Sequential:
    settings = {"method": "magnitude", "backend": "pruned"} | settings
    return sdgp.convert(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6)), "2:4", **settings)


def products(model: nn.Module) -> list[str]:
    return [row.product for row in sdgp.report(model)]


def reasons(model: nn.Module) -> set[str]:
    """Returns why layers are held, with "" for layers that are not."""
    return {row.why if row.product == "exact" else "" for row in sdgp.report(model)}


def gradient(model: nn.Module) -> Tensor:
    x = torch.linspace(-1, 1, 32).reshape(4, 8).requires_grad_()
    return torch.autograd.grad(model(x).square().sum(), x)[0]


def course(schedule: sdgp.Schedule, see: Callable[[], object], units: int) -> list[object]:
    seen = []
    for _ in range(units):
        seen.append(see())
        schedule.step()
    return seen


@pytest.mark.parametrize(
    ("settings", "exact"),
    [
        ({}, "0000000000"),
        ({"exact_first": 3}, "1110000000"),
        ({"total": 8, "exact_first": 2, "exact_last": 3}, "1100011111"),  # beyond the total: as at the end
        ({"total": 8, "exact_first": 5, "exact_last": 3}, "1111111111"),
        ({"total": 10, "exact_first": 0.3, "exact_last": 0.19}, "1110000001"),
        ({"total": 100, "exact_first": 0.07}, "1111111000"),  # 0.07 * 100 > 7, 0.29 * 100 < 29
        ({"total": 3, "exact_first": 0.5, "exact_last": 0.5}, "1011111111"),
        ({"total": 10, "exact_first": 0.0}, "0000000000"),
        ({"exact_first": 0.0}, "0000000000"),  # a share of no total
        ({"total": 1, "exact_last": 1}, "1111111111"),
    ],
    ids=str,
)
def test_exact_units(settings: dict[str, Any], exact: str) -> None:
    model = small()
    pruned, plain = gradient(model), gradient(sdgp.revert(copy.deepcopy(model)))
    assert not torch.allclose(pruned, plain)
    schedule = sdgp.Schedule(model, **settings)
    expected = [digit == "1" for digit in exact]
    assert course(schedule, lambda: torch.equal(gradient(model), plain), 10) == expected
    schedule.seek(0)
    assert course(schedule, lambda: torch.equal(gradient(model), pruned), 10) == [not is_exact for is_exact in expected]
    schedule.seek(0)
    assert course(schedule, lambda: schedule.exact, 10) == expected


def test_patterns_change_nothing_else() -> None:
    model = sdgp.convert(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16)), "1:2", "rescale", backend="sparse")
    model.append(sdgp.convert(nn.Linear(16, 16), "2:8", "random", backend="dense"))
    model.append(nn.Linear(16, 4))
    schedule = sdgp.Schedule(model, total=10, patterns={0.5: (1, 4), 2: "2:4"})

    def patterns() -> str:
        return " ".join(row.pattern for row in sdgp.report(model))

    assert course(schedule, patterns, 6) == [*["1:2 1:2 2:8 "] * 2, *["2:4 2:4 2:4 "] * 3, "1:4 1:4 1:4 "]
    assert [(row.method, row.backend) for row in sdgp.report(model)] == [
        ("rescale", "sparse"),
        ("rescale", "sparse"),
        ("random", "dense"),
        ("", ""),
    ]
    schedule.seek(0)
    assert patterns() == "1:2 1:2 2:8 "
    assert schedule.pattern is None
    schedule.seek(9)
    assert schedule.pattern == (1, 4)


def test_a_pattern_takes_effect_and_n_equal_m_is_exact() -> None:
    model = small()
    plain = gradient(sdgp.revert(copy.deepcopy(model)))
    at_1_4 = gradient(sdgp.convert(copy.deepcopy(model), "1:4", "magnitude", backend="pruned"))
    schedule = sdgp.Schedule(model, patterns={0: "4:4", 1: "1:4"})
    assert torch.equal(gradient(model), plain)
    schedule.step()
    assert torch.equal(gradient(model), at_1_4)


def test_too_narrow_a_layer_is_exact_while_the_pattern_lasts() -> None:
    model = small(backend="dense")
    schedule = sdgp.Schedule(model, patterns={1: "2:8", 2: "2:4"})
    assert course(schedule, lambda: products(model)[1], 3) == ["dense", "exact", "dense"]
    schedule.seek(1)
    assert "6 output channels" in sdgp.report(model)[1].why
    # A layer that convert would refuse, but that the caller built, must continue to prune.
    layer = sdgp.Linear(8, 3, backend="pruned")
    sdgp.Schedule(layer).step()
    assert layer.is_pruning


def test_report() -> None:
    model = small()
    schedule = sdgp.Schedule(model, total=9, exact_first=2, exact_last=3)
    assert reasons(model) == {"scheduled, exact_first=2"}
    schedule.seek(2)
    assert reasons(model) == {""}
    schedule.seek(6)
    assert reasons(model) == {"scheduled, exact_last=3 of 9"}
    with sdgp.paused(model):
        assert len(reasons(model) & {"paused", "scheduled, exact_last=3 of 9"}) == 1  # both hold the layer
    schedule.seek(2)
    with sdgp.paused(model):
        assert reasons(model) == {"paused"}
    schedule.seek(6)
    assert repr(schedule) == "Schedule(count=6, total=9, exact_first=2, exact_last=3, patterns={})"


def test_paused_and_a_schedule_leave_each_other_alone() -> None:
    model = small()
    plain = gradient(sdgp.revert(copy.deepcopy(model)))
    schedule = sdgp.Schedule(model, exact_first=1)
    with sdgp.paused(model):
        schedule.step()
        assert torch.equal(gradient(model), plain)  # still paused
    assert not torch.equal(gradient(model), plain)
    with sdgp.paused(model):
        schedule.seek(0)
    assert torch.equal(gradient(model), plain)  # still scheduled


def test_convert_and_revert_on_the_way() -> None:
    model = small()
    schedule = sdgp.Schedule(model, exact_first=1)
    sdgp.convert(model, "1:4", backend="pruned")
    assert reasons(model) == {"scheduled, exact_first=1"}
    schedule.step()
    assert [row.pattern for row in sdgp.report(model)] == ["1:4", "1:4"]  # no patterns in the schedule: convert's stay
    schedule.seek(0)
    sdgp.revert(model)
    schedule.step()
    assert all(type(layer) in (nn.Linear, nn.ReLU) for layer in model)
    assert not any({"pruning", "holds", "decision"} & set(vars(layer)) for layer in model)


def test_one_layer_is_reverted_on_the_way() -> None:
    model = small()
    schedule = sdgp.Schedule(model, exact_first=1)
    sdgp.revert(model[0])
    schedule.step()
    assert products(model) == ["plain", ""]
    assert model[2].is_pruning


def test_copies_and_saved_models_keep_the_phase() -> None:
    model = small()
    schedule = sdgp.Schedule(model, exact_first=1)
    twin = copy.deepcopy(model)
    schedule.step()
    assert reasons(twin) == {"scheduled, exact_first=1"}
    sdgp.Schedule(twin)  # a new schedule takes over
    assert reasons(twin) == {""}


@pytest.mark.parametrize("patterns", [{}, {1: "1:4"}])
@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_new_schedule_knows_the_layers_own_patterns(
    copied: Callable[[nn.Module], nn.Module], patterns: dict[float, str]
) -> None:
    model = small(weight_grad="2:4")
    sdgp.Schedule(model, patterns={1: "2:8"}).step()
    assert [row.pattern for row in sdgp.report(model) if row.gradient == "data"] == ["2:8", "1:1"]
    twin = copied(model)
    sdgp.Schedule(twin, patterns=patterns)
    assert {row.pattern for row in sdgp.report(twin)} == {"2:4"}
    sdgp.convert(twin, "1:2", backend="pruned")  # then this is their own
    sdgp.Schedule(twin, patterns=patterns)
    assert {row.pattern for row in sdgp.report(twin)} == {"1:2"}


def test_state_dict() -> None:
    def train(model: nn.Module, schedule: sdgp.Schedule, units: int) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(units):
            optimizer.zero_grad()
            model(torch.ones(2, 8, requires_grad=True)).square().sum().backward()
            optimizer.step()
            schedule.step()

    settings: dict[str, Any] = {"total": 8, "exact_first": 2, "exact_last": 2, "patterns": {0: "1:4", 5: "2:4"}}
    start = small()
    whole, first, second = (copy.deepcopy(start) for _ in range(3))
    train(whole, sdgp.Schedule(whole, **settings), 8)
    schedule = sdgp.Schedule(first, **settings)
    train(first, schedule, 5)
    assert schedule.state_dict() == {"count": 5}
    resumed = sdgp.Schedule(second, **settings)
    resumed.load_state_dict(schedule.state_dict())
    second.load_state_dict(first.state_dict())
    train(second, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_compiled() -> None:
    model = small()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(compiled), gradient(model))
    schedule = sdgp.Schedule(model, exact_first=1, patterns={2: "1:4"})  # the model is already compiled
    phases = []
    for _ in range(3):
        phases.append(gradient(model))
        torch.testing.assert_close(gradient(compiled), phases[-1])
        schedule.step()
    assert not any(torch.allclose(one, other) for one, other in itertools.combinations(phases, 2))


def test_old_names_warn_and_work() -> None:
    model = small()
    with pytest.warns(FutureWarning, match="exact_first") as first:
        schedule = sdgp.Schedule(model, total=9, dense_first=2)
    assert repr(schedule) == repr(sdgp.Schedule(model, total=9, exact_first=2))
    with pytest.warns(FutureWarning, match="exact_last"):
        schedule = sdgp.Schedule(model, total=9, dense_last=0.5)
    assert repr(schedule) == repr(sdgp.Schedule(model, total=9, exact_last=0.5))
    assert first[0].filename == __file__  # the caller that uses the old name


@pytest.mark.parametrize(
    ("call", "requirement", "got"),
    [
        (lambda: sdgp.Schedule("resnet18"), "nn.Module", "str"),  # type: ignore[arg-type]
        (lambda: sdgp.Schedule(nn.Linear(8, 8)), "converted layers", "none"),
        (lambda: sdgp.Schedule(small(), total=0), "total to be an integer >= 1", "0"),
        (lambda: sdgp.Schedule(small(), total=4.5), "total to be an integer >= 1", "4.5"),  # type: ignore[arg-type]
        (lambda: sdgp.Schedule(small(), exact_last=3), "total", "exact_last=3"),
        (lambda: sdgp.Schedule(small(), exact_first=0.1), "total", "exact_first=0.1"),
        (lambda: sdgp.Schedule(small(), patterns={0.5: "2:4"}), "total", "patterns' keys=0.5"),
        (
            lambda: sdgp.Schedule(small(), total=9, exact_first=5, exact_last=5),
            "exact_first + exact_last <= total",
            "5 + 5 > 9",
        ),
        (lambda: sdgp.Schedule(small(), total=9, exact_first=1.0), "exact_first", "1.0"),
        (lambda: sdgp.Schedule(small(), total=9, exact_last=-1), "exact_last", "-1"),
        (lambda: sdgp.Schedule(small(), total=9, patterns={1: "2:4", 9: "1:4"}), "before total", "9 >= 9"),
        (lambda: sdgp.Schedule(small()).seek(-1), "count to be an integer >= 0", "-1"),
        (lambda: sdgp.Schedule(small()).load_state_dict({"count": "3"}), "count to be an integer >= 0", "'3'"),
        (lambda: sdgp.Schedule(small()).load_state_dict({"epoch": 3}), '"count"', "['epoch']"),
    ],
)
def test_errors(call: Callable[[], object], requirement: str, got: str) -> None:
    with pytest.raises(ValueError, match=f"^Schedule: expected .*{re.escape(requirement)}.*, got .*{re.escape(got)}"):
        call()


def test_unknown_pattern() -> None:
    with pytest.raises(ValueError, match=r'^pattern: expected "n:m"'):
        sdgp.Schedule(small(), patterns={3: "4:2"})


def test_an_empty_plan_leaves_nothing_to_schedule_or_watch() -> None:
    """Scripts that follow the advice must also run where nothing pays."""
    model = sdgp.convert(nn.Sequential(nn.Linear(8, 8)), {})
    for copied in (model, copy.deepcopy(model)):
        schedule = sdgp.Schedule(copied, total=4, exact_first=0.25)
        schedule.step()
        assert schedule.count == 1
        assert list(sdgp.watch(copied)) == []
        assert sdgp.profile(copied, torch.randn(2, 8), rounds=1) == []
    sdgp.revert(model)
    with pytest.raises(ValueError, match="converted layers, got none"):
        sdgp.Schedule(model)


def test_a_share_of_less_than_one_unit_is_said() -> None:
    model = sdgp.convert(nn.Linear(8, 8), "2:4")
    with pytest.warns(UserWarning, match="exact_first=0.25 of total=3 is less than one unit") as warned:
        schedule = sdgp.Schedule(model, total=3, exact_first=0.25)
    assert warned[0].filename == __file__
    assert not schedule.exact
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a pattern from the start has an effect
        assert str(sdgp.Schedule(model, total=3, patterns={0.25: "1:4"}).pattern) == "1:4"


def test_layers_that_are_converted_later_follow_the_schedule() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 6))
    sdgp.convert(model, {"0": ("2:4", "mvue")}, backend="pruned")
    schedule = sdgp.Schedule(model, total=10, exact_first=5)
    sdgp.convert(model, "2:4", backend="pruned")
    assert reasons(model) == {"scheduled, exact_first=5"}
    sdgp.revert(model)
    sdgp.convert(model, "2:4", backend="pruned")
    assert reasons(model) == {"scheduled, exact_first=5"}
    schedule.seek(5)
    assert reasons(model) == {""}


def test_a_new_conversion_replaces_the_layers_own_pattern() -> None:
    model = small()
    schedule = sdgp.Schedule(model, total=10, patterns={5: "1:4"})
    sdgp.convert(model, "1:2", backend="pruned")
    schedule.step()
    assert {row.pattern for row in sdgp.report(model)} == {"1:2"}
    schedule.seek(5)
    sdgp.convert(model, "1:2", backend="pruned")
    assert {row.pattern for row in sdgp.report(model)} == {"1:4"}
    schedule.seek(0)
    assert {row.pattern for row in sdgp.report(model)} == {"1:2"}


def test_a_model_follows_its_newest_schedule() -> None:
    model = small()
    first = sdgp.Schedule(model, exact_first=5)
    second = sdgp.Schedule(model, exact_first=1)
    second.step()
    first.step()
    assert first.exact
    assert reasons(model) == {""}
    del second
    sdgp.convert(model, "2:4", backend="pruned")  # no schedule is left to follow
    assert reasons(model) == {""}


def test_a_conversion_ends_what_a_lost_schedule_holds() -> None:
    model = small()
    schedule = sdgp.Schedule(model, total=2, exact_last=1)
    schedule.step()
    del schedule
    assert reasons(model) == {"scheduled, exact_last=1 of 2"}
    sdgp.convert(model, "2:4", backend="pruned")
    assert reasons(model) == {""}


def test_a_copy_of_model_and_schedule_goes_on() -> None:
    model = small()
    twin, schedule = copy.deepcopy((model, sdgp.Schedule(model, exact_first=2)))
    for _ in range(2):
        schedule.step()
    assert reasons(twin) == {""}

# SPDX-License-Identifier: BSD-3-Clause
"""Tests the hints of sdgp.advise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from advice import Wrapped, batches, loss, net
from torch import Tensor, nn

import sdgp

pytestmark = pytest.mark.usefixtures("told")


@pytest.mark.parametrize(
    ("cpu", "ms", "steps", "hint"),
    [
        ("AVX512", 5, 4, "saves 50% of a step"),
        ("AVX512", 9.5, 4, ""),
        ("AVX512", 25, 1, ""),
        ("AVX512", None, 1, ""),
        ("AVX2", 5, 0, ""),
    ],
)
def test_hint_of_plain_bfloat16(
    cpu: str, ms: float | None, steps: int, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time None means that the loss fails under autocast."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: cpu)
    inside = []

    def seconds(call: Any, device: torch.device) -> float:
        before = len(inside)
        call()
        return (ms or 0) / 1e3 if len(inside) > before else 0.010

    def noticed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            inside.append(torch.get_autocast_dtype("cpu"))
            if ms is None:
                raise TypeError("numpy has no bfloat16")
        return loss(model, batch)

    monkeypatch.setattr("sdgp._steps.seconds", seconds)
    plan = sdgp.advise(net(), *batches(), loss=noticed)
    assert inside == steps * [torch.bfloat16]
    assert [note for note in plan.notes if "bfloat16" in note and hint in note] == plan.notes[: bool(hint)]
    assert plan.pays


def test_an_optimizer_with_half_of_adams_state_is_not_adam() -> None:
    """Adafactor has exp_avg_sq for vectors, without betas; Muon leaves matrices without exp_avg_sq."""
    for state, group in (
        ({"exp_avg_sq": torch.ones(64), "step": 3}, {}),
        ({"momentum_buffer": torch.ones(64)}, {"betas": (0.9, 0.999)}),
    ):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.param_groups[0].update(group)
        optimizer.state[model[0].weight] = {"exp_avg_sq": torch.ones(64, 32), "step": 3}
        optimizer.state[model[0].bias] = state
        plan = sdgp.advise(model, *batches(), loss=loss, optimizer=optimizer)
        assert plan.norm == "euclidean"
        assert {row.layer for row in plan.candidates} == {"0", "2", "4"}


def test_what_costs_nothing() -> None:
    model, pair = net(), batches()
    model.unused = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([*model[4].parameters(), model.unused], lr=0.1)
    for x, _ in pair:
        x.requires_grad_()
    notes = sdgp.advise(model, *pair, loss=loss, optimizer=optimizer).notes
    assert "parameters that get no gradient: 1; set requires_grad=False" in notes
    assert "parameters with a gradient that the optimizer does not use: 4; set requires_grad=False" in notes
    assert "the data gradient of 0, 2, 4 reaches no trained parameter: detach the input" in notes


def test_a_plan_with_convolutions_says_when_to_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdgp._plan.STEPS_PER_NOISE", 0.01)
    pair = [(torch.randn(64, 3, 20, 20), torch.randint(64, (64,))) for _ in range(2)]
    plan = sdgp.advise(Wrapped(), *pair, loss=loss)
    assert "shared" in plan
    assert "exact_first=0.25" in plan.notes[-1]
    assert not any("exact_first" in note for note in sdgp.advise(net(), *batches(), loss=loss).notes)


def test_hint_of_batches_of_another_size() -> None:
    pair = batches()
    plan = sdgp.advise(net(), *pair, (pair[0][0][:100], pair[0][1][:100]), loss=loss)
    assert "batches of another size than the first, which were ignored: 1" in plan.notes


def test_a_gradient_without_an_error_has_no_noise_and_a_zero_gradient_gives_a_hint() -> None:
    model = net()
    nn.init.zeros_(model[4].weight)  # so the gradients of the layers before it are zero
    plan = sdgp.advise(model, *batches(), loss=loss)
    assert "gradients that are zero in this batch: 4; train a few steps, and ask again" in plan.notes
    assert all(row.layer == "4" for row in plan.chosen)

    class Sparse(nn.Module):
        """Passes one of 32 features on, so that pruning the gradient loses nothing."""

        def forward(self, x: Tensor) -> Tensor:
            return x * (torch.arange(64) % 32 == 0)

    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 64), Sparse(), nn.Linear(64, 64))
    rows = [row for row in sdgp.advise(model, *batches(), loss=loss).candidates if row.layer == "1"]
    assert {row.noise for row in rows if row.gradient == "data"} == {0.0}

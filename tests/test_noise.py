# SPDX-License-Identifier: BSD-3-Clause
"""Tests the noise that sdgp.advise measures, beside whole backwards."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from advice import Wrapped, batch_noise, batches, gradient, loss, net
from torch import Tensor, nn

import sdgp
from sdgp._plan import STEPS_PER_NOISE, Candidate

pytestmark = pytest.mark.usefixtures("told")


def setting(row: Candidate) -> dict[str, tuple[Any, ...]]:
    """Returns a plan with one candidate alone."""
    one = (row.pattern, row.method)
    return {row.layer: one if row.gradient == "data" else ("1:1", "mvue", one)}


@pytest.mark.parametrize(("method", "patterns"), [("mvue", ("2:4", "1:4")), ("unstructured", ("1:4", "4:32"))])
def test_noise_is_that_of_the_parameters_gradient(method: str, patterns: tuple[str, ...]) -> None:
    """The noise of each candidate must match whole backwards in which only that gradient is pruned, over four pairs."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for seed in range(4):
        model, pair = net(), batches(seed=seed)
        rows = sdgp.advise(model, *pair, loss=loss, patterns=patterns, methods=(method,)).candidates
        exact, noise = gradient(model, pair[0]), batch_noise(model, pair)
        for row in rows:
            assert row.bias == 0
            twin = sdgp.convert(copy.deepcopy(model), setting(row), backend="dense")
            draws = [float((gradient(twin, pair[0]) - exact).square().sum()) for _ in range(3)]
            found.setdefault((row.layer, row.gradient, row.pattern), []).append(row.noise * noise * 3 / sum(draws))
    assert {key[:2] for key in found} == {
        ("0", "weight"),
        *((layer, gradient) for layer in ("2", "4") for gradient in ("data", "weight")),
    }
    assert {key: sum(ratios) / 4 for key, ratios in found.items()} == pytest.approx(dict.fromkeys(found, 1.0), rel=0.2)


@pytest.mark.parametrize("method", ["mvue", "magnitude"])
def test_the_whole_plan_is_measured(method: str) -> None:
    """The whole plan must be measured, because the errors of a biased method do not add up as noise does."""
    model, pair = net(), batches()
    plan = sdgp.advise(model, *pair, loss=loss, methods=(method,))
    assert plan.pays
    assert ("biased" in str(plan)) == (method == "magnitude")
    assert {row.bias == (0 if method == "mvue" else row.error) for row in plan.chosen} == {True}
    exact, noise = gradient(model, pair[0]), batch_noise(model, pair)
    twin = sdgp.convert(copy.deepcopy(model), plan, backend="dense")
    draws = [float((gradient(twin, pair[0]) - exact).square().sum()) for _ in range(4)]
    assert plan.noise == pytest.approx(sum(draws) / 4 / noise, rel=0.15)
    if method == "mvue":
        assert plan.noise == pytest.approx(math.fsum(row.noise for row in plan.chosen), rel=0.25)
    assert plan.saved == pytest.approx(math.fsum(row.saved_ms for row in plan.chosen) / 10)
    assert plan.net == pytest.approx(1 - (1 - plan.saved) * (1 + STEPS_PER_NOISE * plan.noise))
    assert plan.net_low < plan.net < plan.net_high
    assert re.search(r"^it pays: \d+% less time to the same loss \[-?\d+%, \d+%\]; a step takes", plan.verdict)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_batch_is_halved(reduction: str) -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction=reduction)

    model, pair = net(), batches()
    both = tuple(torch.cat(tensors) for tensors in zip(*pair, strict=True))
    one, two = (sdgp.advise(model, *given, loss=loss, methods=("mvue",)) for given in ([both], pair))
    assert "one batch gives the noise only to a factor of about two: pass more batches" in one.notes
    # Twice the batch halves the noise of the batch and of the pruning.
    ratios = [a.noise / b.noise for a, b in zip(one.candidates, two.candidates, strict=True)]
    assert ratios == pytest.approx([1.0] * len(ratios), rel=0.35)


def test_adams_steps_scale_the_noise() -> None:
    model, pair = net(), batches()
    optimizer = torch.optim.AdamW(model.parameters(), eps=2e-4)
    assert "not Adam, or has made no step" in str(sdgp.advise(model, *pair, loss=loss, optimizer=optimizer))
    for batch in pair:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    plan = sdgp.advise(model, *pair, loss=loss, optimizer=optimizer, patterns=("2:4",))
    assert plan.norm == "adam"
    exact, other = gradient(model, pair[0]), gradient(model, pair[1])
    states = [optimizer.state[parameter] for parameter in model.parameters()]
    scale = torch.cat(
        [(state["exp_avg_sq"] / (1 - 0.999**2)).sqrt().add(2e-4).reciprocal().flatten() for state in states]
    )
    noise = float(((exact - other) * scale).square().sum()) / 2
    found = next(row for row in plan.candidates if (row.layer, row.gradient) == ("2", "data"))
    twin = sdgp.convert(copy.deepcopy(model), {"2": ("2:4", "mvue")}, backend="dense")
    draws = [float(((gradient(twin, pair[0]) - exact) * scale).square().sum()) for _ in range(4)]
    assert found.noise == pytest.approx(sum(draws) / 4 / noise, rel=0.3)


def test_noise_of_a_model_with_everything_in_the_way() -> None:
    torch.manual_seed(1)
    model, pair = Wrapped(), [(torch.randn(64, 3, 20, 20), torch.randint(64, (64,))) for _ in range(2)]
    plan = sdgp.advise(model, *pair, loss=loss, patterns=("1:4",))
    exact, noise = gradient(model, pair[0]), batch_noise(model, pair)
    assert {(row.layer, row.gradient) for row in plan.candidates} == {("first", "weight")} | {
        (layer, gradient) for layer in ("circular", "shared", "head") for gradient in ("data", "weight")
    }
    for row in plan.candidates:
        twin = sdgp.convert(copy.deepcopy(model), setting(row), backend="dense")
        draws = [float((gradient(twin, pair[0]) - exact).square().sum()) for _ in range(8)]
        assert row.noise == pytest.approx(sum(draws) / 8 / noise, rel=0.5), row


def test_a_quarter_without_a_gradient_is_not_the_whole() -> None:
    """A quarter of the batch that has no gradient must not stand for the whole.

    For example, only the last step of a sequence may have a loss.
    """

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = net()

        def forward(self, x: Tensor) -> Tensor:  # (steps, samples, features)
            steps: Tensor = self.layers(x)
            return steps[-1]

    torch.manual_seed(1)
    model, pair = Last(), [(torch.randn(8, 1024, 32), torch.randint(64, (1024,))) for _ in range(2)]
    plan = sdgp.advise(model, *pair, loss=loss, patterns=("1:4",))
    noise = batch_noise(model, pair)
    exact = gradient(model, pair[0])
    for row in plan.candidates:
        twin = sdgp.convert(copy.deepcopy(model), setting(row), backend="dense")
        draws = [float((gradient(twin, pair[0]) - exact).square().sum()) for _ in range(4)]
        assert math.isnan(row.noise) or row.noise == pytest.approx(sum(draws) / 4 / noise, rel=0.5), row


def test_an_input_changed_in_place_is_not_read() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):  # backward saves the cast tensor
                x = self.first(x).float()
                y: Tensor = self.second(x)
            x += 1000
            return y.float()

    plan = sdgp.advise(Changing(), *batches(), loss=loss)
    assert {(row.layer, row.gradient) for row in plan.candidates} == {("first", "weight"), ("second", "data")}


def test_a_reentrant_checkpoint_leaves_data_gradients_unmeasured() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rest = nn.Linear(32, 32), net()

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = torch.utils.checkpoint.checkpoint(self.rest, self.first(x), use_reentrant=True)
            return output

    plan = sdgp.advise(Checkpointed(), *batches(), loss=loss)
    assert any("the noise of data gradients could not be measured" in note for note in plan.notes)
    assert {row.gradient for row in plan.chosen} <= {"weight"}


def test_sparse_gradients_and_parameters_without_state() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.layers, self.unused = nn.Embedding(50, 32, sparse=True), net(), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layers(self.words(x))
            return output

    torch.manual_seed(0)
    model, pair = Words(), [(torch.randint(50, (8192,)), torch.randint(64, (8192,))) for _ in range(2)]
    rows = sdgp.advise(model, *pair, loss=loss).candidates
    assert all(math.isfinite(row.noise) for row in rows)
    optimizer = torch.optim.Adam([*model.layers.parameters(), model.unused])
    loss(model, pair[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.words.weight.grad = None
    assert sdgp.advise(model, *pair, loss=loss, optimizer=optimizer).norm == "adam"

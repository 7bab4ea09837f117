# SPDX-License-Identifier: BSD-3-Clause
"""Tests sdgp.advise: its measurements and choices, that it keeps the model unchanged, and convert with its plan."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdgp
from sdgp._autograd import LinearProducts, LinearWeightProducts
from sdgp._decision import Products
from sdgp._pattern import Pruning
from sdgp._plan import STEPS_PER_NOISE, Candidate, Plan, net_saving

SPARSE_MS = {
    "16:32": 0.8,
    "8:16": 0.8,
    "2:4": 0.8,
    "8:32": 0.6,
    "4:16": 0.6,
    "1:4": 0.6,
    "4:32": 0.3,
}  # the exact product takes 1


class Told(sdgp.Chooser):
    """A chooser that takes the time of a sparse product from its pattern."""

    def measure(self, products: Products, pruning: Pruning, rounds: int | None = None) -> sdgp.Decision:
        assert products.exact().shape == products.sparse().shape
        return sdgp.Decision("sparse", "", exact_ms=1.0, sparse_ms=SPARSE_MS[str(pruning.pattern)])


class Slower(sdgp.Chooser):
    def measure(self, products: Products, pruning: Pruning, rounds: int | None = None) -> sdgp.Decision:
        return sdgp.Decision("exact", "", exact_ms=1.0, sparse_ms=2.0)


@pytest.fixture(autouse=True)
def _told(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gives products and steps fixed times, so that no result depends on a clock."""
    monkeypatch.setattr("sdgp._steps.seconds", lambda call, device: (call(), 0.010)[1])
    with Told():
        yield


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


def batches(count: int = 2, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Makes batches so large that no product is too small, with noisy targets, so that the batches differ much."""
    torch.manual_seed(seed)
    return [(torch.randn(8192, 32), torch.randint(64, (8192,))) for _ in range(count)]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def gradient(model: nn.Module, batch: Any) -> Tensor:
    model.zero_grad()
    loss(model, batch).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def batch_noise(model: nn.Module, pair: list[Any]) -> float:
    one, two = (gradient(model, batch) for batch in pair)
    return float((one - two).square().sum()) / 2


def test_noise_is_that_of_the_parameters_gradient() -> None:
    """The noise of each candidate must match whole backwards in which only that gradient is pruned, over four pairs."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for seed in range(4):
        model, pair = net(), batches(seed=seed)
        rows = sdgp.advise(model, *pair, loss=loss, patterns=("2:4", "1:4")).candidates
        exact, noise = gradient(model, pair[0]), batch_noise(model, pair)
        for row in rows:
            assert row.bias == 0
            plan = {row.layer: (row.pattern, "mvue") if row.gradient == "data" else ("1:1", "mvue", row.pattern)}
            twin = sdgp.convert(copy.deepcopy(model), plan, backend="dense")
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
    assert plan.net == pytest.approx(net_saving(0.19, 0.002, 1.0)) == pytest.approx(1 - 0.81 * 1.002)
    nets = [point.net for point in plan.curve]
    assert nets == sorted(nets)
    assert plan.curve[0] == (0, 0, 0)
    assert nets[-1] == pytest.approx(plan.net)


def test_layers_of_the_same_shapes_are_timed_once() -> None:
    class Counting(Told):
        count = 0

        def measure(self, products: Products, pruning: Pruning, rounds: int | None = None) -> sdgp.Decision:
            self.count += 1
            return super().measure(products, pruning, rounds)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), *(nn.Linear(64, 64) for _ in range(3)))
    with Counting() as chooser:
        plan = sdgp.advise(model, *batches(), loss=loss, patterns=("8:16", "4:16"))
    data = 2  # patterns of the three equal layers; the first layer has no data gradient
    weight = 2 + 2  # patterns of the three equal layers, and of the first layer
    assert chooser.count == data + weight
    assert sum(row.saved_ms > 0 for row in plan.candidates) == 3 * data + 3 * 2 + 2


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


def test_a_saving_below_one_percent_does_not_pay() -> None:
    plan = Plan([row("a", "data", "8:16", 0.9, 0.0)], {"a": ""}, 100.0)
    assert not plan.pays
    assert plan.verdict == "nothing pays here: pruning could save 0.9% of the time to the same loss"


def test_verdicts_of_an_empty_plan() -> None:
    with Slower():
        plan = sdgp.advise(net(), *batches(), loss=loss)
    assert (plan.pays, plan.saved, plan.noise, plan.net) == (False, 0, 0, 0)
    assert plan.verdict == repr(plan) == "nothing pays here: no sparse product is faster than the exact one"
    assert "exact (5): sparse is not faster" in str(plan)
    small = sdgp.advise(net(), *[(x[:256], y[:256]) for x, y in batches()], loss=loss)
    assert small.verdict == "nothing pays here: every layer is too small at this batch size"
    assert "the largest layer is too small to gain: use a batch 16 times as large" in small.notes


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


def test_no_sparse_product(monkeypatch: pytest.MonkeyPatch) -> None:
    for products in (LinearProducts, LinearWeightProducts):
        monkeypatch.setattr(products, "obstacle", lambda _: "a GPU, got none")
    plan = sdgp.advise(net(), *batches(), loss=loss)
    assert plan.verdict == "nothing pays here: a sparse product needs a GPU, got none"
    assert {row.sparse_ms for row in plan.candidates} == {None}


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
        ({"2": ("2:4", "best")}, r"convert: expected .*mvue, got 'best'"),
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
    cells = rf"{chosen.layer} +\| {chosen.gradient} +\| \(8192, 64\) \| {chosen.pattern} mvue +\| 1\.00 +\| 0\.\d\d"
    assert re.search(rf"^{cells}", text, re.MULTILINE), text
    assert "exact (1): filter returned False" in text
    assert "exact (1): only nn.Linear and nn.Conv2d are converted, not Bilinear" in text
    assert text.splitlines()[-1] == plan.verdict


def test_patterns_by_device_and_width() -> None:
    """A GPU must get no groups wider than its 2:4 tensor cores take, and a layer of few features no groups of 32."""
    assert sdgp._advise._default_patterns(nn.Linear(8, 8, device="meta")) == [(2, 4), (1, 4)]
    model = nn.Sequential(nn.Linear(32, 128), nn.Linear(128, 16))
    with Slower():
        rows = sdgp.advise(model, *[(x, y % 16) for x, y in batches()], loss=loss).candidates
    tried = {(row.layer, row.gradient): row.pattern for row in rows if row.sparse_ms is not None}
    assert tried == {("0", "weight"): "4:32", ("1", "data"): "2:16", ("1", "weight"): "4:32"}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_batch_is_halved(reduction: str) -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction=reduction)

    model, pair = net(), batches()
    both = tuple(torch.cat(tensors) for tensors in zip(*pair, strict=True))
    one, two = sdgp.advise(model, both, loss=loss), sdgp.advise(model, *pair, loss=loss)
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


class Wrapped(nn.Module):
    """A model with in-place activations, a checkpoint, a shared layer and a convolution that pads its input itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.circular = nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular")
        self.shared = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x), inplace=True)
        x = torch.utils.checkpoint.checkpoint(lambda x: F.relu(self.circular(x)), x, use_reentrant=False)
        x = F.relu(self.shared(F.relu(self.shared(x), inplace=True)), inplace=True)
        return self.head(x.flatten(2).transpose(1, 2)).mean(1)


def test_noise_of_a_model_with_everything_in_the_way() -> None:
    torch.manual_seed(1)
    model, pair = Wrapped(), [(torch.randn(64, 3, 20, 20), torch.randint(64, (64,))) for _ in range(2)]
    plan = sdgp.advise(model, *pair, loss=loss, patterns=("1:4",))
    exact, noise = gradient(model, pair[0]), batch_noise(model, pair)
    rows = {(row.layer, row.gradient): row for row in plan.candidates}
    assert set(rows) == {("first", "weight")} | {
        (layer, gradient) for layer in ("circular", "shared", "head") for gradient in ("data", "weight")
    }
    for (layer, kind), found in rows.items():
        setting = ("1:4", "mvue") if kind == "data" else ("1:1", "mvue", "1:4")
        twin = sdgp.convert(copy.deepcopy(model), {layer: setting}, backend="dense")
        draws = [float((gradient(twin, pair[0]) - exact).square().sum()) for _ in range(8)]
        assert found.noise == pytest.approx(sum(draws) / 8 / noise, rel=0.5), (layer, kind)


def test_a_plan_with_convolutions_says_when_to_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdgp._plan.STEPS_PER_NOISE", 0.01)
    pair = [(torch.randn(64, 3, 20, 20), torch.randint(64, (64,))) for _ in range(2)]
    plan = sdgp.advise(Wrapped(), *pair, loss=loss)
    assert "shared" in plan
    assert "exact_first=0.25" in plan.notes[-1]
    assert not any("exact_first" in note for note in sdgp.advise(net(), *batches(), loss=loss).notes)


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


X = torch.ones(4, 32)


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
        setting = ("1:4", "mvue") if row.gradient == "data" else ("1:1", "mvue", "1:4")
        twin = sdgp.convert(copy.deepcopy(model), {row.layer: setting}, backend="dense")
        draws = [float((gradient(twin, pair[0]) - exact).square().sum()) for _ in range(4)]
        assert math.isnan(row.noise) or row.noise == pytest.approx(sum(draws) / 4 / noise, rel=0.5), row


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
        ((torch.compile(net()), torch.ones(4, 32)), {}, "the model itself", "a compiled one"),
        ((net(), torch.full((4, 32), math.nan)), {}, "finite loss", "nan"),
        ((net(), torch.ones(4, 32)), {"loss": lambda model, x: model(x)}, "scalar tensor", r"shape \(4, 64\)"),
        ((net(), torch.ones(4, 32)), {"loss": lambda model, x: 1.0}, "scalar tensor", "float"),
        ((net(), 1), {"optimizer": torch.optim.SGD(net().parameters())}, "optimizer of this model", "6 parameters"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(arguments: tuple[Any, ...], settings: dict[str, Any], requirement: str, got: str) -> None:
    with pytest.raises(ValueError, match=f"^advise: expected .*{requirement}.*, got {got}"):
        sdgp.advise(*arguments, **settings)

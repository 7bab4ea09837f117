# SPDX-License-Identifier: BSD-3-Clause
"""Tests layers with pruned weight gradients: transforms, compilers, settings, reports and schedules."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from compare import Timer, close, gradients
from samples import METHODS
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode
from weight_grads import FORCED, exact, forced, large, layers, make, prune_pixels, prune_rows

import sdgp
from sdgp._pattern import UNBIASED_METHODS, Pruning, WeightGrad

# What surrounds a layer.


@layers
@forced
def test_double_backward_is_refused(name: str, backend: str) -> None:
    _, layer, x = make(name, "1:1", backend=backend, weight_grad="4:16")
    output = layer(x)
    (gradient,) = torch.autograd.grad(output.square().sum(), layer.weight, create_graph=True)
    expected = rf"^{name}: expected one differentiation, got a second .*; the pruned weight gradient has no gradient"
    with pytest.raises(RuntimeError, match=expected):
        gradient.square().sum().backward()
    with sdgp.paused(layer):
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)
    gradient.square().sum().backward()


@layers
def test_auto_may_be_differentiated_twice(name: str) -> None:
    """A second differentiation must be exact, even if the sparse products win and the first one prunes."""
    layer, x, _ = large(name, "1:4", weight_grad="1:4")
    plain = sdgp.revert(copy.deepcopy(layer))

    def penalty(layer: Any) -> Tensor:
        (gradient,) = torch.autograd.grad(layer(x).square().mean(), layer.weight, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), layer.weight, create_graph=True)[0]

    with sdgp.Chooser(timer=Timer(1.0, 9.0)):
        layer(x).sum().backward()
        assert [row.product for row in sdgp.report(layer)] == ["sparse", "sparse"]
        found, expected = penalty(layer), penalty(plain)
        assert (found - expected).norm() < 1e-4 * expected.norm()
        assert sdgp.report(layer)[1].product == "exact"


@layers
@forced
def test_functional_gradients(name: str, backend: str) -> None:
    """Functional gradients must be those of eager mode, and vmap must give those of each sample."""
    _, layer, x = make(name, "2:4", "magnitude", backend=backend, weight_grad=("1:4", "magnitude"))

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum()

    def eager(x: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
        return dict(zip(dict(layer.named_parameters()), found, strict=True))

    parameters = {key: value.detach() for key, value in layer.named_parameters()}
    torch.testing.assert_close(grad(loss)(parameters, x.detach()), eager(x.detach()))
    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x.detach())
    for key in parameters:
        torch.testing.assert_close(each[key], torch.stack([eager(sample)[key] for sample in x.detach()]))


@layers
@forced
@pytest.mark.parametrize("weight_grad", [None, ("1:4", "magnitude")], ids=str)
def test_batched_gradients(name: str, backend: str, weight_grad: Any) -> None:
    _, layer, x = make(name, "2:4", "magnitude", backend=backend, weight_grad=weight_grad)
    output = layer(x)
    directions = torch.randn(3, *output.shape)
    (batched,) = torch.autograd.grad(output, layer.weight, directions, is_grads_batched=True, retain_graph=True)
    single = [gradients(layer(x), direction, layer.weight)[0] for direction in directions]
    torch.testing.assert_close(batched, torch.stack(single))


@layers
@forced
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_autocast(name: str, method: str, dtype: torch.dtype, backend: str) -> None:
    plain, layer, x = make(name, "4:4", backend=backend, weight_grad=("2:4", method))
    with torch.autocast("cpu", dtype):
        output = layer(x)
    grad_output = torch.randn_like(output)
    torch.manual_seed(1)
    found = gradients(output, grad_output, x, *layer.parameters())
    torch.manual_seed(1)
    pruned = (prune_rows if name == "linear" else prune_pixels)(grad_output, 2, 4, method)
    wanted = exact(copy.deepcopy(plain).to(dtype), x.to(dtype), grad_output)
    wanted["weight"] = exact(copy.deepcopy(plain).to(dtype), x.to(dtype), pruned)["weight"]
    for got, expected in zip(found, wanted.values(), strict=True):
        assert got.dtype == torch.float32
        close(got.to(dtype), expected)


@pytest.mark.parametrize("dynamic", [False, True])
@layers
@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_compiled(name: str, backend: str, dynamic: bool) -> None:
    """A compiled layer must match eager mode if its data gradient is exact or its input needs none."""
    torch._dynamo.reset()
    _, layer, x = make(name, "4:4", backend=backend, weight_grad=("2:4", "magnitude"))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for inputs in (x, x.detach(), torch.cat([x.detach(), x.detach()])):
        grad_output = torch.randn_like(layer(inputs))
        expected = gradients(layer(inputs), grad_output, *layer.parameters())
        for got, wanted in zip(gradients(compiled(inputs), grad_output, *layer.parameters()), expected, strict=True):
            close(got, wanted)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["auto", *FORCED])
def test_compiled_with_too_few_rows_or_frozen(backend: str) -> None:
    torch._dynamo.reset()
    plain, layer, _ = make("linear", "4:4", backend=backend, weight_grad="4:16")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, grad_output = torch.randn(8, 16), torch.randn(8, 12)
    close(gradients(compiled(x), grad_output, layer.weight)[0], exact(plain, x, grad_output)["weight"])
    layer.weight.requires_grad_(False)
    x, grad_output = torch.randn(32, 16, requires_grad=True), torch.randn(32, 12)
    close(gradients(compiled(x), grad_output, x)[0], exact(plain, x, grad_output)["input"])
    torch._dynamo.reset()


@layers
def test_deterministic_algorithms_measure_nothing(name: str) -> None:
    layer, x, grad_output = large(name, "2:4", "magnitude", weight_grad=("2:4", "magnitude"))
    torch.use_deterministic_algorithms(True)
    try:
        with sdgp.Chooser(timer=Timer(1.0, 9.0)) as chooser:
            gradients(layer(x), grad_output, x, layer.weight)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(chooser) == 0
    assert all("static rule" in row.why for row in sdgp.report(layer))


def test_flops_of_the_sparse_product() -> None:
    layer = sdgp.Linear(16, 64, pattern="1:1", backend="sparse", weight_grad=("2:4", "magnitude"))
    x = torch.randn(30, 16)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 2 * 30 * 16 * 64 + 2 * 16 * 16 * 64  # 16 of 30 rows stay
    conv = sdgp.Conv2d(8, 12, 3, groups=2, bias=False, backend="sparse", weight_grad=("2:4", "magnitude"))
    images = torch.randn(5, 8, 7, 5)
    with FlopCounterMode(display=False) as counter:
        conv(images).sum().backward()
    forward = 2 * 5 * 12 * 15 * 4 * 9
    assert counter.get_total_flops() == forward + forward * 8 // 15  # 8 of 15 pixels stay


# Settings.


@pytest.mark.parametrize(
    ("given", "pattern", "method"),
    [
        ("4:16", (4, 16), "mvue"),
        ((4, 16), (4, 16), "mvue"),
        (sdgp.Pattern(4, 16), (4, 16), "mvue"),
        (("4:16", "magnitude"), (4, 16), "magnitude"),
        (["4:16", "rescale"], (4, 16), "rescale"),
        (((4, 16), "random"), (4, 16), "random"),
        (WeightGrad(sdgp.Pattern(4, 16), "mvue"), (4, 16), "mvue"),
    ],
)
def test_what_it_may_be(given: Any, pattern: tuple[int, int], method: str) -> None:
    pruning = Pruning.parse("convert", "2:4", "random", "dense", given)
    assert pruning.weight_grad == (pattern, method)
    assert pruning.weight == Pruning(sdgp.Pattern(*pattern), method, "dense")
    assert pruning.data == Pruning(sdgp.Pattern(2, 4), "random", "dense")
    assert hash(pruning) != hash(pruning.data)
    assert str(pruning) == f"pattern=2:4, method=random, backend=dense, weight_grad=4:16 {method}"


def test_none_stays_none() -> None:
    pruning = Pruning.parse("convert", "2:4", "mvue", "auto")
    assert pruning.weight_grad is pruning.weight is None
    assert pruning.data is pruning


def test_layers_keep_it_through_copies_and_pickles(tmp_path: Any) -> None:
    for layer in (
        sdgp.Linear(8, 8, weight_grad="4:16"),
        sdgp.Conv2d(8, 8, 3, weight_grad=("4:16", "magnitude")),
        sdgp.Linear.from_plain(nn.Linear(8, 8), weight_grad=("4:16", "mvue")),
    ):
        torch.save(layer, tmp_path / "layer.pt")
        with torch.serialization.safe_globals([set]):
            loaded = torch.load(tmp_path / "layer.pt", weights_only=True)
        for twin in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin.pruning == layer.pruning
        assert layer.to_plain().state_dict().keys() == layer.state_dict().keys()
        assert "weight_grad=4:16 m" in repr(layer)


def test_plans() -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    plan = {"0": ("2:4", "mvue"), "1": ["2:4", "mvue", "4:16"], "2": ("2:4", "random", ("1:4", "magnitude"))}
    plan["3"] = ("2:4", "mvue", None)
    sdgp.convert(model, json.loads(json.dumps(plan)), backend="pruned", weight_grad="8:16")
    rows = {(row.layer, row.gradient): (row.pattern, row.method) for row in sdgp.report(model)}
    assert rows == {
        ("0", "data"): ("2:4", "mvue"),
        ("0", "weight"): ("8:16", "mvue"),
        ("1", "data"): ("2:4", "mvue"),
        ("1", "weight"): ("4:16", "mvue"),
        ("2", "data"): ("2:4", "random"),
        ("2", "weight"): ("1:4", "magnitude"),
        ("3", "data"): ("2:4", "mvue"),
    }


def test_converting_again_changes_it() -> None:
    _, layer, x = make("linear", "2:4", backend="dense", weight_grad="4:16")
    layer(x).sum().backward()
    assert layer.weight_decision is not None
    sdgp.convert(layer, "2:4", backend="dense", weight_grad="1:4")
    assert layer.weight_decision is None
    assert [row.pattern for row in sdgp.report(layer)] == ["2:4", "1:4"]
    sdgp.convert(layer, "2:4", backend="dense")
    assert [row.pattern for row in sdgp.report(layer)] == ["2:4"]
    assert not vars(sdgp.revert(layer)).keys() & {"pruning", "decision", "weight_decision"}


@pytest.mark.parametrize("method", METHODS)
def test_report_tells_of_bias(method: str) -> None:
    _, layer, x = make("linear", "2:4", "magnitude", backend="dense", weight_grad=("4:16", method))
    phrase = f"; biased: the error of {method} does not average out"
    for _ in range(2):  # before a backward and after it
        data, weight = sdgp.report(layer)
        assert "biased" not in data.why
        assert weight.why == 'backend="dense"' + ("" if method in UNBIASED_METHODS else phrase)
        layer(x).sum().backward()
    with sdgp.paused(layer):
        assert "biased" not in sdgp.report(layer)[1].why


def test_schedule() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 12))
    sdgp.convert(model, "2:4", backend="dense", weight_grad="4:16")
    schedule = sdgp.Schedule(model, total=4, exact_first=1, exact_last=1, patterns={2: "8:16"})

    def seen() -> list[tuple[str, str]]:
        return [(row.pattern, row.product) for row in sdgp.report(model)]

    assert {product for _, product in seen()} == {"exact"}
    schedule.step()
    assert seen() == [("2:4", "dense"), ("4:16", "dense")] * 2
    schedule.step()  # 12 output channels are too few for m = 16; the weight gradient groups rows
    assert seen() == [("8:16", "dense"), ("4:16", "dense"), ("1:1", "exact"), ("4:16", "dense")]
    schedule.step()
    assert {product for _, product in seen()} == {"exact"}
    schedule.seek(1)
    assert seen() == [("2:4", "dense"), ("4:16", "dense")] * 2


def test_watch_records_data_gradients() -> None:
    model = sdgp.convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), "2:4", backend="dense", weight_grad="2:4")
    model[1].use(Pruning.parse("convert", "1:1", "mvue", "dense", "2:4"))
    with sdgp.watch(model, every=1) as watch:
        model(torch.randn(8, 64, requires_grad=True)).sum().backward()
    assert list(watch) == ["0"]
    assert "exact" in str(watch).splitlines()[-1]


def test_profile_counts_each_call_once() -> None:
    model = sdgp.convert(nn.Sequential(nn.Linear(64, 64)), "2:4", backend="dense", weight_grad="1:1")
    (row,) = sdgp.profile(model, torch.randn(32, 64, requires_grad=True), rounds=1)
    assert (row.layer, row.pattern, row.product) == ("0", "2:4", "dense")
    assert model[0].weight_decision is None  # as before the profile


# The hint in the report.


@pytest.mark.parametrize(
    ("pattern", "wider"),
    [
        ("1:2", "8:16"),
        ("2:4", "8:16"),
        ("1:4", "4:16"),
        ("2:8", "4:16"),
        ("1:8", "4:32"),
        ("4:8", "8:16"),
        ("2:16", "4:32"),
        ("1:16", "4:64"),
        ("4:16", None),
        ("8:16", None),
        ("4:32", None),
        ("1:32", None),
        ("4:4", None),
        ("2:3", None),
    ],
)
def test_wider(pattern: str, wider: str | None) -> None:
    found = sdgp.Pattern.parse(pattern).wider
    assert (None if found is None else str(found)) == wider


def test_report_names_wider_groups_once() -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)), nn.Linear(32, 8))
    plan = {"0": ("2:4", "mvue"), "1": ("2:4", "mvue"), "2": ("1:4", "mvue"), "3": ("2:8", "mvue")}
    *_, last = str(sdgp.report(sdgp.convert(model, plan))).splitlines()
    assert last == (
        "on a CPU a wider group of the same density takes the same time and adds less noise: "
        "8:16 in place of 2:4, 4:16 in place of 1:4"  # 8 output channels are too few for m = 16
    )
    assert "on a CPU" not in str(sdgp.report(sdgp.convert(model, "8:16")))
    assert "on a CPU" not in str(sdgp.report(sdgp.convert(nn.Linear(32, 32, device="meta"), "2:4")))

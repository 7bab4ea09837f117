# SPDX-License-Identifier: BSD-3-Clause
"""Tests convert, revert, report and paused on small models. test_libraries.py tests models of libraries."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from compare import Timer
from torch import Tensor, nn

import sdgp


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))


def products(model: nn.Module) -> list[str]:
    return [row.product for row in sdgp.report(model)]


def notes(model: nn.Module) -> dict[str, str]:
    return {row.layer: row.note for row in sdgp.report(model)}


def test_in_place_and_shared() -> None:
    model = small().eval()
    parameters, keys = list(model.parameters()), list(model.state_dict())
    layers = list(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert sdgp.convert(model, "1:4", "rescale", backend="pruned") is model
    assert list(model) == layers
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert isinstance(model[0], sdgp.Conv2d)
    assert isinstance(model[3], sdgp.Linear)
    assert not model[0].training
    before = model[3].weight.detach().clone()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[3].weight, before)


def test_state_dict_moves_between_dense_and_converted() -> None:
    dense, converted = small(), sdgp.convert(small(), backend="pruned")
    converted.load_state_dict(dense.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(converted(x), dense(x))
    dense.load_state_dict(sdgp.convert(small()).state_dict())


def test_hooks_stay() -> None:
    model = small()
    seen: list[str] = []
    model[3].register_forward_hook(lambda *_: seen.append("forward"))
    model[3].register_full_backward_hook(lambda *_: seen.append("backward"))
    model[3].weight.register_hook(lambda grad: seen.append("weight"))
    sdgp.convert(model, backend="pruned")
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert sorted(seen) == ["backward", "forward", "weight"]


def test_revert() -> None:
    model = small()
    attributes = [set(vars(layer)) for layer in model]
    weights = list(model.parameters())
    sdgp.convert(model, "2:4", filter=lambda module, name: name == "0")
    assert sdgp.revert(model) is model
    assert type(model[0]) is nn.Conv2d
    assert type(model[3]) is nn.Linear
    assert [set(vars(layer)) for layer in model] == attributes
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))


def test_converting_again_replaces_the_settings() -> None:
    model = sdgp.convert(small(), "2:4", "magnitude", backend="pruned")
    sdgp.convert(model, "4:16", "mvue", backend="dense")
    first = sdgp.report(model)[0]
    assert (first.pattern, first.method, first.backend) == ("4:16", "mvue", "dense")
    assert sdgp.report(model)[1].product == "plain"
    assert "10 output channels" in sdgp.report(model)[1].why
    sdgp.convert(model, filter=lambda module, name: name == "3")
    assert type(model[0]) is nn.Conv2d
    assert isinstance(model[3], sdgp.Linear)
    assert set(vars(model[3])) == set(vars(sdgp.convert(nn.Linear(8, 8))))  # the reason why it was plain is gone


def test_a_model_that_is_the_layer_itself() -> None:
    layer = nn.Linear(8, 8)
    assert sdgp.convert(layer, backend="pruned") is layer
    assert isinstance(layer, sdgp.Linear)
    assert [row.layer for row in sdgp.report(layer)] == ["(model)"]


def test_meta_device_and_dtype_and_frozen_weights() -> None:
    layer = nn.Linear(8, 8, device="meta", dtype=torch.bfloat16).requires_grad_(False)
    sdgp.convert(layer, backend="pruned")
    assert layer.weight.is_meta
    assert layer.weight.dtype == torch.bfloat16
    assert not layer.weight.requires_grad
    x = torch.randn(2, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.is_meta


def test_shared_modules_and_tied_weights() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 8))
    model[3].weight = shared.weight
    calls: list[str] = []
    sdgp.convert(model, backend="pruned", filter=lambda module, name: bool(calls.append(name)) or True)
    assert calls == ["0", "3"]
    assert model[0] is model[2]
    assert model[3].weight is model[0].weight
    assert len(sdgp.report(model)) == 2


class Special(nn.Linear):
    pass


class FSDPSpecial(nn.Linear):  # fully_shard names its classes like this
    pass


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), ["depthwise"]),
        (nn.Conv2d(8, 16, 3, groups=8), ["depthwise"]),
        (nn.Conv2d(2, 8, 3, groups=2), ["depthwise"]),
        (nn.Conv2d(8, 8, 3, groups=4), ["2 output channels per group", "m = 4"]),
        (nn.Linear(8, 3), ["3 output channels", "m = 4"]),
        (Special(8, 8), ["Special", "subclass"]),
        (FSDPSpecial(8, 8), ["FSDPSpecial", "subclass", "before fully_shard"]),
        (nn.Conv1d(8, 8, 3), ["not Conv1d"]),
        (nn.ConvTranspose2d(8, 8, 3), ["not ConvTranspose2d"]),
        (nn.LSTM(8, 8), ["not LSTM"]),
        (nn.LazyLinear(8), ["LazyLinear", "after"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_reasons(layer: nn.Module, words: list[str]) -> None:
    before = type(layer)
    (row,) = sdgp.report(sdgp.convert(layer))
    assert row.product == "plain"
    assert all(word in row.why for word in words), row.why
    assert row.note == f"plain: {row.why}"
    assert type(layer) is before


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv2d(1, 8, 3)])
def test_no_reason(layer: nn.Module) -> None:
    (row,) = sdgp.report(sdgp.convert(layer))
    assert (row.product, row.ms) == ("", None)  # unknown before a backward
    assert row.note.startswith("not decided: ")
    assert type(layer) in (sdgp.Linear, sdgp.Conv2d)


def test_reasons_of_attention() -> None:
    attention = sdgp.report(sdgp.convert(nn.MultiheadAttention(8, 2)))
    assert [(row.layer, row.product) for row in attention] == [("(model)", "plain"), ("out_proj", "plain")]
    assert all("fused function" in row.why for row in attention)


def test_report() -> None:
    model = small()
    assert products(model) == ["plain", "plain"]
    assert all("not converted" in row.why for row in sdgp.report(model))
    sdgp.convert(model, "2:4", filter=lambda module, name: isinstance(module, nn.Linear), backend="pruned")
    head, line, *rows = str(sdgp.report(model)).splitlines()
    assert [cell.strip() for cell in head.split("|")] == list(sdgp.report(model)[0]._fields)
    assert set(line) == {"-", "|"}
    assert [[cell.strip() for cell in row.split("|")][:8] for row in rows] == [
        ["0", "Conv2d", "data", "", "", "", "plain", ""],
        ["3", "Linear", "data", "2:4", "mvue", "pruned", "", ""],
    ]
    assert repr(sdgp.report(model)) == str(sdgp.report(model))
    assert "filter" in sdgp.report(model)[0].why
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert products(model) == ["plain", "dense"]  # too small to be measured
    identity = sdgp.report(sdgp.convert(small(), "4:4", backend="pruned"))[1]
    assert identity.product == "exact"
    assert "n == m" in identity.why
    sdgp.convert(model)
    model(torch.randn(2, 3, 8, 8, requires_grad=True)).sum().backward()
    assert products(model) == ["plain", "plain"]  # auto leaves both plain


@pytest.mark.parametrize("weight_grad", [None, "2:4"])
@pytest.mark.parametrize("backend", ["auto", "pruned", "dense"])
def test_report_of_a_first_layer(backend: str, weight_grad: str | None) -> None:
    model = sdgp.convert(small(), backend=backend, weight_grad=weight_grad)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model(x)
    before = sdgp.report(model)[0]
    model(x).sum().backward()
    after = sdgp.report(model)[0]
    assert "the input needs no gradient" not in before.note
    assert after.note == "exact: the input needs no gradient"
    if backend != "auto":
        model(x.requires_grad_()).sum().backward()
        model(x.detach())  # as in an evaluation without no_grad
        assert sdgp.report(model)[0].product == "dense"


def test_report_of_what_was_measured() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    sdgp.convert(model, backend="pruned", filter=lambda module, name: name == "1")
    with sdgp.Chooser(timer=Timer(1.25, 2.0)):
        model(torch.randn(256, 256)).sum().backward()
    row = sdgp.report(model)[1]
    assert (row.product, row.ms) == ("sparse", 1.25)
    assert " | sparse  | 1.25 | " in str(sdgp.report(model))


@pytest.mark.parametrize("product", ["dense", "sparse"])
def test_report_of_a_forced_product(product: str) -> None:
    assert products(sdgp.convert(small(), backend=product)) == [product, product]


def test_paused_is_exact_and_ends() -> None:
    model = sdgp.convert(small(), "1:4", "magnitude", backend="pruned")
    dense = sdgp.revert(copy.deepcopy(model))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)

    def gradient(model: nn.Module) -> Tensor:
        return torch.autograd.grad(model(x).square().sum(), x)[0]

    exact = gradient(dense)
    with sdgp.paused(model):
        assert torch.equal(gradient(model), exact)
        assert set(notes(model).values()) == {"exact: paused"}
        with sdgp.paused(model[3]):
            pass
        assert torch.equal(gradient(model), exact)
    assert not torch.allclose(gradient(model), exact)
    with pytest.raises(KeyError), sdgp.paused(model):
        raise KeyError
    assert not torch.allclose(gradient(model), exact)


def test_paused_outlives_convert_and_revert() -> None:
    model = sdgp.convert(small(), backend="pruned")
    with sdgp.paused(model):
        sdgp.convert(model, "1:4", backend="pruned")
        assert set(notes(model).values()) == {"exact: paused"}
        sdgp.revert(model)
        assert products(model) == ["plain", "plain"]
        sdgp.convert(model, "1:4", backend="pruned")
        assert set(notes(model).values()) == {"exact: paused"}
    assert "exact" not in products(model)
    assert not {"pruning", "holds", "decision"} & set(vars(sdgp.revert(model)[3]))


def test_pauses_may_overlap() -> None:
    model = sdgp.convert(small(), backend="dense")
    first, second = (contextlib.ExitStack() for _ in range(2))
    first.enter_context(sdgp.paused(model))
    second.enter_context(sdgp.paused(model))
    first.close()
    assert products(model) == ["exact", "exact"]
    second.close()
    assert products(model) == ["dense", "dense"]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_from_inside_a_pause_is_not_paused(copied: Callable[[nn.Module], nn.Module]) -> None:
    layer = sdgp.convert(nn.Linear(8, 8), backend="dense")
    sdgp.Schedule(layer, exact_first=1)
    with sdgp.paused(layer):
        twin = copied(layer)
        assert products(layer) == ["exact"]
    assert twin.holds == layer.holds == {"schedule": "scheduled, exact_first=1"}


def test_a_replaced_class_is_refused() -> None:
    layer = sdgp.convert(nn.Linear(8, 8), backend="pruned")
    torch.nn.utils.parametrizations.weight_norm(layer)
    for call in (sdgp.revert, sdgp.convert):
        message = rf"^{call.__name__}: expected .*, got .*ParametrizedLinear for \(model\)"
        with pytest.raises(ValueError, match=message):
            call(layer)


def test_transformer_encoder() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = sdgp.convert(nn.TransformerEncoder(layer, 2), "2:4", backend="pruned")
    assert [row.layer for row in sdgp.report(model) if row.product != "plain"] == [
        f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)
    ]
    x = torch.randn(2, 7, 32)
    dense = sdgp.revert(copy.deepcopy(model))
    torch.manual_seed(1)  # seeds dropout
    expected = dense(x)
    torch.manual_seed(1)
    output = model(x)
    assert torch.equal(output, expected)
    output.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), dense.eval()(x))

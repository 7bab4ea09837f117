# SPDX-License-Identifier: BSD-3-Clause
"""What sdgp.Linear and sdgp.Conv2d decide before any product: their defaults, how large a call is, which choice they
note, and what they hand to sdgp.profile. test_layers.py has their gradients."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdgp
from sdgp import modules

TWINS: list[tuple[Any, Any]] = [(sdgp.Linear, nn.Linear), (sdgp.Conv2d, nn.Conv2d)]


@pytest.mark.parametrize(("twin", "dense"), TWINS)
def test_defaults(twin: Any, dense: Any) -> None:
    own = {"pattern": "2:4", "method": "mvue", "backend": "auto"}
    defaults = {name: parameter.default for name, parameter in inspect.signature(twin).parameters.items()}
    expected = {name: parameter.default for name, parameter in inspect.signature(dense).parameters.items()}
    assert defaults == expected | own
    made = {name: parameter.default for name, parameter in inspect.signature(twin.from_dense).parameters.items()}
    assert made == {"dense": inspect.Parameter.empty} | own


@pytest.mark.parametrize("layer", [sdgp.Linear(4, 8), sdgp.Conv2d(4, 8, 3), sdgp.Linear.from_dense(nn.Linear(4, 8))])
def test_a_new_layer(layer: modules.PruningLayer) -> None:
    assert layer.pruning == ((2, 4), "mvue", "auto")
    assert (layer.paused, layer.exact, layer.last_key) == (False, "", None)
    assert repr(layer).endswith(", bias=True, pattern=2:4, method=mvue, backend=auto)") or isinstance(layer, nn.Conv2d)


@pytest.mark.parametrize(
    ("layer", "shape", "work"),
    [
        (sdgp.Linear(6, 8), (2, 5, 6), 2 * 5 * 6 * 8),
        (sdgp.Conv2d(4, 16, (3, 5)), (2, 4, 7, 6), 2 * 4 * 7 * 6 * 16 * 3 * 5),
        (sdgp.Conv2d(4, 16, (3, 5), groups=2), (2, 4, 7, 6), 2 * 4 * 7 * 6 * 8 * 3 * 5),
    ],
)
def test_work(layer: nn.Module, shape: tuple[int, ...], work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(modules, "stays_exact", lambda pruning, work: bool(seen.append(work)) or True)
    layer(torch.randn(shape))
    assert seen == [work]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(sdgp.Linear(8, 8, backend="pruned"), (4, 8)), (sdgp.Conv2d(4, 8, 3, backend="pruned"), (2, 4, 5, 5))],
)
def test_which_choice_is_noted(layer: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    layer(x.detach())
    assert layer.last_key is None  # no data gradient
    layer(x)
    first = layer.last_key
    assert first is not None
    with torch.no_grad():
        layer(x)
    layer(x)
    assert layer.last_key is first
    layer.last_key = ("static", True)
    layer(x)
    assert layer.last_key == first
    assert sdgp.convert(layer, backend="pruned").last_key is None


def test_compiled_code_notes_nothing() -> None:
    layer = sdgp.Linear(8, 8, backend="pruned")
    torch.compile(layer, backend="eager")(torch.randn(4, 8, requires_grad=True))
    assert layer.last_key is None


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (sdgp.Linear(6, 8), (5, 6)),
        (sdgp.Conv2d(4, 8, 3, padding=1), (2, 4, 7, 6)),
        (sdgp.Conv2d(4, 8, 3, padding=1), (4, 7, 6)),
        (sdgp.Conv2d(4, 8, 3, padding="same"), (4, 7, 6)),
        (sdgp.Conv2d(4, 8, (3, 2), padding=(1, 0), stride=(2, 1), groups=2), (2, 4, 7, 6)),
        (sdgp.Conv2d(4, 8, 3, padding=1, dilation=2), (2, 4, 7, 6)),
    ],
)
def test_the_dense_product_is_the_gradient(layer: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    output = sdgp.revert(layer)(x)
    grad_output = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, x, grad_output)
    sdgp.convert(layer)
    products = layer.products(grad_output, x.detach())
    torch.testing.assert_close(products.dense().reshape(shape), expected)
    assert products.pruned(None).shape == products.sparse(None).shape == products.dense().shape


def test_the_product_of_a_padded_input() -> None:
    layer = sdgp.Conv2d(4, 8, 3, padding=(1, 2), padding_mode="reflect")
    x = torch.randn(2, 4, 7, 6)
    padded = nn.functional.pad(x, (2, 2, 1, 1), mode="reflect").requires_grad_()
    output = nn.functional.conv2d(padded, layer.weight)
    grad_output = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, padded, grad_output)
    torch.testing.assert_close(layer.products(grad_output, x).dense(), expected)


def test_transformers_conv1d_is_imported_for_its_own_layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sdgp.conv1d", raising=False)
    assert modules.twin_of(nn.Linear(4, 8)) is sdgp.Linear
    assert modules.twin_of(nn.Conv1d(4, 8, 3)) is None
    assert "sdgp.conv1d" not in sys.modules


@pytest.mark.parametrize("channels", [3, 4, 5])
def test_too_narrow(channels: int) -> None:
    for layer in (nn.Linear(4, channels), nn.Conv2d(4, 2 * channels, 3, groups=2)):
        reason = f"{channels} output channels per group, fewer than m = 4" if channels < 4 else None
        assert modules.twin_of(layer).too_narrow(layer, sdgp.Pattern(2, 4)) == reason  # type: ignore[union-attr]


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^from_dense: expected an nn.Linear, got Conv2d$"):
        sdgp.Linear.from_dense(nn.Conv2d(4, 8, 3))
    for make in (lambda: sdgp.Linear(4, 8, method="topk"), lambda: sdgp.Conv2d(4, 8, 3, method="topk")):
        with pytest.raises(ValueError, match=r"^(Linear|Conv2d): expected method to be one of .*, got 'topk'$"):
            make()
    with pytest.raises(RuntimeError, match=r"^torch\.jit\.script: expected a dense model, got a Linear of sdgp"):
        torch.jit.script(sdgp.Linear(4, 8))


def test_to_dense_leaves_the_layer_as_it_was() -> None:
    layer = sdgp.Linear(8, 8, pattern="1:4")
    seen: list[Tensor] = []
    dense = layer.to_dense()
    dense.register_forward_hook(lambda module, args, output: seen.append(output))
    assert type(dense) is nn.Linear
    assert not {"pruning", "paused", "exact", "last_key"} & set(vars(dense))
    assert layer.pruning.pattern == (1, 4)
    layer(torch.randn(2, 8))
    assert not seen
    assert dense.weight is layer.weight

# SPDX-License-Identifier: BSD-3-Clause
"""Tests a layer's state: settings, who holds it exact, and the last decision. test_layers.py tests the gradients.

Also tests the size of a call and what a layer passes to sdgp.profile.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdgp
from sdgp._layers import PruningLayer
from sdgp._pattern import Pruning
from sdgp._twins import twin_of

TWINS: list[tuple[Any, Any]] = [(sdgp.Linear, nn.Linear), (sdgp.Conv2d, nn.Conv2d)]


@pytest.mark.parametrize(("twin", "plain"), TWINS)
def test_defaults(twin: Any, plain: Any) -> None:
    own = {"pattern": "2:4", "method": "mvue", "backend": "auto", "weight_grad": None}
    defaults = {name: parameter.default for name, parameter in inspect.signature(twin).parameters.items()}
    expected = {name: parameter.default for name, parameter in inspect.signature(plain).parameters.items()}
    assert defaults == expected | own
    made = {name: parameter.default for name, parameter in inspect.signature(twin.from_plain).parameters.items()}
    assert made == {"plain": inspect.Parameter.empty} | own


@pytest.mark.parametrize("layer", [sdgp.Linear(4, 8), sdgp.Conv2d(4, 8, 3), sdgp.Linear.from_plain(nn.Linear(4, 8))])
def test_a_new_layer(layer: PruningLayer) -> None:
    assert layer.pruning == Pruning(sdgp.Pattern(2, 4), "mvue", "auto")
    assert (layer.holds, layer.held, layer.decision, layer.is_pruning) == ({}, "", None, False)
    assert layer.weight_decision is None
    assert repr(layer).endswith(", pattern=2:4, method=mvue, backend=auto)")
    plain = set(vars(nn.Linear(4, 8) if isinstance(layer, nn.Linear) else nn.Conv2d(4, 8, 3)))
    assert set(vars(layer)) == plain | {"pruning", "holds", "decision", "weight_decision", "plain_for"}


@pytest.mark.parametrize(
    ("layer", "shape", "work"),
    [
        (sdgp.Linear(6, 8), (2, 5, 6), 2 * 5 * 6 * 8),
        (sdgp.Conv2d(4, 16, (3, 5)), (2, 4, 7, 6), 2 * 4 * 7 * 6 * 16 * 3 * 5),
        (sdgp.Conv2d(4, 16, (3, 5), groups=2), (2, 4, 7, 6), 2 * 4 * 7 * 6 * 8 * 3 * 5),
        (sdgp.Conv2d(4, 16, (3, 5), stride=2), (2, 4, 7, 6), 2 * 4 * 7 * 6 * 16 * 3 * 5),  # as for stride 1
    ],
)
def test_work(layer: Any, shape: tuple[int, ...], work: int) -> None:
    x = torch.randn(shape)
    assert layer.products(layer(x).detach(), x).work == work
    sdgp.convert(layer, backend="pruned")
    for least, measured in ((work, 1), (work + 1, 0)):
        with sdgp.Chooser(least_work=least, rounds=1) as chooser:
            layer(x.clone().requires_grad_()).sum().backward()
        assert len(chooser) == measured


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(sdgp.Linear(8, 8, backend="pruned"), (4, 8)), (sdgp.Conv2d(4, 8, 3, backend="pruned"), (2, 4, 5, 5))],
)
def test_which_decision_is_noted(layer: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    layer(x.detach()).sum().backward()
    assert layer.decision == sdgp.Decision("exact", "the input needs no gradient")
    sdgp.convert(layer, backend="pruned")
    output = layer(x)
    assert layer.decision is None  # the backward decides
    output.sum().backward()
    first = layer.decision
    assert (first.product, first.prunes) == ("dense", True)
    with torch.no_grad():
        layer(x)
    layer(x)
    assert layer.decision is first
    with sdgp.paused(layer):
        output = layer(x)
    output.sum().backward()
    assert layer.decision is first  # a pause says nothing about other forwards
    assert sdgp.convert(layer, backend="pruned").decision is None


def test_compiled_code_notes_nothing() -> None:
    layer = sdgp.Linear(8, 8, backend="pruned")
    torch.compile(layer, backend="eager")(torch.randn(4, 8, requires_grad=True)).sum().backward()
    assert layer.decision is None


def test_who_holds_a_layer() -> None:
    layer = sdgp.Linear(8, 8, backend="pruned")
    assert layer.is_pruning  # as far as the layer knows
    layer.hold("schedule", "scheduled")
    layer.hold("paused", "paused")
    assert layer.holds == {"schedule": "scheduled", "paused": "paused"}
    assert (layer.held, layer.is_pruning) == ("paused", False)  # "paused" is reported first
    layer.hold("schedule", "")
    assert (layer.holds, layer.held) == ({"paused": "paused"}, "paused")
    layer.hold("paused", "")
    layer.hold("nobody", "")
    assert (layer.holds, layer.held, layer.is_pruning) == ({}, "", True)


@pytest.mark.parametrize(
    ("pattern", "backend", "decision", "prunes"),
    [
        ("2:4", "auto", None, False),
        ("2:4", "pruned", None, True),
        ("4:4", "pruned", None, False),
        ("2:4", "auto", sdgp.Decision("sparse", ""), True),
        ("2:4", "auto", sdgp.Decision("exact", ""), False),
        ("2:4", "auto", sdgp.Decision("plain", ""), False),
        ("2:4", "pruned", sdgp.Decision("dense", ""), True),
        ("2:4", "pruned", sdgp.Decision("exact", ""), False),
    ],
)
def test_is_pruning(pattern: str, backend: str, decision: sdgp.Decision | None, prunes: bool) -> None:
    layer = sdgp.Linear(8, 8, pattern=pattern, backend=backend)
    layer.decision = decision
    assert layer.is_pruning == prunes


def test_decisions() -> None:
    measured = sdgp.Decision("sparse", "faster", exact_ms=2.0, sparse_ms=1.0)
    assert (measured.ms, measured.prunes) == (1.0, True)
    assert (sdgp.Decision("exact", "", dense_ms=1.0).ms, sdgp.Decision("plain", "").ms) == (None, None)
    assert not sdgp.Decision("plain", "").prunes


def test_a_copy_has_holds_of_its_own() -> None:
    layer = sdgp.Linear(8, 8, backend="pruned")
    layer.hold("schedule", "scheduled")
    layer(torch.randn(2, 8, requires_grad=True)).sum().backward()
    for twin in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert (twin.pruning, twin.holds, twin.decision) == (layer.pruning, layer.holds, layer.decision)
        twin.hold("schedule", "")
        assert layer.held == "scheduled"


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
def test_the_exact_product_is_the_gradient(layer: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    output = sdgp.revert(layer)(x)
    grad_output = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, x, grad_output)
    sdgp.convert(layer)
    products = layer.products(grad_output, x.detach())
    torch.testing.assert_close(products.exact().reshape(shape), expected)
    assert products.dense().shape == products.sparse().shape == products.exact().shape
    assert products.obstacle() is None


def test_the_product_of_a_padded_input() -> None:
    layer = sdgp.Conv2d(4, 8, 3, padding=(1, 2), padding_mode="reflect")
    x = torch.randn(2, 4, 7, 6)
    padded = nn.functional.pad(x, (2, 2, 1, 1), mode="reflect").requires_grad_()
    output = nn.functional.conv2d(padded, layer.weight)
    grad_output = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, padded, grad_output)
    torch.testing.assert_close(layer.products(grad_output, x).exact(), expected)


def test_transformers_conv1d_is_imported_for_its_own_layers_alone() -> None:
    assert twin_of(nn.Linear(4, 8)) is sdgp.Linear
    assert twin_of(nn.Conv1d(4, 8, 3)) is None
    assert twin_of(sdgp.Conv2d(4, 8, 3)) is sdgp.Conv2d
    program = "import sys, torch, sdgp; sdgp.convert(torch.nn.Linear(8, 8)); print('sdgp._conv1d' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("channels", [3, 4, 5])
def test_too_narrow(channels: int) -> None:
    for layer in (nn.Linear(4, channels), nn.Conv2d(4, 2 * channels, 3, groups=2)):
        reason = twin_of(layer).too_narrow(layer, sdgp.Pattern(2, 4))  # type: ignore[union-attr]
        assert (reason is None) == (channels >= 4)
        assert reason is None or "3 output channels" in reason


def test_errors() -> None:
    with pytest.raises(
        ValueError, match=r"^from_plain: expected a torch.nn.modules.linear.Linear, got a torch.nn.modules.conv.Conv2d$"
    ):
        sdgp.Linear.from_plain(nn.Conv2d(4, 8, 3))
    for make in (lambda: sdgp.Linear(4, 8, method="topk"), lambda: sdgp.Conv2d(4, 8, 3, method="topk")):
        with pytest.raises(ValueError, match=r"^(Linear|Conv2d): expected method .*, got 'topk'$"):
            make()
    with pytest.raises(RuntimeError, match=r"^torch\.jit\.script: expected a plain model, got a Linear of sdgp"):
        torch.jit.script(sdgp.Linear(4, 8))


def test_the_old_names_warn_and_work() -> None:
    with pytest.warns(FutureWarning, match="Linear: from_dense is now called from_plain") as warned:
        layer = sdgp.Linear.from_dense(nn.Linear(4, 8), "1:4", weight_grad="2:4")
    assert warned[0].filename == __file__
    assert str(layer.pruning.pattern) == "1:4"
    with pytest.warns(FutureWarning, match="Linear: to_dense is now called to_plain"):
        assert type(layer.to_dense()) is nn.Linear


def test_to_plain_leaves_the_layer_as_it_was() -> None:
    layer = sdgp.Linear(8, 8, pattern="1:4")
    seen: list[Tensor] = []
    plain = layer.to_plain()
    plain.register_forward_hook(lambda module, args, output: seen.append(output))
    assert type(plain) is nn.Linear
    assert vars(plain).keys() == vars(nn.Linear(8, 8)).keys()
    assert layer.pruning.pattern == (1, 4)
    layer(torch.randn(2, 8))
    assert not seen
    assert plain.weight is layer.weight


@pytest.mark.parametrize("parametrized", [False, True])
def test_a_copy_from_inside_a_pause_prunes(parametrized: bool) -> None:
    layer = sdgp.Linear(8, 8, pattern="1:4", method="magnitude", backend="pruned")
    if parametrized:
        nn.utils.parametrizations.weight_norm(layer)
    x = torch.randn(2, 8, requires_grad=True)
    with sdgp.paused(layer):
        layer(x)  # after this forward the layer knows that the plain operator computes similar ones
        twins = [copy.deepcopy(layer)]
        if not parametrized:  # PyTorch refuses to pickle a parametrized layer
            twins += [copy.copy(layer), pickle.loads(pickle.dumps(layer))]
    (pruned,) = torch.autograd.grad(layer(x).square().sum(), x)
    for twin in twins:
        assert not twin.held
        assert torch.equal(torch.autograd.grad(twin(x).square().sum(), x)[0], pruned)


def test_a_layer_that_is_reverted_before_the_backward_stays_plain() -> None:
    layer = sdgp.convert(nn.Linear(8, 8), backend="pruned")
    output = layer(torch.randn(2, 8, requires_grad=True))
    plain = set(vars(sdgp.revert(layer)))
    output.sum().backward()
    assert set(vars(layer)) == plain


def test_a_copy_of_a_compiled_layer_runs_itself() -> None:
    layer = sdgp.Linear(8, 8, backend="pruned")
    layer.compile(backend="eager")
    x = torch.randn(2, 8)
    for twin in (copy.deepcopy(layer), sdgp.Linear.from_plain(layer.to_plain())):
        before = twin(x)
        twin.weight = nn.Parameter(torch.zeros(8, 8))
        assert torch.equal(twin(x), twin.bias.expand(2, 8))
        assert not torch.equal(before, twin(x))

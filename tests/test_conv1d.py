# SPDX-License-Identifier: BSD-3-Clause
"""Tests transformers' Conv1D with a pruned data gradient: y = x W + b, dx = prune_nm(dy) Wᵀ, the weight (in, out)."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import Timer, close, gradients
from samples import METHODS
from torch import nn

import sdgp

pytest.importorskip("transformers")
Conv1D: Any = pytest.importorskip("transformers.pytorch_utils").Conv1D

BACKENDS = ("pruned", "dense", "sparse")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16), (2, 1, 3, 16), (0, 16)])
def test_conv1d(shape: tuple[int, ...], method: str, backend: str) -> None:
    dense = Conv1D(20, 16)
    nn.init.normal_(dense.bias)
    layer = sdgp.convert(copy.deepcopy(dense), "2:8", method, backend=backend)
    x = torch.randn(shape, requires_grad=True)
    output, exact = layer(x), dense(x)
    assert torch.equal(output, exact)
    grad_output = torch.randn_like(output)
    torch.manual_seed(1)
    actual = gradients(output, grad_output, x, layer.weight, layer.bias)
    expected = gradients(exact, grad_output, x, dense.weight, dense.bias)
    torch.manual_seed(1)
    as_rows = grad_output.flatten(1, -2) if len(shape) > 3 else grad_output  # rescale sums over a whole sample
    expected[0] = sdgp.prune_nm(as_rows, 2, 8, -1, method).view_as(grad_output) @ dense.weight.t()
    for got, wanted in zip(actual, expected, strict=True):
        close(got, wanted)
        assert got.stride() == wanted.stride()


@pytest.mark.parametrize("layout", [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x.expand(4, 6, 16)])
def test_strided_input(layout: Any) -> None:
    layer = sdgp.convert(Conv1D(20, 16), "2:4", "magnitude", backend="pruned")
    base = torch.randn(1, 6, 16)
    x = layout(base if layout(base).shape[0] == 4 else torch.randn(4, 6, 16)).requires_grad_()
    close(layer(x), x @ layer.weight + layer.bias)
    grad_output = torch.randn(*x.shape[:-1], 20)
    close(gradients(layer(x), grad_output, x)[0], sdgp.prune_nm(grad_output, 2, 4) @ layer.weight.t())


def test_the_feature_dimension_is_checked() -> None:
    layer = sdgp.convert(Conv1D(20, 16), backend="pruned")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(4, 32, requires_grad=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    dense = Conv1D(32, 16)
    layer = sdgp.convert(copy.deepcopy(dense), "2:4", "magnitude", backend=backend)
    x = torch.randn(3, 5, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, exact = layer(x), dense(x)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, exact)
    grad_output = torch.randn_like(output)
    actual = gradients(output, grad_output, x, layer.weight, layer.bias)
    expected = gradients(exact, sdgp.prune_nm(grad_output, 2, 4), x)
    expected += gradients(dense(x).bfloat16(), grad_output, dense.weight, dense.bias)
    for got, wanted in zip(actual, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("linear", [nn.Linear(16, 32), nn.Linear(32, 16)], ids=["same sizes", "same weight shape"])
def test_a_linear_layer_of_the_same_shape_has_a_decision_of_its_own(linear: nn.Linear) -> None:
    with sdgp.Chooser(timer=Timer(1.0, 2.0), least_work=0) as chooser:
        for count, (layer, features) in enumerate(((Conv1D(32, 16), 16), (linear, linear.in_features)), 1):
            sdgp.convert(layer, backend="pruned")
            layer(torch.randn(128 // features, features, requires_grad=True)).sum().backward()
            assert layer.decision.product == "sparse"
            assert len(chooser) == count


@pytest.mark.parametrize("sparse_wins", [True, False])
def test_auto(sparse_wins: bool) -> None:
    layer = sdgp.convert(Conv1D(256, 256), "1:4", "magnitude")
    x, grad_output = torch.randn(4, 64, 256, requires_grad=True), torch.randn(4, 64, 256)
    with sdgp.Chooser(timer=Timer(1.0, 2.0) if sparse_wins else Timer(2.0, 1.0)) as chooser:
        (actual,) = gradients(layer(x), grad_output, x)
    assert len(chooser) == 1
    assert sdgp.report(layer)[0].product == ("sparse" if sparse_wins else "exact")
    close(actual, (sdgp.prune_nm(grad_output, 1, 4) if sparse_wins else grad_output) @ layer.weight.t())


def test_convert_report_pause_profile_revert(capsys: pytest.CaptureFixture[str]) -> None:
    class Special(Conv1D):  # type: ignore[misc]
        pass

    model = nn.ModuleList([Conv1D(8, 16), Conv1D(3, 8), Special(8, 8)])
    attributes, weight = set(vars(model[0])), model[0].weight
    sdgp.convert(model, "2:4", "magnitude", backend="dense")
    assert model[0].weight is weight
    assert isinstance(model[0], Conv1D)  # peft makes this check
    assert repr(model[0]) == "Conv1D(nf=8, nx=16, pattern=2:4, method=magnitude, backend=dense)"
    rows = sdgp.report(model)
    assert [(row.type, row.product) for row in rows] == [("Conv1D", "dense"), ("Conv1D", "plain"), ("Special", "plain")]
    assert "3 output channels" in rows[1].why
    assert "Special" in rows[2].why
    (row,) = sdgp.profile(model[0], {"x": torch.randn(4, 16, requires_grad=True)}, rounds=1)
    assert (row.shape, row.product) == ("(4, 8)", "dense")
    x = torch.randn(4, 16, requires_grad=True)
    with sdgp.paused(model):
        (exact,) = gradients(model[0](x), torch.ones(4, 8).cumsum(1), x)
    assert not torch.allclose(gradients(model[0](x), torch.ones(4, 8).cumsum(1), x)[0], exact)
    sdgp.revert(model)
    assert [type(layer) for layer in model] == [Conv1D, Conv1D, Special]
    assert set(vars(model[0])) == attributes


def test_made_by_hand() -> None:
    from sdgp._conv1d import Conv1D as Twin

    layer = Twin(8, 16, pattern="1:4", backend="sparse")
    assert sdgp.report(layer)[0].pattern == "1:4"
    assert type(layer.to_plain()) is Conv1D
    assert type(Twin.from_plain(Conv1D(8, 16))) is Twin


def test_compiled() -> None:
    layer = sdgp.convert(Conv1D(16, 8), "2:4", "magnitude", backend="pruned")
    x = torch.randn(2, 3, 8, requires_grad=True)
    grad_output = torch.randn(2, 3, 16)
    expected = gradients(layer(x), grad_output, x, layer.weight)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(gradients(compiled(x), grad_output, x, layer.weight), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_copies_and_pickles(tmp_path: Path) -> None:
    layer = sdgp.convert(Conv1D(8, 16), "1:4", "magnitude", backend="pruned")
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert twin.pruning == layer.pruning
        assert torch.equal(twin.weight, layer.weight)
    torch.save(layer, tmp_path / "layer")
    # The other process has not imported transformers or used a Conv1D layer yet.
    program = f"""if True:
        import sys, torch, sdgp
        assert "transformers" not in sys.modules
        layer = torch.load({str(tmp_path / "layer")!r}, weights_only=False)
        assert sdgp.report(layer)[0].pattern == "1:4"
        assert type(sdgp.revert(layer)).__module__ == "transformers.pytorch_utils"
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

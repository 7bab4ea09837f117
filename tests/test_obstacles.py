# SPDX-License-Identifier: BSD-3-Clause
"""Tests what keeps a layer from being pruned. Conversion reports it if it is known by then, otherwise the call does."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import sdgp

FORCED = ("pruned", "dense", "sparse")


class Marked(Tensor):
    """A subclass with PyTorch's default behavior, like torchvision's images."""


class Logged(Tensor):
    """A wrapper subclass that dispatches in Python, like torchao's quantized weights."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Logged:
        made: Logged = Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(value: Any) -> Any:
            return value.inner if isinstance(value, Logged) else value

        def wrap(value: Any) -> Any:
            return Logged(value) if isinstance(value, Tensor) else value

        inner = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
        return torch.utils._pytree.tree_map(wrap, function(*inner[0], **inner[1]))


def reason(model: nn.Module) -> str:
    (row,) = sdgp.report(model)
    assert row.product == "plain"
    return row.why


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e4m3fn])
@pytest.mark.parametrize("backend", ["auto", *FORCED])
def test_weights_of_other_dtypes_stay_plain(backend: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(16, 16).requires_grad_(False)
    layer.weight.data = torch.zeros(16, 16).to(dtype)
    assert str(dtype).removeprefix("torch.") in reason(sdgp.convert(layer, backend=backend))
    assert type(layer) is nn.Linear


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: nn.Conv2d(8, 8, 3)])
def test_complex_layers_train_as_before(make: Callable[[], nn.Module]) -> None:
    layer = make().to(torch.complex64)
    x = torch.randn((4, 8) if isinstance(layer, nn.Linear) else (1, 8, 4, 4), dtype=torch.complex64, requires_grad=True)
    expected = torch.autograd.grad(layer(x).abs().sum(), x)
    assert torch.equal(*torch.autograd.grad(sdgp.convert(layer, backend="pruned")(x).abs().sum(), x), *expected)


@pytest.mark.parametrize("subclass", [Marked, Logged])
def test_weights_of_a_subclass_stay_plain(subclass: type[Tensor]) -> None:
    layer = nn.Linear(8, 8)
    weight = Logged(layer.weight.detach()) if subclass is Logged else layer.weight.detach().as_subclass(subclass)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    assert subclass.__name__ in reason(sdgp.convert(layer, backend="pruned"))
    layer(torch.randn(2, 8, requires_grad=True)).sum()


def test_weight_that_becomes_a_subclass_is_told_at_the_call() -> None:
    layer = sdgp.Linear(256, 256)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Marked))
    x = torch.randn(512, 256, requires_grad=True)
    layer(x)
    assert "weight of type Marked" in sdgp.report(layer)[0].why
    with pytest.raises(ValueError, match="weight of type Marked"):
        sdgp.linear(x, layer.weight, backend="dense")


def accelerate_hook(layer: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(layer, hooks.ModelHook())


def wrapped_forward(layer: nn.Module) -> None:
    before = layer.forward
    layer.forward = lambda x: before(x) * 2  # type: ignore[method-assign, assignment, operator]


def patched_convolution(layer: nn.Module) -> None:
    layer._conv_forward = types.MethodType(lambda self, x, w, b: nn.Conv2d._conv_forward(self, x, w, b) * 2, layer)  # type: ignore[assignment]


@pytest.mark.parametrize("replace", [accelerate_hook, wrapped_forward, patched_convolution])
def test_forward_replaced_on_the_instance_stays_plain(replace: Callable[[nn.Module], None]) -> None:
    layer = nn.Conv2d(8, 8, 3) if replace is patched_convolution else nn.Linear(8, 8)
    x = torch.randn((1, 8, 4, 4) if replace is patched_convolution else (2, 8), requires_grad=True)
    replace(layer)
    expected = torch.autograd.grad(layer(x).square().sum(), x)
    assert "replaced on the instance" in reason(sdgp.convert(layer, "2:4", "magnitude", backend="pruned"))
    assert torch.equal(*torch.autograd.grad(layer(x).square().sum(), x), *expected)


def prunes(layer: nn.Module) -> bool:
    x = torch.randn(4, 16, requires_grad=True)
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    output = layer(x).detach()
    return not torch.allclose(found, 2 * output @ layer.weight, atol=1e-4)  # type: ignore[operator]


def test_hook_that_left_the_class_method_behind_is_no_obstacle() -> None:
    layer = nn.Linear(16, 16)
    before = layer.forward
    wrapped_forward(layer)
    layer.forward = before  # type: ignore[method-assign]
    sdgp.convert(layer, "2:4", "magnitude", backend="pruned")
    assert prunes(layer)
    assert not prunes(sdgp.revert(layer))


@pytest.mark.parametrize("replace", [accelerate_hook, wrapped_forward])
def test_hooked_after_conversion_prunes_and_reverts(replace: Callable[[nn.Module], None]) -> None:
    layer = sdgp.convert(nn.Linear(16, 16), "2:4", "magnitude", backend="pruned")
    before = layer.forward
    replace(layer)
    if replace is wrapped_forward:
        layer.forward = before  # type: ignore[method-assign]
    assert prunes(layer)
    assert not prunes(sdgp.revert(layer))


def test_convolution_hooked_after_conversion_reverts() -> None:
    layer = sdgp.convert(nn.Conv2d(8, 8, 3), "2:4", "magnitude", backend="pruned")
    layer.forward = layer.forward  # type: ignore[method-assign]
    assert sdgp.revert(layer)(torch.randn(1, 8, 4, 4)).shape == (1, 8, 2, 2)


def test_lazy_layers_say_when_to_convert() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(8))
    assert all("convert after" in row.why for row in sdgp.report(sdgp.convert(model, backend="pruned")))
    model(torch.randn(2, 3, 6, 6))
    assert all("convert again" in row.why for row in sdgp.report(model))
    assert all(row.pattern == "2:4" for row in sdgp.report(sdgp.convert(model, backend="pruned")))


def nested(layout: torch.layout) -> Tensor:
    rows = [torch.randn(size, 256) for size in (200, 312)]
    return torch.nested.nested_tensor(rows, layout=layout, requires_grad=True)


def sparse_rows() -> Tensor:
    return torch.randn(512, 256).to_sparse_csr().requires_grad_()


INPUTS: dict[str, Callable[[], Tensor]] = {
    "jagged": lambda: nested(torch.jagged),
    "nested": lambda: nested(torch.strided),
    "subclass": lambda: torch.randn(512, 256).as_subclass(Marked).requires_grad_(),
    "wrapper": lambda: Logged(torch.randn(512, 256, requires_grad=True)),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_that_are_not_plain(kind: str) -> None:
    plain = nn.Linear(256, 256)
    layer = sdgp.convert(copy.deepcopy(plain))
    x = INPUTS[kind]()
    output, expected = layer(x), plain(x)
    assert type(output) is type(expected)
    (row,) = sdgp.report(layer)
    assert row.product == "plain"
    assert "plain tensors" in row.why
    for backend in FORCED:
        sdgp.convert(layer, backend=backend)
        with pytest.raises(ValueError, match=rf'linear: backend="{backend}" expected plain tensors, got input'):
            layer(x)
        with pytest.raises(ValueError, match=r"linear: .* expected plain tensors, got input"):
            sdgp.linear(x, plain.weight, plain.bias, backend=backend)


def test_images_of_a_subclass() -> None:
    layer = sdgp.Conv2d(3, 8, 3, backend="pruned")
    images = torch.randn(2, 3, 8, 8).as_subclass(Marked)
    layer(images).sum().backward()  # without a data gradient nothing is pruned, so there is no error
    with pytest.raises(ValueError, match=r'conv2d: backend="pruned" expected plain tensors, got input of type Marked'):
        layer(images.requires_grad_())


def test_complex_input_of_the_functions() -> None:
    x = torch.randn(4, 8, dtype=torch.complex64, requires_grad=True)
    weight = torch.randn(8, 8, dtype=torch.complex64)
    sdgp.linear(x, weight).abs().sum().backward()
    with pytest.raises(ValueError, match=r"linear: .*complex64"):
        sdgp.linear(x, weight, backend="dense")


def test_parametrized_weights() -> None:
    layer = parametrizations.weight_norm(nn.Linear(16, 16))
    assert "subclass" in reason(sdgp.convert(layer, backend="pruned"))
    after = parametrizations.weight_norm(sdgp.convert(nn.Linear(16, 16), "2:4", "magnitude", backend="pruned"))
    assert prunes(after)


def test_whole_models_load_with_weights_only(tmp_path: Any) -> None:
    model = nn.Sequential(sdgp.Linear(8, 8), sdgp.Conv2d(8, 8, 3, backend="dense"), nn.Linear(8, 2))
    sdgp.convert(model, backend="dense", filter=lambda module, name: name != "2")
    model[0].hold("schedule", "scheduled")
    torch.save(model, tmp_path / "model.pt")
    with torch.serialization.safe_globals([nn.Sequential, nn.Linear, set]):
        loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    assert sdgp.report(loaded) == sdgp.report(model)


def test_report_tells_to_revert_before_eager_quantization() -> None:
    model = nn.Sequential(sdgp.Linear(8, 8), nn.Linear(8, 8))
    assert "revert" not in str(sdgp.report(model))
    for layer in model:
        layer.qconfig = object()  # as torch.ao.quantization's prepare functions leave it
    assert ["sdgp.revert first" in row.why for row in sdgp.report(model)] == [True, False]

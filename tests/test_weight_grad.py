# SPDX-License-Identifier: BSD-3-Clause
"""Tests the pruned weight gradient: the closed form, when it is exact anyway, and what it leaves unchanged."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import Timer, close, gradients
from samples import METHODS
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode

import sdgp
from sdgp._decision import Site
from sdgp._pattern import Pruning, WeightGrad

FORCED = ("pruned", "dense", "sparse")
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 12), (3, 7, 16)),
    "conv2d": (lambda: nn.Conv2d(4, 12, 3, padding=1), (2, 4, 5, 7)),
}
layers = pytest.mark.parametrize("name", LAYERS)
forced = pytest.mark.parametrize("backend", FORCED)


def make(name: str, *settings: Any, **more: Any) -> tuple[Any, Any, Tensor]:
    """Makes a plain layer, its converted twin and an input."""
    build, shape = LAYERS[name]
    plain = build()
    return plain, sdgp.convert(copy.deepcopy(plain), *settings, **more), torch.randn(shape, requires_grad=True)


def prune_rows(grad_output: Tensor, n: int, m: int, method: str) -> Tensor:
    """Prunes along the rows of a linear layer's gradient. May draw."""
    rows = grad_output.reshape(-1, grad_output.shape[-1])
    return sdgp.prune_nm(rows.t(), n, m, -1, method).t().reshape(grad_output.shape)


def prune_pixels(grad_output: Tensor, n: int, m: int, method: str) -> Tensor:
    """Prunes along the output pixels of a convolution's gradient. May draw."""
    return sdgp.prune_nm(grad_output.flatten(2), n, m, -1, method).view_as(grad_output)


def exact(plain: nn.Module, x: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """Returns the gradients of the plain layer."""
    x = x.detach().requires_grad_()
    named = {"input": x, **dict(plain.named_parameters())}
    return dict(zip(named, gradients(plain(x), grad_output, *named.values()), strict=True))


# The closed form.


@forced
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(16,), (5, 16), (8, 16), (2, 3, 16), (2, 1, 3, 16), (0, 16)])
def test_linear(shape: tuple[int, ...], method: str, bias: bool, backend: str) -> None:
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(20, 16, requires_grad=True)
    b = torch.randn(20, requires_grad=True) if bias else None
    settings: Any = {"pattern": "2:8", "method": "mvue", "backend": backend, "weight_grad": ("2:4", method)}
    output = sdgp.linear(x, weight, b, **settings)
    plain = F.linear(x, weight, b)
    assert torch.equal(output, plain)
    grad_output = torch.randn_like(output)
    torch.manual_seed(1)
    actual = gradients(output, grad_output, x, weight, b)
    expected = gradients(plain, grad_output, x, weight, b)
    torch.manual_seed(1)  # the data gradient draws first, then the weight gradient
    expected[0] = sdgp.prune_nm(grad_output, 2, 8, -1, "mvue") @ weight
    if x.numel() // 16 >= 4:
        pruned = prune_rows(grad_output, 2, 4, method).reshape(-1, 20)
        expected[1] = pruned.t() @ x.reshape(-1, 16)
    for got, wanted in zip(actual, expected, strict=True):
        close(got, wanted)


def laid_out(image: Tensor) -> list[bool]:
    """Returns the memory formats that an image has, whatever the strides of dimensions of size 1."""
    return [image.is_contiguous(memory_format=each) for each in (torch.contiguous_format, torch.channels_last)]


CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same"},
    {"padding": "valid", "dilation": 2},
    {"stride": (1, 2), "padding": (2, 0), "kernel": (3, 1)},
    {"kernel": (1, 1)},
    {"groups": 2, "padding": 1},
    {"groups": 4, "stride": 3},
]


@forced
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_conv2d(
    method: str, options: dict[str, Any], bias: bool, memory_format: torch.memory_format, backend: str
) -> None:
    options = dict(options)
    kernel, groups = options.pop("kernel", (3, 3)), options.get("groups", 1)
    x = torch.randn(2, 8, 9, 11).contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.randn(16, 8 // groups, *kernel, requires_grad=True)
    b = torch.randn(16, requires_grad=True) if bias else None
    settings: Any = {"pattern": "4:4", "backend": backend, "weight_grad": ("2:4", method)}
    output, plain = sdgp.conv2d(x, weight, b, **options, **settings), F.conv2d(x, weight, b, **options)
    grad_output = torch.randn_like(output)
    torch.manual_seed(1)
    actual = gradients(output, grad_output, x, weight, b)
    expected = gradients(plain, grad_output, x, weight, b)
    torch.manual_seed(1)
    pruned = prune_pixels(grad_output, 2, 4, method)
    expected[1] = gradients(F.conv2d(x, weight, b, **options), pruned, weight)[0]
    assert laid_out(actual[1]) == laid_out(expected[1])
    for got, wanted in zip(actual, expected, strict=True):
        close(got, wanted)


@forced
def test_unbatched_conv2d(backend: str) -> None:
    plain, layer, _ = make("conv2d", "4:4", backend=backend, weight_grad=("2:4", "magnitude"))
    x = torch.randn(4, 5, 7)
    grad_output = torch.randn(12, 5, 7)
    (found,) = gradients(layer(x), grad_output, layer.weight)
    close(found, exact(plain, x, prune_pixels(grad_output.unsqueeze(0), 2, 4, "magnitude")[0])["weight"])


@forced
@pytest.mark.parametrize("transposed_memory", [False, True])
@pytest.mark.parametrize("shape", [(16,), (9, 16), (3, 5, 16), (2, 2, 3, 16)])
def test_transformers_conv1d(shape: tuple[int, ...], transposed_memory: bool, backend: str) -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    plain = conv1d(24, 16)
    if transposed_memory:
        plain.weight = nn.Parameter(plain.weight.detach().t().contiguous().t())
    layer = sdgp.convert(copy.deepcopy(plain), "4:4", backend=backend, weight_grad=("2:4", "magnitude"))
    x, grad_output = torch.randn(shape), torch.randn(*shape[:-1], 24)
    found = gradients(layer(x), grad_output, layer.weight, layer.bias)
    of_weight = grad_output if len(shape) == 1 else prune_rows(grad_output, 2, 4, "magnitude")
    close(found[0], exact(plain, x, of_weight)["weight"])
    close(found[1], exact(plain, x, grad_output)["bias"])
    assert found[0].stride() == layer.weight.stride()


@forced
@pytest.mark.parametrize("transposed", [False, True])
def test_result_is_laid_out_as_the_weight(transposed: bool, backend: str) -> None:
    weight = torch.randn(12, 16).t() if transposed else torch.randn(16, 12)
    weight.requires_grad_()
    x = torch.randn(32, 12)
    output = sdgp.linear(x, weight, backend=backend, weight_grad="4:16")
    assert gradients(output, torch.randn(32, 16), weight)[0].stride() == weight.stride()


@layers
@forced
def test_random_methods_draw_for_each_product(name: str, backend: str) -> None:
    """A product that is not asked for must draw nothing."""
    _, layer, x = make(name, "2:4", backend=backend, weight_grad="2:4")
    grad_output = torch.randn_like(layer(x))
    torch.manual_seed(1)
    of_data, of_weight = gradients(layer(x), grad_output, x, layer.weight)
    torch.manual_seed(1)
    (data_alone,) = gradients(layer(x), grad_output, x)
    (weight_alone,) = gradients(layer(x), grad_output, layer.weight)
    assert torch.equal(of_data, data_alone)
    assert torch.equal(of_weight, weight_alone)
    torch.manual_seed(1)
    assert not torch.equal(gradients(layer(x), grad_output, layer.weight)[0], of_weight)


# Together with any data gradient.


@layers
@forced
def test_data_gradient_may_be_exact(name: str, backend: str) -> None:
    plain, layer, x = make(name, "1:1", backend=backend, weight_grad=("4:16", "magnitude"))
    grad_output = torch.randn_like(layer(x))
    wanted = exact(plain, x, grad_output)
    found = gradients(layer(x), grad_output, x, layer.weight, layer.bias)
    torch.testing.assert_close([found[0], found[2]], [wanted["input"], wanted["bias"]])
    assert not torch.allclose(found[1], wanted["weight"])


@layers
@forced
def test_layer_whose_input_needs_no_gradient(name: str, backend: str) -> None:
    _, layer, x = make(name, "2:4", "magnitude", backend=backend, weight_grad=("4:16", "magnitude"))
    grad_output = torch.randn_like(layer(x))
    both = gradients(layer(x), grad_output, layer.weight, layer.bias)
    alone = gradients(layer(x.detach()), grad_output, layer.weight, layer.bias)
    assert all(map(torch.equal, both, alone))
    assert layer.weight_decision.prunes


@layers
@pytest.mark.parametrize("backend", ["auto", *FORCED])
def test_frozen_weight_ignores_it(name: str, backend: str) -> None:
    _, layer, x = make(name, "2:4", "magnitude", backend=backend, weight_grad="4:16")
    _, without, _ = make(name, "2:4", "magnitude", backend=backend)
    without.load_state_dict(layer.state_dict())
    layer.weight.requires_grad_(False)
    without.weight.requires_grad_(False)
    grad_output = torch.randn_like(layer(x))
    before = torch.get_rng_state()
    found, wanted = (gradients(each(x), grad_output, x, each.bias) for each in (layer, without))
    assert all(map(torch.equal, found, wanted))
    assert torch.equal(torch.get_rng_state(), before)
    assert sdgp.report(layer)[1].note == "exact: the weight is frozen"
    assert not layer.prunes_weight


@layers
@pytest.mark.parametrize("frozen", [False, True])
def test_forward_saves_what_it_saves_without(name: str, frozen: bool) -> None:
    _, layer, x = make(name, "2:4", backend="dense", weight_grad="4:16")
    layer.weight.requires_grad_(not frozen)
    without = sdgp.convert(copy.deepcopy(layer), "2:4", backend="dense")
    outputs = [each(x) for each in (layer, without)]  # keep these: older versions of torch free their saved tensors
    kept = [[None if tensor is None else tensor.shape for tensor in y.grad_fn.saved_tensors] for y in outputs]
    assert kept[0] == kept[1]
    assert (None in kept[0]) == frozen


# When it is exact.


@pytest.mark.parametrize("backend", ["auto", *FORCED])
@pytest.mark.parametrize("method", ["magnitude", "mvue"])
@pytest.mark.parametrize(
    ("layer", "shape", "why"),
    [
        (nn.Linear(16, 32), (2, 4, 16), "8 rows, fewer than m = 16"),
        (nn.Linear(16, 32), (16,), "1 rows, fewer than m = 16"),
        (nn.Conv2d(4, 16, 3), (8, 4, 5, 5), "9 output pixels, fewer than m = 16"),
        (nn.Conv2d(4, 16, 3, stride=3, padding=2, dilation=2), (8, 4, 9, 9), "9 output pixels, fewer than m = 16"),
        (nn.Conv2d(4, 16, 3, padding="same"), (2, 4, 3, 5), "15 output pixels, fewer than m = 16"),
        (nn.Conv2d(4, 16, 3, padding="valid"), (4, 3, 17), "15 output pixels, fewer than m = 16"),
    ],
    ids=str,
)
def test_too_few(layer: nn.Module, shape: tuple[int, ...], why: str, method: str, backend: str) -> None:
    plain = copy.deepcopy(layer)
    layer = sdgp.convert(copy.deepcopy(layer), "4:4", backend=backend, weight_grad=("4:16", method))
    x = torch.randn(shape)
    grad_output = torch.randn_like(plain(x))
    before = torch.get_rng_state()
    found = gradients(layer(x), grad_output, layer.weight, layer.bias)
    assert torch.equal(torch.get_rng_state(), before)
    wanted = exact(plain, x, grad_output)
    assert torch.equal(found[0], wanted["weight"])
    assert torch.equal(found[1], wanted["bias"])
    assert sdgp.report(layer)[1].note == f"exact: {why}"
    layer(x.clone().requires_grad_())
    assert sdgp.report(layer)[1].note == f"exact: {why}"


@pytest.mark.parametrize("backend", ["auto", "pruned"])
def test_enough_after_too_few(backend: str) -> None:
    _, layer, _ = make("linear", "2:4", backend=backend, weight_grad="4:16")
    layer(torch.randn(8, 16)).sum().backward()
    assert "8 rows" in sdgp.report(layer)[1].why
    layer(torch.randn(16, 16)).sum().backward()
    assert "rows" not in sdgp.report(layer)[1].why


@layers
@pytest.mark.parametrize("backend", ["auto", *FORCED])
def test_paused_and_identity(name: str, backend: str) -> None:
    plain, layer, x = make(name, "1:4", backend=backend, weight_grad="1:4")
    grad_output = torch.randn_like(layer(x))
    wanted = list(exact(plain, x, grad_output).values())
    with sdgp.paused(layer):
        found = gradients(layer(x), grad_output, x, layer.weight, layer.bias)
        assert [row.note for row in sdgp.report(layer)] == ["exact: paused"] * 2
        assert not layer.is_pruning
    assert all(map(torch.equal, found, wanted))
    sdgp.convert(layer, "4:4", backend=backend, weight_grad="4:4")
    assert all(map(torch.equal, gradients(layer(x), grad_output, x, layer.weight, layer.bias), wanted))
    assert [row.note for row in sdgp.report(layer)] == ["exact: n == m: nothing is pruned"] * 2
    assert not layer.is_pruning


# How each product is chosen.


def large(name: str, *settings: Any, **more: Any) -> tuple[Any, Tensor, Tensor]:
    """Makes a layer that is large enough to be measured, its input and its output's gradient."""
    if name == "linear":
        layer: nn.Module = sdgp.Linear(256, 256)
        x, grad_output = torch.randn(256, 256), torch.randn(256, 256)
    else:
        layer = sdgp.Conv2d(32, 32, 3, padding=1)
        x, grad_output = torch.randn(8, 32, 16, 16), torch.randn(8, 32, 16, 16)
    return sdgp.convert(layer, *settings, **more), x.requires_grad_(), grad_output


class Told:
    """A timer that decides which of the two sparse products wins. The data gradient is measured first."""

    def __init__(self, data_wins: bool, weight_wins: bool) -> None:
        times = [(1.0, 9.0) if wins else (9.0, 1.0) for wins in (data_wins, weight_wins)]
        self._times = iter([ms for pair in times for ms in pair])

    def __call__(self, call: Callable[[], object], device: torch.device) -> float:
        call()
        return next(self._times)


@layers
@pytest.mark.parametrize("backend", ["auto", "pruned"])
@pytest.mark.parametrize("data_wins", [True, False])
@pytest.mark.parametrize("weight_wins", [True, False])
def test_each_product_is_measured_and_chosen_by_itself(
    name: str, backend: str, data_wins: bool, weight_wins: bool
) -> None:
    layer, x, grad_output = large(name, "1:4", "magnitude", backend=backend, weight_grad=("2:4", "magnitude"))
    plain = sdgp.revert(copy.deepcopy(layer))
    prunes = backend == "pruned"
    other = "dense" if prunes else "exact"
    dim = -1 if name == "linear" else 1
    prune = prune_rows if name == "linear" else prune_pixels
    with sdgp.Chooser(timer=Told(data_wins, weight_wins), rounds=1) as chooser:
        for _ in range(2):
            found = gradients(layer(x), grad_output, x, layer.weight, layer.bias)
    assert len(chooser) == 2
    data, weight = sdgp.report(layer)
    assert (data.gradient, data.pattern, data.product) == ("data", "1:4", "sparse" if data_wins else other)
    assert (weight.gradient, weight.pattern, weight.product) == ("weight", "2:4", "sparse" if weight_wins else other)
    assert (data.ms, weight.ms) == (1.0, 1.0)
    assert (layer.decision.product, layer.weight_decision.product) == (data.product, weight.product)
    assert (layer.prunes_data, layer.prunes_weight) == (prunes or data_wins, prunes or weight_wins)
    of_data = sdgp.prune_nm(grad_output, 1, 4, dim) if layer.prunes_data else grad_output
    of_weight = prune(grad_output, 2, 4, "magnitude") if layer.prunes_weight else grad_output
    close(found[0], exact(plain, x, of_data)["input"])
    close(found[1], exact(plain, x, of_weight)["weight"])
    close(found[2], exact(plain, x, grad_output)["bias"])


def test_layer_that_is_known_to_be_exact_is_the_plain_one() -> None:
    layer, x, grad_output = large("linear", "2:4", weight_grad="4:16")
    plain = sdgp.revert(copy.deepcopy(layer))(x).grad_fn.name()
    with sdgp.Chooser(timer=Told(False, False), rounds=1):
        assert layer(x).grad_fn.name() != plain  # not measured yet
        gradients(layer(x), grad_output, x)
        assert layer(x).grad_fn.name() != plain  # the weight gradient is not measured yet
        gradients(layer(x), grad_output, layer.weight)
        assert layer(x).grad_fn.name() == plain
        assert layer.plain_for is not None


@pytest.mark.parametrize("first", ["data", "weight"])
def test_call_that_needs_other_gradients_is_decided_anew(first: str) -> None:
    """A call that needs the other gradient must be decided anew: its own calls are still unknown."""
    layer, x, grad_output = large("linear", "2:4", weight_grad="4:16")
    with sdgp.Chooser(timer=Told(False, False), rounds=1):
        for gradient in (first, *({"data", "weight"} - {first})):
            layer.weight.requires_grad_(gradient == "weight")
            inputs = x.detach().requires_grad_(gradient == "data")
            for _ in range(2):
                layer(inputs).backward(grad_output)
    assert layer.decision.exact_ms == layer.weight_decision.exact_ms == 1.0


def test_small_under_auto() -> None:
    _, layer, x = make("linear", "2:4", weight_grad="4:16")
    layer(x).sum().backward()
    assert [row.product for row in sdgp.report(layer)] == ["plain", "plain"]
    assert all("too small" in row.why for row in sdgp.report(layer))
    assert "_Linear" not in layer(x).grad_fn.name()


def test_chooser_state_with_both_gradients_and_of_before() -> None:
    layer, x, grad_output = large("linear", "2:4", weight_grad="4:16", backend="pruned")
    with sdgp.Chooser(timer=Timer(1.0, 9.0), rounds=1) as first:
        gradients(layer(x), grad_output, x, layer.weight)
    state = json.loads(json.dumps(first.state_dict()))
    assert sorted(json.loads(site)["gradient"] for site in state) == ["data", "weight"]
    second = sdgp.Chooser()
    second.load_state_dict(state)
    assert second.state_dict() == first.state_dict()
    old = {}
    for key, decision in state.items():
        site = json.loads(key)
        if site.pop("gradient") == "data":
            old[json.dumps(site)] = decision
    third = sdgp.Chooser()
    third.load_state_dict(old)
    with third:
        assert third.foresee(site_of(layer, x), 2**40).product == "sparse"


def site_of(layer: Any, x: Tensor) -> Site:
    """Returns the site of a layer's data gradient."""
    return Site("linear", x.device, x.dtype, torch.get_num_threads(), layer.pruning.data, layer.weight.shape, True, 16)


def test_device_without_a_sparse_weight_gradient() -> None:
    cuda, auto = torch.device("cuda", 0), Pruning.parse("conv2d", "2:4", "mvue", "auto")
    needed = "a cpu for the weight gradient of a convolution, got cuda:0"
    assert sdgp._choose.obstacle("conv2d", "weight", auto, cuda, torch.half) == needed
    site = Site("conv2d", cuda, torch.half, 1, Pruning.parse("conv2d", "2:4", "mvue", "pruned"), (8, 8, 3, 3), True, 9)
    decision = sdgp.Chooser().foresee(site._replace(gradient="weight"), 2**40)
    assert decision == sdgp.Decision("dense", f"a sparse product needs {needed}")


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
        sdgp.Linear.from_dense(nn.Linear(8, 8), weight_grad=("4:16", "mvue")),
    ):
        torch.save(layer, tmp_path / "layer.pt")
        with torch.serialization.safe_globals([set]):
            loaded = torch.load(tmp_path / "layer.pt", weights_only=True)
        for twin in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin.pruning == layer.pruning
        assert layer.to_dense().state_dict().keys() == layer.state_dict().keys()
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
        assert weight.why == 'backend="dense"' + ("" if method == "mvue" else phrase)
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

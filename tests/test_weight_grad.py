# SPDX-License-Identifier: BSD-3-Clause
"""Tests the pruned weight gradient: its closed form, and when it is exact anyway."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import close, gradients
from samples import METHODS
from torch import Tensor, nn
from weight_grads import FORCED, exact, forced, layers, make, prune_pixels, prune_rows

import sdgp

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

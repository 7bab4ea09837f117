# SPDX-License-Identifier: BSD-3-Clause
"""Tests sdgp.linear, sdgp.conv2d, sdgp.Linear, sdgp.Conv2d: only the data gradient must be pruned.

gradcheck cannot detect the pruning, because it passes one-hot vectors, which always survive. So the tests use the
closed form.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import Timer, close, gradients
from hypothesis import given
from hypothesis import strategies as st
from samples import METHODS, SAMPLES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sdgp
from sdgp._pattern import METHODS_THAT_DRAW

# The function linear.


@pytest.mark.parametrize("backend", ["pruned", "dense", "sparse"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16), (2, 1, 3, 16), (0, 16)])
def test_linear(shape: tuple[int, ...], method: str, bias: bool, backend: str) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(20, 16, requires_grad=True)
    b = torch.randn(20, requires_grad=True) if bias else None
    output = sdgp.linear(x, weight, b, pattern="2:8", method=method, backend=backend)
    exact = F.linear(x, weight, b)
    assert torch.equal(output, exact)
    grad_output = torch.randn_like(output)
    torch.manual_seed(1)
    actual = gradients(output, grad_output, x, weight, b)
    expected = gradients(exact, grad_output, x, weight, b)
    torch.manual_seed(1)
    expected[0] = sdgp.prune_nm(grad_output, 2, 8, -1, method) @ weight
    for got, wanted in zip(actual, expected, strict=True):
        close(got, wanted)


def test_linear_defaults_are_exact_as_long_as_nothing_is_faster() -> None:
    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    grad_output = torch.randn(4, 8)
    for actual, expected in zip(
        gradients(sdgp.linear(x, weight), grad_output, x, weight),
        gradients(F.linear(x, weight), grad_output, x, weight),
        strict=True,
    ):
        assert torch.equal(actual, expected)


# The function conv2d.

CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same"},
    {"padding": "same", "kernel": (2, 4)},
    {"padding": "same", "kernel": (4, 3), "dilation": (1, 2)},
    {"padding": "valid", "dilation": 2},
    {"stride": (1, 2), "padding": (2, 0), "kernel": (3, 1)},
    {"kernel": (1, 1)},
    {"groups": 2, "padding": 1},
    {"groups": 4, "out": 24},  # 6 output channels per group: pruning groups of 4 must not cross
]


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_conv2d(method: str, options: dict[str, Any], bias: bool, memory_format: torch.memory_format) -> None:
    options = dict(options)
    kernel, out, groups = options.pop("kernel", (3, 3)), options.pop("out", 16), options.get("groups", 1)
    x = torch.randn(2, 8, 9, 10).contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.randn(out, 8 // groups, *kernel, requires_grad=True)
    b = torch.randn(out, requires_grad=True) if bias else None
    output = sdgp.conv2d(x, weight, b, **options, pattern="2:4", method=method, backend="pruned")
    exact = F.conv2d(x, weight, b, **options)
    close(output, exact)
    grad_output = torch.randn_like(output)
    torch.manual_seed(1)
    actual = gradients(output, grad_output, x, weight, b)
    torch.manual_seed(1)
    expected = gradients(exact, grad_output, x, weight, b)
    exact = F.conv2d(x, weight, b, **options)
    expected[0] = gradients(exact, prune_each_group(grad_output, groups, method), x)[0]
    for got, wanted in zip(actual, expected, strict=True):
        close(got, wanted)


def prune_each_group(grad_output: Tensor, groups: int, method: str) -> Tensor:
    """Prunes each convolution group by itself.

    The random methods draw once for all groups, so all groups are pruned in one call.
    """
    if method in METHODS_THAT_DRAW:
        if grad_output.shape[1] // groups % 4 == 0:
            return sdgp.prune_nm(grad_output, 2, 4, 1, method)
        samples = grad_output.shape[0]
        by_group = grad_output.reshape(samples * groups, -1, *grad_output.shape[2:])
        return sdgp.prune_nm(by_group, 2, 4, 1, method).reshape(grad_output.shape)
    return torch.cat([sdgp.prune_nm(part, 2, 4, 1, method) for part in grad_output.chunk(groups, 1)], 1)


def test_conv2d_unbatched() -> None:
    x, weight = torch.randn(4, 7, 7, requires_grad=True), torch.randn(8, 4, 3, 3)
    output = sdgp.conv2d(x, weight, pattern="1:4", method="rescale", backend="pruned")
    grad_output = torch.randn_like(output)
    (actual,) = gradients(output, grad_output, x)
    batched = x.detach().unsqueeze(0).requires_grad_()
    output = sdgp.conv2d(batched, weight, pattern="1:4", method="rescale", backend="pruned")
    close(actual, gradients(output, grad_output.unsqueeze(0), batched)[0].squeeze(0))


@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2, 3]),
    per_group=st.tuples(st.integers(1, 3), st.integers(4, 9)),
    size=st.tuples(st.integers(7, 11), st.integers(7, 11)),
    n=st.integers(1, 4),
)
def test_conv2d_any_geometry(
    kernel: Any, stride: Any, padding: Any, dilation: Any, groups: int, per_group: Any, size: Any, n: int
) -> None:
    x = torch.randn(2, groups * per_group[0], *size, requires_grad=True)
    weight = torch.randn(groups * per_group[1], per_group[0], *kernel, requires_grad=True)
    geometry = (None, stride, padding, dilation, groups)
    output = sdgp.conv2d(x, weight, *geometry, pattern=(n, 4), method="magnitude", backend="pruned")
    exact = F.conv2d(x, weight, *geometry)
    grad_output = torch.randn_like(exact)
    pruned = torch.cat([sdgp.prune_nm(part, n, 4, 1) for part in grad_output.chunk(groups, 1)], 1)
    actual = gradients(output, grad_output, x, weight)
    close(actual[0], torch.autograd.grad(exact, x, pruned, retain_graph=True)[0])
    close(actual[1], torch.autograd.grad(exact, weight, grad_output)[0])


# No unnecessary work.


class _Operators(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_frozen_weights_cost_no_weight_gradient() -> None:
    layer = sdgp.Linear(16, 8, bias=False, backend="pruned").requires_grad_(False)
    output = layer(torch.randn(4, 16, requires_grad=True))
    saved = [tensor for tensor in output.grad_fn.saved_tensors if tensor is not None]
    assert [tuple(tensor.shape) for tensor in saved] == [(8, 16)]  # the weight, not the input
    with _Operators() as operators:
        output.backward(torch.randn_like(output))
    assert sum("mm" in name for name in operators.seen) == 1


def test_no_input_gradient_costs_no_pruning() -> None:
    for layer, x in (
        (sdgp.Linear(16, 8, backend="pruned"), torch.randn(4, 16)),
        (sdgp.Conv2d(4, 8, 3, backend="pruned"), torch.randn(1, 4, 8, 8)),
    ):
        output = layer(x)
        with _Operators() as operators:
            output.backward(torch.randn_like(output))
        assert not any("prune_nm" in name for name in operators.seen)
        assert layer.weight.grad is not None


def test_frozen_conv2d() -> None:
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    layer = sdgp.Conv2d(4, 8, 3, method="magnitude", backend="pruned")
    expected = gradients(layer(x), torch.ones(2, 8, 6, 6), x)
    layer.requires_grad_(False)
    output = layer(x)
    assert sum(tensor is not None for tensor in output.grad_fn.saved_tensors) == 1
    assert torch.equal(gradients(output, torch.ones(2, 8, 6, 6), x)[0], expected[0])
    layer.bias.requires_grad_(True)
    assert torch.equal(gradients(layer(x), torch.ones(2, 8, 6, 6), layer.bias)[0], torch.full((8,), 72.0))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_frozen_conv2d_keeps_the_memory_format(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=memory_format).requires_grad_()
    dense = nn.Conv2d(4, 8, 3).requires_grad_(False)
    layer = sdgp.Conv2d.from_plain(dense, backend="pruned")
    expected = gradients(dense(x), torch.ones(2, 8, 6, 6).contiguous(memory_format=memory_format), x)[0]
    actual = gradients(layer(x), torch.ones(2, 8, 6, 6).contiguous(memory_format=memory_format), x)[0]
    assert actual.stride() == expected.stride()


def test_conv2d_takes_pairs_of_one() -> None:
    x, weight = torch.randn(1, 4, 8, 8, requires_grad=True), torch.randn(8, 4, 3, 3)
    assert torch.equal(sdgp.conv2d(x, weight, None, (2,), backend="pruned"), F.conv2d(x, weight, None, (2,)))


def test_without_grad_it_is_the_plain_operator() -> None:
    layer = sdgp.Linear(16, 8, backend="pruned")
    x = torch.randn(4, 16, requires_grad=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("backend", ["auto", "dense"])
@pytest.mark.parametrize("weight_grad", [None, "2:4"])
@pytest.mark.parametrize(
    ("plain", "shape"), [(nn.Linear(1, 8), ()), (nn.Conv2d(1, 8, 3), (6, 6)), (nn.Conv2d(1, 8, 3), (1, 1, 1, 6, 6))]
)
def test_shapes_that_the_plain_layer_refuses(
    plain: nn.Module, shape: tuple[int, ...], weight_grad: str | None, backend: str
) -> None:
    layer = sdgp.convert(copy.deepcopy(plain), backend=backend, weight_grad=weight_grad)
    x = torch.randn(shape, requires_grad=True)
    with pytest.raises(RuntimeError) as expected:
        plain(x)
    with pytest.raises(RuntimeError, match=re.escape(str(expected.value))):
        layer(x)


# Autograd.


@pytest.mark.parametrize("backend", ["pruned", "sparse"])
@pytest.mark.parametrize("make", [lambda: sdgp.Linear(8, 8), lambda: sdgp.Conv2d(8, 8, 1)], ids=["linear", "conv2d"])
def test_double_backward_is_refused(make: Callable[[], nn.Module], backend: str) -> None:
    layer = sdgp.convert(make(), backend=backend)
    op = type(layer).__name__.lower()
    x = torch.randn(2, 8, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    expected = rf"^{op}: expected one differentiation, got a second .*sdgp\.paused\(model\)"
    with pytest.raises(RuntimeError, match=expected):
        gradient.square().sum().backward()
    (gradient,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)  # the incoming gradient needs none
    with pytest.raises(RuntimeError, match=expected):
        gradient.square().sum().backward()
    with sdgp.paused(layer):
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()


@pytest.mark.parametrize("make", [lambda: nn.Linear(256, 256), lambda: nn.Conv2d(64, 64, 3)], ids=["linear", "conv2d"])
def test_auto_may_be_differentiated_twice(make: Callable[[], nn.Module]) -> None:
    """A second differentiation must be exact, even if the sparse product wins and the first one prunes."""
    plain = make()
    layer = sdgp.convert(copy.deepcopy(plain), "1:4", "magnitude")
    x = torch.randn((256, 256) if isinstance(plain, nn.Linear) else (2, 64, 18, 18), requires_grad=True)

    def differentiate(layer: nn.Module) -> Tensor:
        return torch.autograd.grad(layer(x).square().mean(), x, create_graph=True)[0]

    with sdgp.Chooser(timer=Timer(1.0, 2.0)):
        layer(x).sum().backward()
        assert sdgp.report(layer)[0].product == "sparse"
        found, expected = differentiate(layer), differentiate(plain)
        assert sdgp.report(layer)[0].product == "exact"
        torch.testing.assert_close(found, expected)
        weights = [
            gradients(each.square().sum(), torch.ones(()), net.weight)
            for each, net in ((found, layer), (expected, plain))
        ]
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    sdgp.convert(model, "2:4", "rescale", backend="pruned")
    x = torch.randn(4, 16, requires_grad=True)
    expected = gradients(model(x), torch.ones(4, 8), x, *model.parameters())
    model.zero_grad()
    output = checkpoint(model, x, use_reentrant=use_reentrant)
    output.backward(torch.ones(4, 8))
    for parameter, wanted in zip((x, *model.parameters()), expected, strict=True):
        assert torch.equal(parameter.grad, wanted)


def test_gradients_accumulate() -> None:
    layer = sdgp.Linear(16, 8, method="magnitude", backend="pruned")
    x = torch.randn(4, 16, requires_grad=True)
    for _ in range(2):
        layer(x).sum().backward()
    twice = x.grad.clone()
    x.grad = None
    layer(x).sum().backward()
    assert torch.equal(twice, 2 * x.grad)


# Modules.


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_conv2d_module_padding_modes(padding_mode: str) -> None:
    dense = nn.Conv2d(4, 8, 3, padding=1, padding_mode=padding_mode)
    layer = sdgp.Conv2d.from_plain(dense, method="magnitude", backend="pruned")
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    close(layer(x), dense(x))
    grad_output = torch.randn(2, 8, 6, 6)
    close(gradients(layer(x), grad_output, x)[0], gradients(dense(x), sdgp.prune_nm(grad_output, 2, 4, 1), x)[0])


def test_from_plain_and_to_plain_share() -> None:
    for dense, twin in ((nn.Linear(8, 4), sdgp.Linear), (nn.Conv2d(8, 4, 3), sdgp.Conv2d)):
        layer = twin.from_plain(dense.eval(), "1:4", "rescale", "dense")
        assert layer.weight is dense.weight
        assert (str(layer.pruning.pattern), layer.pruning.method, layer.pruning.backend) == ("1:4", "rescale", "dense")
        assert not layer.training
        assert type(dense) in (nn.Linear, nn.Conv2d)
        back = layer.to_plain()
        assert type(back) is type(dense)
        assert back.weight is dense.weight
        assert vars(back).keys() == vars(dense).keys()
        dense.register_parameter("extra", nn.Parameter(torch.zeros(1)))
        assert "extra" not in dict(layer.named_parameters())


def test_modules_copy_and_pickle() -> None:
    layer = sdgp.Linear(8, 4, pattern="1:4", backend="pruned")
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.pruning == layer.pruning
        assert torch.equal(twin.weight, layer.weight)


def test_repr_tells_the_settings() -> None:
    expected = "Linear(in_features=8, out_features=4, bias=True, pattern=2:4, method=mvue, backend=auto)"
    assert repr(sdgp.Linear(8, 4)) == expected


@pytest.mark.parametrize("backend", ["auto", "sparse", "dense"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_rescale_of_a_vanishing_gradient_is_finite(backend: str, checkpointed: bool, autocast: bool) -> None:
    """A channel that keeps one subnormal value must not make the data gradient of a square layer infinite."""
    (vanishing,) = (sample for sample in SAMPLES if sample.name == "vanishing")
    grad_output = vanishing.make().repeat(1, 1, 4)  # (2, 33, 256)
    layer = sdgp.Linear(256, 256, pattern="2:4", method="rescale", backend=backend)
    told = sdgp.Chooser(least_work=0, rounds=1)
    for _ in range(2):  # with "auto", before and after its first measurement
        x = torch.randn(2, 33, 256, requires_grad=True)
        with told, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
            y.backward(grad_output.to(y.dtype))
        dy = grad_output.to(y.dtype)
        weight = layer.weight.detach().to(y.dtype)
        pruned = layer.decision is not None and layer.decision.prunes
        expected = (sdgp.prune_nm(dy, 2, 4, -1, "rescale") if pruned or backend != "auto" else dy) @ weight
        assert x.grad is not None
        assert x.grad.isfinite().all()
        torch.testing.assert_close(x.grad, expected.float(), rtol=0.02, atol=1e-3 if autocast else 1e-5)

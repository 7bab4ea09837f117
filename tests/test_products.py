# SPDX-License-Identifier: BSD-3-Clause
"""Tests that the sparse product of a data or weight gradient equals the dense product up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import METHODS
from torch import Tensor, nn

import sdgp


def of_each(call: Callable[[str], list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the gradients of the dense and the sparse product. Both must leave the generator in the same state."""
    results, states = [], []
    for backend in ("dense", "sparse"):
        torch.manual_seed(3)
        results.append(call(backend))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    return results[0], results[1]


def near(actual: Tensor, expected: Tensor) -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


@settings(max_examples=60)
@given(
    leading=st.lists(st.integers(0, 6), max_size=3),
    features=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    m=st.integers(1, 64),
    method=st.sampled_from(METHODS),
    bias=st.booleans(),
    data=st.data(),
)
def test_linear(
    leading: list[int], features: tuple[int, int], m: int, method: str, bias: bool, data: st.DataObject
) -> None:
    pattern = (data.draw(st.integers(1, m)), m)
    x = torch.randn(*leading, features[0], requires_grad=True)
    weight = torch.randn(features[1], features[0], requires_grad=True)
    b = torch.randn(features[1], requires_grad=True) if bias else None
    grad_output = torch.randn(*leading, features[1])

    def call(backend: str) -> list[Tensor]:
        settings: Any = {"pattern": pattern, "method": method, "backend": backend, "weight_grad": (pattern, method)}
        return gradients(sdgp.linear(x, weight, b, **settings), grad_output, x, weight)

    for dense, sparse in zip(*of_each(call), strict=True):
        near(sparse, dense)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@settings(max_examples=100)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)) | st.just("same"),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.integers(1, 3),
    per_group=st.tuples(st.integers(1, 4), st.integers(1, 10)),
    samples=st.integers(0, 3),  # 0: unbatched
    size=st.tuples(st.integers(7, 11), st.integers(7, 11)),
    channels_last=st.booleans(),
    bias=st.booleans(),
    m=st.sampled_from([1, 2, 3, 4, 8]),
    method=st.sampled_from(METHODS),
    data=st.data(),
)
def test_conv2d(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
    per_group: tuple[int, int],
    samples: int,
    size: tuple[int, int],
    channels_last: bool,
    bias: bool,
    m: int,
    method: str,
    data: st.DataObject,
) -> None:
    pattern = (data.draw(st.integers(1, m)), m)
    stride = (1, 1) if padding == "same" else stride
    channels_in, out = groups * per_group[0], groups * per_group[1]
    x = torch.randn(max(samples, 1), channels_in, *size)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x = (x if samples else x[0]).requires_grad_()
    weight = torch.randn(out, per_group[0], *kernel, requires_grad=True)
    b = torch.randn(out, requires_grad=True) if bias else None
    geometry: Any = (stride, padding, dilation, groups)
    grad_output = torch.randn_like(sdgp.conv2d(x, weight, b, *geometry))

    def call(backend: str) -> list[Tensor]:
        settings: Any = {"pattern": pattern, "method": method, "backend": backend, "weight_grad": (pattern, method)}
        return gradients(sdgp.conv2d(x, weight, b, *geometry, **settings), grad_output, x, weight)

    for dense, sparse in zip(*of_each(call), strict=True):
        near(sparse, dense)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("grad_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("input_format", [torch.contiguous_format, torch.channels_last])
def test_conv2d_keeps_the_memory_format(
    input_format: torch.memory_format,
    weight_format: torch.memory_format,
    grad_format: torch.memory_format,
    kernel: int,
    groups: int,
    frozen: bool,
) -> None:
    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=input_format).requires_grad_()
    weight = torch.randn(12, 8 // groups, kernel, kernel).contiguous(memory_format=weight_format)
    weight.requires_grad_(not frozen)
    grad_output = torch.randn(2, 12, 9, 9).contiguous(memory_format=grad_format)

    def call(backend: str) -> list[Tensor]:
        output = sdgp.conv2d(x, weight, None, 1, kernel // 2, 1, groups, backend=backend, weight_grad="4:16")
        return gradients(output, grad_output, x, *([] if frozen else [weight]))

    for dense, sparse in zip(*of_each(call), strict=True):
        near(sparse, dense)
        for size, stride, expected in zip(dense.shape, sparse.stride(), dense.stride(), strict=True):
            assert stride == expected or size == 1


@pytest.mark.parametrize("method", METHODS)
def test_expanded_and_strided_gradients(method: str) -> None:
    x, weight = torch.randn(6, 12, requires_grad=True), torch.randn(16, 12, requires_grad=True)
    for grad_output in (torch.randn(1, 16).expand(6, 16), torch.randn(16, 6).t(), torch.ones(()).expand(6, 16)):

        def call(backend: str, grad_output: Tensor = grad_output) -> list[Tensor]:
            output = sdgp.linear(x, weight, method=method, backend=backend, weight_grad=("2:4", method))
            return gradients(output, grad_output, x, weight)

        for dense, sparse in zip(*of_each(call), strict=True):
            near(sparse, dense)


@pytest.mark.parametrize("layer", [nn.Linear(16, 12), nn.Conv2d(16, 12, 3, padding=1)], ids=["linear", "conv2d"])
def test_a_frozen_layer_saves_and_adds_nothing(layer: nn.Module) -> None:
    frozen = sdgp.convert(layer, method="magnitude", backend="sparse").requires_grad_(False)
    x = torch.randn(2, 16, 5, 16 if isinstance(layer, nn.Linear) else 5, requires_grad=True)
    output = frozen(x)
    saved = [tensor for tensor in output.grad_fn.saved_tensors if tensor is not None and tensor.numel()]
    assert [tensor.shape for tensor in saved] == [layer.weight.shape]
    output.sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in frozen.parameters())

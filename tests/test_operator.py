# SPDX-License-Identifier: BSD-3-Clause
"""Tests the ops inside PyTorch: registration, gradient, TorchScript, torch.compile, meta, inference mode."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import identical
from samples import DTYPES, FIXED_METHODS, METHODS, Sample, draw_seed, each_sample
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sdgp
from sdgp import _ops, reference

OP = torch.ops.sdgp.prune_nm.default


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # a warning of opcheck
@pytest.mark.parametrize("method", METHODS)
@each_sample("vector", "rows_tail", "nchw", "channels_last", "transposed", "empty", "every_other")
def test_opcheck(sample: Sample, method: str) -> None:
    x = sample.make().requires_grad_()
    torch.library.opcheck(OP, (x, 2, 4, sample.dim, method, draw_seed()))


def test_opcheck_sees_every_dtype() -> None:
    for dtype in DTYPES:
        torch.library.opcheck(OP, (torch.randn(4, 8, dtype=dtype), 2, 4))


# The ops without a gradient.


CALLS: dict[str, Callable[..., Any]] = {
    "compress_nm": sdgp.compress_nm,
    "decompress_nm": sdgp.decompress_nm,
    "spmm_nm": sdgp.spmm_nm,
    "prune_nm_matmul": _ops.prune_nm_matmul,
    "conv2d_input_grad_nm": _ops.conv2d_input_grad_nm,
    "conv2d_weight_grad_nm": _ops.conv2d_weight_grad_nm,
    "prune_nm_matmul, rows side by side": _ops.prune_nm_matmul,
}


def products(channels_last: bool = False, apart: bool = False) -> dict[str, tuple[Any, ...]]:
    """Returns the arguments of each op in CALLS."""
    values, indices = sdgp.compress_nm(torch.randn(3, 22), 2, 4)
    out = 6 if apart else 8  # with 6, a convolution group has no whole number of groups of 4
    image, weight = torch.randn(3, 2 * out, 5, 5), torch.randn(2 * out, 3, 3, 3)
    geometry = ([9, 10], [2, 2], [1, 1], [1, 1], 2, channels_last)
    return {
        "compress_nm": (torch.randn(3, 22), 2, 4, -1, "mvue", draw_seed()),
        "decompress_nm": (values, indices, 4, 22, -1),
        "spmm_nm": (values, indices, 4, torch.randn(22, 7)),
        "prune_nm_matmul": (torch.randn(2, 3, 22), torch.randn(22, 7), 2, 4, "mvue", draw_seed()),
        "conv2d_input_grad_nm": (image, weight, 2, 4, "mvue", draw_seed(), *geometry),
        "conv2d_weight_grad_nm": (image, torch.randn(3, 6, 9, 10), 2, 4, "mvue", draw_seed(), (3, 3), *geometry[1:]),
        "prune_nm_matmul, rows side by side": (torch.randn(22, 3).t(), torch.randn(22, 7), 2, 4, "mvue", draw_seed()),
    }


class _Called(TorchDispatchMode):
    """Records the last op of sdgp that a call reaches, and its arguments."""

    op: Any
    arguments: tuple[Any, ...]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sdgp":
            self.op, self.arguments = func, args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("op", CALLS)
def test_opcheck_without_gradient(op: str, channels_last: bool, apart: bool) -> None:
    with _Called() as called:
        CALLS[op](*products(channels_last, apart)[op])
    torch.library.opcheck(called.op, called.arguments)


@pytest.mark.parametrize("method", FIXED_METHODS)
@each_sample("vector", "rows_tail", "nchw", "channels_last", "transposed", "empty", "every_other")
def test_opcheck_compress(sample: Sample, method: str) -> None:
    arguments = (sample.make(), 2, 4, sample.dim, method, draw_seed())
    torch.library.opcheck(torch.ops.sdgp.compress_nm.default, arguments)


def both(call: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Returns the results on the CPU and on the meta device."""
    on_meta = tuple(x.to("meta") if isinstance(x, Tensor) else x for x in arguments)
    actual, meta = call(*arguments), call(*on_meta)
    return (actual, meta) if isinstance(actual, tuple) else ((actual,), (meta,))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("op", CALLS)
def test_meta_equals_the_cpu(op: str, channels_last: bool, apart: bool) -> None:
    for dtype in DTYPES:
        arguments = tuple(
            x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in products(channels_last, apart)[op]
        )
        for actual, meta in zip(*both(CALLS[op], arguments), strict=True):
            assert meta.is_meta
            assert (meta.shape, meta.dtype, meta.stride()) == (actual.shape, actual.dtype, actual.stride())


@each_sample()
def test_meta_of_compressed_samples(sample: Sample) -> None:
    x = sample.make()
    for n, m in ((2, 4), (3, 7)):
        for actual, meta in zip(*both(sdgp.compress_nm, (x, n, m, sample.dim)), strict=True):
            assert (meta.shape, meta.dtype, meta.stride()) == (actual.shape, actual.dtype, actual.stride())
        values, indices = sdgp.compress_nm(x, n, m, sample.dim)
        arguments = (values, indices, m, x.shape[sample.dim], sample.dim)
        ((actual,), (meta,)) = both(sdgp.decompress_nm, arguments)
        assert (meta.shape, meta.dtype, meta.stride()) == (actual.shape, actual.dtype, actual.stride())


@pytest.mark.parametrize("op", CALLS)
def test_inference_mode_without_gradient(op: str) -> None:
    call, arguments = CALLS[op], products()[op]
    expected = call(*arguments)
    with torch.inference_mode():
        actual = call(*arguments)
    pairs = zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]
    for got, wanted in pairs:
        assert got.is_inference()
        identical(got, wanted)


def test_torchscript_multiplies() -> None:
    class Multiply(torch.nn.Module):
        def forward(self, x: Tensor, dense: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
            values, indices = torch.ops.sdgp.compress_nm(x, 2, 4, -1, "mvue", seed)
            restored = torch.ops.sdgp.decompress_nm(values, indices, 4, x.size(-1))
            return torch.ops.sdgp.spmm_nm(values, indices, 4, dense), restored

    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Multiply()), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    x, dense, seed = torch.randn(6, 22), torch.randn(22, 5), draw_seed()
    product, restored = loaded(x, dense, seed)
    identical(restored, sdgp.prune_nm(x, 2, 4, -1, "mvue", seed))
    torch.testing.assert_close(product, restored @ dense)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_gradient(dynamic: bool) -> None:
    torch._dynamo.reset()
    seed = draw_seed()

    def multiply(x: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = sdgp.compress_nm(x * 2, 2, 4, -1, "mvue", seed)
        return sdgp.spmm_nm(values, indices, 4, dense) + 1, sdgp.decompress_nm(values, indices, 4, x.shape[-1])

    compiled = torch.compile(multiply, fullgraph=True, dynamic=dynamic)
    for rows, size, cols in ((3, 8, 5), (4, 18, 7)):
        x, dense = torch.randn(rows, size), torch.randn(size, cols)
        for actual, expected in zip(compiled(x, dense), multiply(x, dense), strict=True):
            torch.testing.assert_close(actual, expected)


# The gradient applies the same mask and factor to the incoming gradient.


@pytest.mark.parametrize("method", METHODS)
@each_sample("rows_tail", "nchw", "channels_last", "ties", "zeros", "expanded")
def test_gradient_is_the_mask_and_factor(sample: Sample, method: str) -> None:
    x = sample.make().detach().requires_grad_()
    seed = draw_seed()
    grad_output = torch.randn(x.shape)
    pruned = sdgp.prune_nm(x, 2, 4, sample.dim, method, seed)
    (grad,) = torch.autograd.grad(pruned, x, grad_output)
    expected = grad_output * reference.prune_nm_scale(x.detach(), 2, 4, sample.dim, method, seed)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=0)


def test_gradient_of_a_kept_zero() -> None:
    # A weight that starts at zero must be able to change.
    x = torch.zeros(4, requires_grad=True)
    sdgp.prune_nm(x, 2, 4).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 0, 0]


def test_an_infinite_gradient_of_a_pruned_place_is_zero() -> None:
    x = torch.tensor([4.0, 3.0, 1.0, 1.0], requires_grad=True)
    sdgp.prune_nm(x, 2, 4).backward(torch.tensor([1.0, 1.0, torch.inf, 1.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 0, 0]


def test_gradcheck_at_n_equal_m() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sdgp.prune_nm(x, 4, 4), x)


def test_gradient_of_a_random_method_needs_its_seed() -> None:
    x = torch.randn(8, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"^prune_nm: expected a seed, to repeat mvue in backward, got None$"):
        torch.ops.sdgp.prune_nm(x, 2, 4, -1, "mvue")


# TorchScript.


class _Scripted(torch.nn.Module):
    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method

    def forward(self, x: Tensor, seed: Tensor) -> Tensor:
        return torch.ops.sdgp.prune_nm(x, 2, 4, -1, self.method, seed)


@pytest.mark.parametrize("method", METHODS)
def test_torchscript_saves_and_loads(method: str) -> None:
    module = _Scripted(method)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    x, seed = torch.randn(6, 20, requires_grad=True), draw_seed()
    assert torch.equal(loaded(x, seed), module(x, seed))
    (grad,) = torch.autograd.grad(loaded(x, seed).sum(), x)
    assert grad.count_nonzero() == loaded(x, seed).count_nonzero()


def test_torchscript_without_a_seed_draws_one(tmp_path: Path) -> None:
    @torch.jit.script
    def prune(x: Tensor) -> Tensor:
        return torch.ops.sdgp.prune_nm(x, 1, 4, 0, "random")

    x = torch.ones(400)
    assert prune(x).count_nonzero() == 100
    assert not torch.equal(prune(x), prune(x))


# torch.compile.


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_compile(method: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    seed = draw_seed()

    def prune(x: Tensor) -> Tensor:
        return sdgp.prune_nm(x * 2, 2, 4, 1, method, seed) + 1

    compiled = torch.compile(prune, fullgraph=True, dynamic=dynamic)
    for shape in ((2, 8, 5, 5), (3, 18, 7, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), prune(x))


def test_compile_draws_anew_at_each_call() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: sdgp.prune_nm(x, 2, 4, method="random"), fullgraph=True)
    x = torch.ones(64, 64)
    assert not torch.equal(compiled(x), compiled(x))


# Other modes.


@each_sample()
def test_meta_has_the_shape_dtype_and_strides(sample: Sample) -> None:
    x = sample.make()
    for dtype in DTYPES:
        actual = sdgp.prune_nm(x.to("meta", dtype), 2, 4, sample.dim, "mvue")
        expected = torch.empty_like(x.to("meta", dtype))
        assert actual.is_meta
        assert (actual.shape, actual.dtype, actual.stride()) == (expected.shape, expected.dtype, expected.stride())


@each_sample("rows", "channels_last")
def test_inference_mode(sample: Sample) -> None:
    x = sample.make()
    expected = sdgp.prune_nm(x, 2, 4, sample.dim)
    with torch.inference_mode():
        assert torch.equal(sdgp.prune_nm(x, 2, 4, sample.dim), expected)
        assert sdgp.prune_nm(x, 2, 4, sample.dim, "mvue").is_inference()

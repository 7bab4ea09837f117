# SPDX-License-Identifier: BSD-3-Clause
"""prune_nm as a citizen of PyTorch: registration, gradient, TorchScript, torch.compile, meta, inference mode."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from samples import DTYPES, METHODS, Sample, draw_seed, each_sample
from torch import Tensor

import sdgp
from sdgp import reference

OP = torch.ops.sdgp.prune_nm.default


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("method", METHODS)
@each_sample("vector", "rows_tail", "nchw", "channels_last", "transposed", "empty", "every_other")
def test_opcheck(sample: Sample, method: str) -> None:
    x = sample.make().requires_grad_()
    torch.library.opcheck(OP, (x, 2, 4, sample.dim, method, draw_seed()))


def test_opcheck_sees_every_dtype() -> None:
    for dtype in DTYPES:
        torch.library.opcheck(OP, (torch.randn(4, 8, dtype=dtype), 2, 4))


# The gradient: the same mask and factor on the incoming one.


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
    # A weight that starts at zero must be able to leave it.
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

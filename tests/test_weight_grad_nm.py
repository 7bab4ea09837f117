# SPDX-License-Identifier: BSD-3-Clause
"""Tests the products of weight gradients against the float64 reference, within the error of their dtype.

The products are a convolution's, and that of a matrix with adjacent rows.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from compare import PRODUCT_INSTRUCTION_SETS, identical, near, rerun
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DTYPES, draw_seed
from torch import Tensor

import sdgp
from sdgp import reference
from sdgp._ops import conv2d_weight_grad_nm, prune_nm_matmul

inf, nan = torch.inf, torch.nan
BY_GROUP = ("magnitude", "random", "rescale_group", "mvue")
SOME_PATTERNS = ((1, 2), (2, 4), (3, 7), (4, 4), (8, 16), (4, 32), (8, 64))
ALL_KEPT: tuple[Any, ...] = (1, 1, "magnitude", None)
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class Window(NamedTuple):
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, size: tuple[int, int]) -> list[int]:
        axes = zip(size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return [(i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in axes]


def check(grad: Tensor, x: Tensor, n: int, m: int, method: str, window: Window, channels_last: bool = False) -> Tensor:
    """Returns the op's result, and checks it against the exact result for the pruned pixels of each channel."""
    seed = draw_seed()
    actual = conv2d_weight_grad_nm(grad, x, n, m, method, seed, *window, channels_last)
    pruned = sdgp.prune_nm(grad.flatten(2), n, m, -1, method, seed).reshape(grad.shape).double()
    exact = reference.conv2d_weight_grad_nm(pruned, x.double(), *ALL_KEPT, *window, channels_last)
    magnitude = reference.conv2d_weight_grad_nm(pruned.abs(), x.double().abs(), *ALL_KEPT, *window, channels_last)
    assert (actual.dtype, actual.shape) == (grad.dtype, exact.shape)
    assert actual.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    near(actual, exact, magnitude, grad.shape[0] * grad[0, 0].numel())
    return actual


# Cases worked out by hand.


def test_by_hand() -> None:
    grad = torch.tensor([[[[3.0, -1.0], [0.5, -4.0]]], [[[0.0, 0.0], [1.0, 2.0]]]])  # keeps 3, -4 and 1, 2
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[5.0, 6.0], [7.0, 8.0]]]])
    for op in (conv2d_weight_grad_nm, reference.conv2d_weight_grad_nm):
        assert op(grad, x, 2, 4, "magnitude", None, *Window(), False).tolist() == [[[[3 - 16 + 7 + 16]]]]
        padded = op(grad, x, 2, 4, "magnitude", None, *Window((1, 3), (1, 1), (0, 1)), False)
        assert padded.tolist() == [[[[-4 * 3 + 2 * 7, 3 - 16 + 7 + 16, 3 * 2 + 8]]]]
    rows = torch.tensor([[3.0, 0.0], [-1.0, 0.0], [0.5, 1.0], [-4.0, 2.0]])
    dense = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    assert prune_nm_matmul(rows.t(), dense, 2, 4, "magnitude").tolist() == [[-13], [11]]


# Comparison with the reference.


SHAPES: dict[str, tuple[tuple[int, ...], int, Window]] = {
    # input, output channels, window
    "one pixel": ((1, 1, 1, 1), 1, Window()),
    "1 x 1": ((3, 20, 9, 7), 33, Window()),
    "1 x 1, stride and padding": ((2, 5, 8, 9), 6, Window((1, 1), (2, 3), (2, 1))),
    "3 x 3": ((2, 17, 9, 11), 12, Window((3, 3), (1, 1), (1, 1))),
    "3 x 3, stride 2": ((2, 40, 12, 13), 9, Window((3, 3), (2, 2), (1, 1))),
    "1 x 3": ((2, 3, 5, 30), 4, Window((1, 3), (1, 2), (0, 1), (1, 2))),
    "5 x 2, padding beyond it": ((2, 4, 6, 5), 5, Window((5, 2), (1, 1), (6, 3))),
    "7 x 7": ((2, 3, 21, 19), 16, Window((7, 7), (2, 2), (3, 3))),
    "dilation": ((2, 9, 13, 12), 7, Window((3, 3), (1, 2), (2, 3), (2, 3))),
    "groups": ((2, 12, 6, 7), 18, Window((3, 3), (1, 1), (1, 1), (1, 1), 3)),
    "depthwise": ((2, 10, 7, 7), 20, Window((3, 3), (1, 1), (1, 1), (1, 1), 10)),
    "small images": ((50, 30, 3, 3), 24, Window((3, 3), (1, 1), (1, 1))),
    "large images": ((1, 3, 90, 101), 5, Window((3, 3), (1, 1), (1, 1))),
    "panels": ((2, 270, 8, 8), 10, Window((3, 1), (1, 1), (1, 0))),
    "two chunks": ((3, 5, 5, 5), 800, Window((3, 3), (1, 1), (1, 1))),
    "several slabs": ((6, 150, 20, 20), 300, Window()),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape: str, dtype: torch.dtype, format: str) -> None:
    size, out, window = SHAPES[shape]
    x = torch.randn(size).to(dtype).contiguous(memory_format=FORMATS[format])
    grad = torch.randn(size[0], out, *window.output_size((size[2], size[3]))).to(dtype)
    grad = grad.contiguous(memory_format=FORMATS[format])
    for (n, m), method in zip(SOME_PATTERNS, [*BY_GROUP, *BY_GROUP], strict=False):
        check(grad, x, n, m, method, window, format == "channels_last")


def test_equals_the_reference_function() -> None:
    x, grad, seed = torch.randn(2, 6, 9, 7), torch.randn(2, 8, 5, 7), draw_seed()
    for channels_last in (False, True):
        for method in BY_GROUP:
            window = Window((3, 3), (2, 1), (1, 1), (1, 1), 2)
            arguments: tuple[Any, ...] = (grad, x, 2, 8, method, seed, *window, channels_last)
            actual, expected = conv2d_weight_grad_nm(*arguments), reference.conv2d_weight_grad_nm(*arguments)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
            assert actual.stride() == expected.stride()


PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "every other channel": lambda x: x.repeat_interleave(2, 1)[:, 1::2],
    "cropped": lambda x: torch.nn.functional.pad(x, (1, 2, 1, 1))[..., 1:-1, 1:-2],
    "columns first": lambda x: x.mT.contiguous().mT,
    "samples last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded pixels": lambda x: x[..., :1, :1].expand_as(x),
    "expanded channels": lambda x: x[:, :1].expand_as(x),
    "expanded": lambda x: x[:1, :1, :1, :1].expand_as(x),
}


@settings(max_examples=150)
@given(
    samples=st.integers(1, 5),
    groups=st.integers(1, 3),
    per_group=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kernel=PAIRS | st.sampled_from([(1, 1), (5, 2), (7, 7), (1, 4)]),
    stride=PAIRS,
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=PAIRS,
    output=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    m=st.integers(1, 64),
    dtype=st.sampled_from(DTYPES),
    method=st.sampled_from(BY_GROUP),
    layouts=st.tuples(st.sampled_from([*LAYOUTS]), st.sampled_from([*LAYOUTS])),
    channels_last=st.booleans(),
    data=st.data(),
)
def test_any_convolution(
    samples: int,
    groups: int,
    per_group: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    output: tuple[int, int],
    m: int,
    dtype: torch.dtype,
    method: str,
    layouts: tuple[str, str],
    channels_last: bool,
    data: st.DataObject,
) -> None:
    n = data.draw(st.integers(1, m))
    window = Window(kernel, stride, padding, dilation, groups)
    axes = zip(output, *window[:4], strict=True)
    size = [max((o - 1) * s + d * (k - 1) + 1 - 2 * p, 1) for o, k, s, p, d in axes]
    x = torch.randn(samples, groups * per_group[0], *size).to(dtype)
    grad = torch.randn(samples, groups * per_group[1], *window.output_size((size[0], size[1]))).to(dtype)
    check(LAYOUTS[layouts[0]](grad), LAYOUTS[layouts[1]](x), n, m, method, window, channels_last)


@settings(max_examples=100)
@given(
    rows=st.integers(1, 90) | st.just(800),
    size=st.integers(1, 400),
    cols=st.integers(1, 140),
    m=st.integers(1, 64),
    dtype=st.sampled_from(DTYPES),
    method=st.sampled_from(BY_GROUP),
    gap=st.integers(0, 3),
    dense=st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]),
    data=st.data(),
)
def test_rows_side_by_side(
    rows: int, size: int, cols: int, m: int, dtype: torch.dtype, method: str, gap: int, dense: str, data: st.DataObject
) -> None:
    n, seed = data.draw(st.integers(1, m)), draw_seed()
    x = torch.randn(size, rows + gap).to(dtype)[:, :rows].t()
    right = {
        "contiguous": lambda: torch.randn(size, cols),
        "transposed": lambda: torch.randn(cols, size).t(),
        "sliced": lambda: torch.randn(2 * size, 3 * cols)[::2, 1::3],
        "expanded": lambda: torch.randn(size, 1).expand(size, cols),
    }[dense]()
    right = right if dtype == torch.float32 else right.to(dtype)
    pruned = sdgp.prune_nm(x, n, m, -1, method, seed).double()
    actual = prune_nm_matmul(x, right, n, m, method, seed)
    assert actual.is_contiguous()
    near(actual, pruned @ right.double(), pruned.abs() @ right.double().abs(), size)


def test_pixels_far_apart() -> None:
    """The kernel must reach the last two pixels, beyond 2^31 elements. Unwritten pages take no memory."""
    memory = mmap.mmap(-1, 2 * (2**20 * 2049 + 16))
    x = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((1, 16, 1, 2050), (0, 1, 1, 2**20))
    grad = torch.zeros(1, 3, 1, 2050, dtype=torch.bfloat16)
    x[..., 2048:] = 1
    grad[..., 2048:] = 1
    window = Window((1, 1), (1, 1), (0, 0), (1, 1), 1)
    assert (conv2d_weight_grad_nm(grad, x, 4, 4, "magnitude", None, *window, False) == 2).all()


def test_one_row_repeated() -> None:
    """Adjacent rows must also work if all columns are one, with stride zero."""
    x, dense = torch.randn(40).expand(50, 40).t(), torch.randn(50, 9)
    pruned = sdgp.prune_nm(x, 2, 8).double()
    near(prune_nm_matmul(x, dense, 2, 8, "magnitude"), pruned @ dense.double(), pruned.abs() @ dense.double().abs(), 50)


@pytest.mark.parametrize("isa", PRODUCT_INSTRUCTION_SETS)
def test_every_instruction_set(isa: str) -> None:
    names = (
        "any_convolution",
        "rows_side_by_side",
        "zeros_of_the_gradient",
        "pixels_far_apart",
        "threads_do_not_change_the_result",
    )
    rerun(isa, *(f"{__file__}::test_{name}" for name in names))


# Properties.


def of_threads(call: Callable[[], Tensor]) -> None:
    """Any number of threads must give the same bits, although each thread has other units."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = call()
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            identical(call(), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_threads_do_not_change_the_result(channels_last: bool, dtype: torch.dtype) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    seed = draw_seed()
    for channels, out, groups in ((70, 130, 1), (300, 20, 1), (12, 80, 4)):
        x = torch.randn(3, channels, 13, 13).to(dtype).contiguous(memory_format=memory_format)
        grad = torch.randn(3, out, 13, 13).to(dtype).contiguous(memory_format=memory_format)
        window = Window((3, 3), (1, 1), (1, 1), (1, 1), groups)
        arguments: tuple[Any, ...] = (grad, x, 2, 8, "mvue", seed, *window, channels_last)
        of_threads(lambda arguments=arguments: conv2d_weight_grad_nm(*arguments))  # type: ignore[misc]
    rows, dense = torch.randn(600, 260).to(dtype).t(), torch.randn(600, 90).to(dtype)
    of_threads(lambda: prune_nm_matmul(rows, dense, 2, 8, "mvue", seed))


@pytest.mark.parametrize("method", ["random", "mvue", "unstructured"])
def test_seeds(method: str) -> None:
    grad, x = torch.randn(2, 8, 9, 9), torch.randn(2, 5, 9, 9)

    def draw(seed: Tensor | None) -> Tensor:
        return conv2d_weight_grad_nm(grad, x, 2, 8, method, seed, *Window(), False)

    one, other = torch.tensor([1]), torch.tensor([2])
    identical(draw(one), draw(one))
    assert not torch.equal(draw(one), draw(other))
    torch.manual_seed(5)
    first, second = draw(None), draw(None)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    identical(draw(None), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_values_are_summed_in_float32(dtype: torch.dtype) -> None:
    grad = torch.tensor([60000.0, 60000.0, -60000.0, 1.0]).to(dtype).view(1, 1, 2, 2)
    x = torch.ones(1, 1, 2, 2, dtype=dtype)
    actual = conv2d_weight_grad_nm(grad, x, 4, 4, "magnitude", None, *Window(), False)
    assert actual.item() == grad.double().sum().to(dtype).item()


# Edge cases.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_of_the_gradient(dtype: torch.dtype) -> None:
    """Groups with fewer than n nonzeros, and zeros of either sign, must be handled."""
    x = torch.randn(3, 20, 9, 9).to(dtype)
    grad = (torch.randn(3, 18, 9, 9) - 1).relu().to(dtype)
    grad = torch.where(torch.rand(grad.shape) < 0.3, -grad, grad)
    grad[:, 3] = 0
    grad[:, 4] = -0.0
    assert grad[:, 4].signbit().all()
    for method in BY_GROUP:
        for n, m in ((2, 4), (4, 32), (4, 4), (3, 7)):
            actual = check(grad, x, n, m, method, Window((3, 3), (1, 1), (1, 1)))
            assert actual[3:5].count_nonzero() == 0


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("input_size", "grad_size", "groups"),
    [
        ((0, 4, 6, 6), (0, 8, 6, 6), 1),
        ((2, 0, 6, 6), (2, 8, 6, 6), 1),
        ((2, 4, 6, 6), (2, 0, 6, 6), 1),
        ((2, 4, 6, 0), (2, 8, 6, 0), 1),
        ((0, 4, 6, 6), (0, 8, 6, 6), 2),
    ],
)
def test_empty(input_size: tuple[int, ...], grad_size: tuple[int, ...], groups: int, channels_last: bool) -> None:
    window = Window((3, 3), (1, 1), (1, 1), (1, 1), groups)
    grad, x = torch.empty(grad_size), torch.randn(input_size)
    actual = conv2d_weight_grad_nm(grad, x, 2, 4, "mvue", None, *window, channels_last)
    assert torch.equal(actual, torch.zeros(grad_size[1], input_size[1] // groups, 3, 3))


def test_input_that_is_all_padding() -> None:
    grad, x = torch.randn(2, 8, 3, 2), torch.empty(2, 4, 3, 0)
    actual = conv2d_weight_grad_nm(grad, x, 2, 4, "mvue", None, *Window((3, 3), (1, 1), (1, 2)), False)
    assert torch.equal(actual, torch.zeros(8, 4, 3, 3))


def test_kernel_larger_than_the_input() -> None:
    grad, x = torch.empty(2, 8, 0, 3), torch.randn(2, 4, 2, 5)
    actual = conv2d_weight_grad_nm(grad, x, 2, 4, "mvue", None, *Window((3, 3)), False)
    assert torch.equal(actual, torch.zeros(8, 4, 3, 3))


def test_no_reduction_of_rows_side_by_side() -> None:
    actual = prune_nm_matmul(torch.empty(0, 6).t(), torch.empty(0, 5), 2, 4, "magnitude")
    assert torch.equal(actual, torch.zeros(6, 5))
    assert prune_nm_matmul(torch.randn(9, 6).t(), torch.randn(9, 0), 2, 4, "magnitude").shape == (6, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [inf, -inf, nan])
def test_a_gradient_that_is_not_finite_reaches_its_channel_only(value: float, dtype: torch.dtype) -> None:
    grad, x = torch.randn(2, 30, 9, 9).to(dtype), torch.randn(2, 20, 9, 9).to(dtype)
    grad[1, 7, 3, 4] = value
    for method in ("magnitude", "mvue"):
        actual = conv2d_weight_grad_nm(grad, x, 2, 4, method, None, *Window((3, 3), (1, 1), (1, 1)), False)
        finite = actual.isfinite().flatten(1)
        assert (~finite.all(1)).nonzero().flatten().tolist() == [7]
        assert not finite[7].any()
        rows = prune_nm_matmul(grad[1].flatten(1).t().contiguous().t(), torch.randn(81, 6).to(dtype), 2, 4, method)
        assert (~rows.isfinite().all(1)).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("value", [inf, nan])
def test_an_input_that_is_not_finite_reaches_its_column_only(value: float) -> None:
    grad, x = torch.randn(2, 30, 9, 9), torch.randn(2, 20, 9, 9)
    x[1, 6, 3, 4] = value
    actual = conv2d_weight_grad_nm(grad, x, 2, 4, "magnitude", None, *Window((3, 3), (1, 1), (1, 1)), False)
    assert actual.isfinite().all((0, 2, 3)).logical_not().nonzero().flatten().tolist() == [6]
    assert not actual[:, 6].isfinite().all()

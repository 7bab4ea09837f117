# SPDX-License-Identifier: BSD-3-Clause
"""Tests spmm_nm and the convolution's product against the float64 reference, within the error of their dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import PRODUCT_INSTRUCTION_SETS, identical, near, rerun, strided_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DTYPES, PATTERNS, draw_seed
from torch import Tensor

import sdgp
from sdgp import reference
from sdgp._ops import conv2d_input_grad_nm, prune_nm_matmul

inf, nan = torch.inf, torch.nan
SOME_PATTERNS = ((2, 4), (1, 2), (3, 7), (4, 4), (8, 32), (31, 64), (1, 64), (1, 1))


def by_reference(values: Tensor, indices: Tensor, m: int, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the exact product and the product of absolute values."""
    values, dense = values.double(), dense.double()
    return tuple(reference.spmm_nm(v, indices, m, d) for v, d in ((values, dense), (values.abs(), dense.abs())))  # type: ignore[return-value]


def compressed(shape: tuple[int, ...], n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return sdgp.compress_nm(torch.randn(shape).to(dtype), n, m)


# Cases worked out by hand.


def test_by_hand() -> None:
    values, indices = sdgp.compress_nm(torch.tensor([[3.0, -1.0, 0.5, -4.0], [0.0, 0.0, 1.0, 2.0]]), 2, 4)
    dense = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]])
    assert sdgp.spmm_nm(values, indices, 4, dense).tolist() == [[-13, -130], [11, 110]]
    assert reference.spmm_nm(values, indices, 4, dense).tolist() == [[-13, -130], [11, 110]]


def test_pruned_places_do_not_matter() -> None:
    values, indices = sdgp.compress_nm(torch.tensor([3.0, -1.0, 0.5, -4.0]), 2, 4)
    for product in (sdgp.spmm_nm, reference.spmm_nm):
        assert product(values, indices, 4, torch.tensor([[1.0], [nan], [inf], [2.0]])).tolist() == [-5]
        assert product(values, indices, 4, torch.tensor([[inf], [0.0], [0.0], [2.0]])).tolist() == [inf]
        assert product(values, indices, 4, torch.tensor([[nan], [0.0], [0.0], [2.0]])).isnan().all()


# Comparison with the reference.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "cols"),
    [
        ((8,), 7),
        ((1, 1), 1),
        ((5, 70), 1000),
        ((2, 3, 64), 33),
        ((2, 0, 8), 5),
        ((0, 8), 5),
        ((5, 8), 0),
        ((300, 33), 16),
        ((2, 1, 2, 130), 129),
        ((40, 64), 250),
    ],
    ids=str,
)
def test_equals_reference(shape: tuple[int, ...], cols: int, dtype: torch.dtype) -> None:
    dense = torch.randn(shape[-1], cols).to(dtype)
    for n, m in SOME_PATTERNS:
        values, indices = compressed(shape, n, m, dtype)
        actual = sdgp.spmm_nm(values, indices, m, dense)
        assert (actual.dtype, actual.shape, actual.is_contiguous()) == (dtype, (*shape[:-1], cols), True)
        near(actual, *by_reference(values, indices, m, dense), values.shape[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size", "cols"), [(1, 5000, 3), (3, 4999, 130), (300, 1500, 500), (600, 40, 33)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (8, 32), (3, 7)])
def test_large(n: int, m: int, rows: int, size: int, cols: int, dtype: torch.dtype) -> None:
    values, indices = compressed((rows, size), n, m, dtype)
    dense = torch.randn(size, cols).to(dtype)
    pruned = reference.decompress_nm(values, indices, m, size).double()
    exact, magnitude = pruned @ dense.double(), pruned.abs() @ dense.double().abs()
    near(sdgp.spmm_nm(values, indices, m, dense), exact, magnitude, values.shape[-1])


@settings(max_examples=60)
@given(
    rows=st.integers(0, 40),
    size=st.integers(1, 300),
    cols=st.integers(1, 140),
    m=st.integers(1, 64),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]),
    data=st.data(),
)
def test_any_shape_and_strides(
    rows: int, size: int, cols: int, m: int, dtype: torch.dtype, layout: str, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, m))
    values, indices = compressed((rows, size), n, m, dtype)
    dense = {
        "contiguous": lambda: torch.randn(size, cols),
        "transposed": lambda: torch.randn(cols, size).t(),
        "sliced": lambda: torch.randn(2 * size, 3 * cols)[::2, 1::3],
        "expanded": lambda: torch.randn(size, 1).expand(size, cols),
    }[layout]()
    dense = dense if dtype == torch.float32 else dense.to(dtype)
    actual = sdgp.spmm_nm(values, indices, m, dense)
    near(actual, *by_reference(values, indices, m, dense), values.shape[-1])
    strided = [x.t().contiguous().t() for x in (values, indices)]
    identical(sdgp.spmm_nm(*strided, m, dense), actual)


PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=80)
@given(
    samples=st.integers(1, 3),
    groups=st.integers(1, 3),
    per_group=st.tuples(st.integers(1, 5), st.integers(1, 12)),
    size=st.tuples(st.integers(7, 12), st.integers(7, 12)),
    kernel=PAIRS,
    stride=PAIRS,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=PAIRS,
    m=st.sampled_from([1, 2, 3, 4, 8, 9]),
    dtype=st.sampled_from(DTYPES),
    channels_last=st.booleans(),
    data=st.data(),
)
def test_convolution(
    samples: int,
    groups: int,
    per_group: tuple[int, int],
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    m: int,
    dtype: torch.dtype,
    channels_last: bool,
    data: st.DataObject,
) -> None:
    n = data.draw(st.integers(1, m))
    channels_in, out = per_group
    out_size = [
        (i + 2 * p - d * (k - 1) - 1) // s + 1
        for i, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    weight = torch.randn(groups * out, channels_in, *kernel).to(dtype)
    if data.draw(st.booleans()):
        weight = weight.contiguous(memory_format=torch.channels_last)
    grad = torch.randn(samples, groups * out, *out_size).to(dtype)
    layout = data.draw(st.sampled_from(["contiguous", "channels_last", "every other column"]))
    if layout == "channels_last":
        grad = grad.contiguous(memory_format=torch.channels_last)
    elif layout == "every other column":
        grad = grad.repeat_interleave(2, -1)[..., ::2]
    method = data.draw(st.sampled_from(["magnitude", "random", "mvue", "unstructured"]))
    arguments: tuple[Any, ...] = (size, stride, padding, dilation, groups, channels_last)
    actual, exact, magnitude = convolutions(grad, weight, n, m, method, *arguments)
    assert actual.shape == exact.shape
    assert actual.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    near(actual, exact, magnitude, groups * out * kernel[0] * kernel[1])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_of_many_channels(stride: int, channels_last: bool) -> None:
    size = [9 * stride, 9 * stride]
    arguments: tuple[Any, ...] = (size, [stride, stride], [1, 1], [1, 1], 1, channels_last)
    grad, weight = torch.randn(2, 520, 9, 9), torch.randn(520, 300, 3, 3)
    near(*convolutions(grad, weight, 2, 8, "mvue", *arguments), 130 * 9)


def convolutions(
    grad: Tensor, weight: Tensor, n: int, m: int, method: str, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the data gradient, its exact value for the pruned gradient, and the product of absolute values."""
    seed = draw_seed()
    actual = conv2d_input_grad_nm(grad, weight, n, m, method, seed, *arguments)
    groups = arguments[4]
    by_group = grad
    if groups > 1 and grad.shape[1] // groups % m != 0:
        by_group = grad.reshape(-1, grad.shape[1] // groups, *grad.shape[2:])
    pruned = sdgp._ops.prune_nm(by_group, n, m, 1, method, seed).reshape(grad.shape).double()
    all_kept = (1, 1, "magnitude", None, *arguments)
    exact = reference.conv2d_input_grad_nm(pruned, weight.double(), *all_kept)
    return actual, exact, reference.conv2d_input_grad_nm(pruned.abs(), weight.double().abs(), *all_kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: "{}:{}".format(*pattern))
def test_linear_prunes_as_prune_nm_does(pattern: tuple[int, int], dtype: torch.dtype) -> None:
    # Long rows that are read in several slabs, few rows that do not fill a chunk, and remainders.
    for method in ("magnitude", "random", "rescale_group", "mvue", "unstructured"):
        for rows, size, cols in ((300, 2100, 33), (5, 70, 260), (1, 3, 1)):
            grad, weight, seed = torch.randn(rows, size).to(dtype), torch.randn(size, cols).to(dtype), draw_seed()
            actual = prune_nm_matmul(grad, weight, *pattern, method, seed)
            pruned = sdgp._ops.prune_nm(grad, *pattern, -1, method, seed).double()
            near(actual, pruned @ weight.double(), pruned.abs() @ weight.double().abs(), size)


@pytest.mark.parametrize("method", ["magnitude", "mvue", "unstructured"])
def test_convolution_equals_its_reference(method: str) -> None:
    grad, weight, seed = torch.randn(2, 24, 7, 6), torch.randn(24, 5, 3, 3), draw_seed()
    arguments: tuple[Any, ...] = (grad, weight, 2, 4, method, seed, [7, 6], [1, 1], [1, 1], [1, 1], 1, False)
    torch.testing.assert_close(conv2d_input_grad_nm(*arguments), reference.conv2d_input_grad_nm(*arguments))
    rows, dense = torch.randn(3, 9, 22), torch.randn(22, 7)
    arguments = (rows, dense, 2, 4, method, seed)
    torch.testing.assert_close(prune_nm_matmul(*arguments), reference.prune_nm_matmul(*arguments))


@given(grad=strided_tensors(), data=st.data())
def test_linear_of_any_strides(grad: Tensor, data: st.DataObject) -> None:
    weight = torch.randn(12, grad.shape[-1]).t() if data.draw(st.booleans()) else torch.randn(grad.shape[-1], 12)
    n, m = data.draw(st.sampled_from(PATTERNS))
    pruned = sdgp.prune_nm(grad, n, m).double()
    actual = prune_nm_matmul(grad, weight, n, m)
    near(actual, pruned @ weight.double(), pruned.abs() @ weight.double().abs(), grad.shape[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["magnitude", "random", "rescale_group", "mvue", "unstructured"])
def test_matmul_of_transposed_operands(method: str, dtype: torch.dtype) -> None:
    """Adjacent rows, rows far apart and reordered leading dimensions must give the bits of contiguous operands."""
    inputs = [torch.randn(130, 300).t(), torch.randn(66, 5, 40).movedim(0, -1), torch.randn(600, 130)[::2]]
    inputs += [torch.randn(5, 7, 130).transpose(0, 1), torch.randn(7, 260)[:, ::2], torch.randn(130).expand(300, 130)]
    for x in inputs:
        x, seed = x.to(dtype), draw_seed()
        for weight in (torch.randn(x.shape[-1], 33), torch.randn(33, x.shape[-1]).t(), torch.randn(x.shape[-1], 66)):
            dense = weight.to(dtype)[:, :33] if weight.is_contiguous() else weight.to(dtype)
            for n, m in ((2, 4), (3, 7), (4, 4), (8, 32)):
                expected = prune_nm_matmul(x.contiguous(), dense.contiguous(), n, m, method, seed)
                identical(prune_nm_matmul(x, dense, n, m, method, seed), expected)


@pytest.mark.parametrize("isa", PRODUCT_INSTRUCTION_SETS)
def test_every_instruction_set(isa: str) -> None:
    names = (
        "equals_reference",
        "large",
        "any_shape_and_strides",
        "convolution",
        "convolution_of_many_channels",
        "linear_prunes_as_prune_nm_does",
        "linear_of_any_strides",
        "matmul_of_transposed_operands",
        "threads_do_not_change_the_result",
    )
    rerun(isa, *(f"{__file__}::test_{name}" for name in names))


# Properties.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_values_are_summed_in_float32(dtype: torch.dtype) -> None:
    values = torch.tensor([60000.0, 60000.0, -60000.0, 1.0]).to(dtype)
    indices = torch.tensor([0, 1, 2, 3], dtype=torch.uint8)
    product = sdgp.spmm_nm(values, indices, 4, torch.ones(4, 1, dtype=dtype))
    assert torch.equal(product, (values.double().sum(0, keepdim=True)).to(dtype))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_the_result(dtype: torch.dtype) -> None:
    values, indices = compressed((700, 260), 2, 8, dtype)
    dense = torch.randn(260, 390).to(dtype)
    with_two = sdgp.spmm_nm(values, indices, 8, dense)
    image, weight, seed = torch.randn(3, 64, 17, 17).to(dtype), torch.randn(64, 40, 3, 3).to(dtype), draw_seed()
    arguments: tuple[Any, ...] = (image, weight, 2, 8, "mvue", seed, [17, 17], [1, 1], [1, 1], [1, 1], 1, False)
    image_with_two = conv2d_input_grad_nm(*arguments)
    rows = torch.randn(700, 260).to(dtype)
    rows_with_two = prune_nm_matmul(rows, dense, 2, 8, "mvue", seed)
    torch.set_num_threads(1)
    identical(sdgp.spmm_nm(values, indices, 8, dense), with_two)
    identical(conv2d_input_grad_nm(*arguments), image_with_two)
    identical(prune_nm_matmul(rows, dense, 2, 8, "mvue", seed), rows_with_two)


# Edge cases.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [inf, -inf, nan])
def test_a_weight_that_is_not_finite_reaches_its_rows_only(value: float, dtype: torch.dtype) -> None:
    values, indices = compressed((50, 64), 2, 4, dtype)
    dense = torch.randn(64, 70).to(dtype)
    dense[5, 3] = value
    actual = sdgp.spmm_nm(values, indices, 4, dense)
    named = (indices[:, 2:4] == 1).any(1)
    assert named.any()
    assert not named.all()
    assert torch.equal(~actual.isfinite()[:, 3], named)
    assert actual[:, [0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("value", [inf, -inf, nan])
def test_a_gradient_that_is_not_finite_reaches_its_row_only(value: float) -> None:
    x = torch.randn(50, 64)
    x[7, 5] = value
    values, indices = sdgp.compress_nm(x, 2, 4)
    rows = sdgp.spmm_nm(values, indices, 4, torch.randn(64, 70)).isfinite().all(1)
    assert (~rows).nonzero().flatten().tolist() == [7]


def test_no_reduction_is_zero() -> None:
    values, indices = sdgp.compress_nm(torch.empty(3, 0), 2, 4)
    assert torch.equal(sdgp.spmm_nm(values, indices, 4, torch.empty(0, 5)), torch.zeros(3, 5))


def test_pixels_that_no_output_reads_are_zero() -> None:
    window: tuple[Any, ...] = ([6, 6], [2, 2], [0, 0], [1, 1], 1, False)
    gradient, weight = torch.randn(1, 8, 3, 3), torch.randn(8, 4, 1, 1)
    grad = conv2d_input_grad_nm(gradient, weight, 2, 4, "magnitude", None, *window)
    assert grad[..., 1::2, :].count_nonzero() == grad[..., 1::2].count_nonzero() == 0
    assert grad[..., ::2, ::2].count_nonzero() == grad[..., ::2, ::2].numel()


def test_no_argument_may_be_on_the_meta_device_alone() -> None:
    """PyTorch then calls the fake, which would return memory without values."""
    values, indices = sdgp.compress_nm(torch.randn(8, 16), 2, 4)
    meta = torch.empty(16, 4, device="meta")
    seed = torch.zeros(1, dtype=torch.int64, device="meta")
    for call in (
        lambda: sdgp.spmm_nm(values, indices, 4, meta),
        lambda: sdgp.decompress_nm(values, indices.to("meta"), 4, 16),
        lambda: sdgp.compress_nm(torch.randn(8, 16), 2, 4, method="mvue", seed=seed),
    ):
        with pytest.raises(RuntimeError, match=r"expected \w+ on the same device \(cpu\), got meta"):
            call()

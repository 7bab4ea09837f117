# SPDX-License-Identifier: BSD-3-Clause
"""Tests compress_nm and decompress_nm: the kept values, their order, and that decompressing restores every bit."""

from __future__ import annotations

import pytest
import torch
from compare import INSTRUCTION_SETS, identical, rerun, same, same_as_reference, strided_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DTYPES, FIXED_METHODS, PATTERNS, Sample, cast, draw_seed, each_sample
from torch import Tensor

import sdgp
from sdgp import reference

inf, nan = torch.inf, torch.nan


def compress(values: list[float], n: int, m: int, method: str = "magnitude") -> tuple[list[float], list[int]]:
    kept, indices = sdgp.compress_nm(torch.tensor(values, dtype=torch.float32), n, m, method=method)
    return kept.tolist(), indices.tolist()


# Cases worked out by hand.


def test_by_hand() -> None:
    assert compress([3, -1, 0.5, -4, 1, 2, -3, 4], 2, 4) == ([3, -4, -3, 4], [0, 3, 2, 3])
    assert compress([3, -1, 0.5, -4, 1, 2, -3, 4], 1, 8) == ([-4], [3])
    assert compress([1, 2, 3], 2, 2) == ([1, 2, 3, 0], [0, 1, 0, 0])


def test_pruned_places_with_the_lowest_indices_fill_up() -> None:
    assert compress([0, 0, 0, 5, 0, 6, 0, 0], 2, 4) == ([0, 5, 0, 6], [0, 3, 0, 1])
    assert compress([0, 0, 0, 0, 0, 0, 7, 0], 4, 8) == ([0, 0, 0, 7], [0, 1, 2, 6])


def test_what_a_short_group_cannot_fill_is_zero_at_index_zero() -> None:
    assert compress([1, 2, 3, 4, 5], 2, 4) == ([3, 4, 5, 0], [2, 3, 0, 0])
    assert compress([5], 3, 7) == ([5, 0, 0], [0, 0, 0])
    assert compress([0, 9], 3, 7) == ([0, 9, 0], [0, 1, 0])


def test_a_kept_negative_zero_is_kept() -> None:
    values, indices = sdgp.compress_nm(torch.tensor([0.0, 1.0, -0.0, 0.0]), 4, 4)
    assert values.signbit().tolist() == [False, False, True, False]
    values, indices = sdgp.compress_nm(torch.tensor([-0.0, 1.0, -0.0, 0.0]), 2, 4)
    assert (values.signbit().tolist(), indices.tolist()) == ([True, False], [0, 1])


def test_decompress_by_hand() -> None:
    values, indices = torch.tensor([3.0, -4.0, 5.0, 0.0]), torch.tensor([0, 3, 0, 0], dtype=torch.uint8)
    assert sdgp.decompress_nm(values, indices, 4, 5).tolist() == [3, 0, 0, -4, 5]  # the first value at index 0 stays
    assert sdgp.decompress_nm(values, indices, 4, 7).tolist() == [3, 0, 0, -4, 5, 0, 0]


def test_mvue_keeps_what_it_scaled() -> None:
    outcomes = {tuple(map(tuple, compress([4, 1, -1, 0], 2, 4, "mvue"))) for _ in range(50)}
    assert outcomes == {((4, 2), (0, 1)), ((4, -2), (0, 2))}


# Comparison with the reference, and the inverse.


def inverse_is_exact(x: Tensor, n: int, m: int, dim: int, method: str, seed: Tensor | None = None) -> None:
    values, indices = sdgp.compress_nm(x, n, m, dim, method, seed)
    restored = sdgp.decompress_nm(values, indices, m, x.shape[dim], dim)
    identical(restored.contiguous(), sdgp.prune_nm(x, n, m, dim, method, seed).contiguous())


def innermost(x: Tensor, dim: int) -> bool:
    return x.movedim(dim, -1).is_contiguous()


# Packing depends only on which places a method keeps. So the other dtypes need only mvue, which may keep fewer than n.
@pytest.mark.parametrize(
    ("method", "dtype"),
    [(method, torch.float32) for method in FIXED_METHODS] + [("mvue", dtype) for dtype in DTYPES[1:]],
    ids=str,
)
@each_sample()
def test_equals_reference(sample: Sample, method: str, dtype: torch.dtype) -> None:
    x = cast(sample.make(), dtype)
    for n, m in PATTERNS:
        seed = draw_seed()
        values, indices = sdgp.compress_nm(x, n, m, sample.dim, method, seed)
        expected_values, expected_indices = reference.compress_nm(x, n, m, sample.dim, method, seed)
        same_as_reference(values, expected_values, method)
        identical(indices, expected_indices)
        assert innermost(values, sample.dim)
        restored = sdgp.decompress_nm(values, indices, m, x.shape[sample.dim], sample.dim)
        same(restored, reference.decompress_nm(values, indices, m, x.shape[sample.dim], sample.dim))
        identical(restored.contiguous(), sdgp.prune_nm(x, n, m, sample.dim, method, seed).contiguous())


@settings(max_examples=50)
@given(x=strided_tensors(), data=st.data())
def test_any_strides(x: Tensor, data: st.DataObject) -> None:
    m = data.draw(st.integers(1, 64))
    n = data.draw(st.integers(1, m))
    dim = data.draw(st.integers(-x.ndim, x.ndim - 1))
    method = data.draw(st.sampled_from(FIXED_METHODS))
    dtype = data.draw(st.sampled_from(DTYPES))
    x, seed = cast(x, dtype), draw_seed()
    values, indices = sdgp.compress_nm(x, n, m, dim, method, seed)
    expected_values, expected_indices = reference.compress_nm(x, n, m, dim, method, seed)
    same_as_reference(values, expected_values, method)
    identical(indices, expected_indices)
    inverse_is_exact(x, n, m, dim, method, seed)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set(isa: str) -> None:
    rerun(isa, f"{__file__}::test_equals_reference", f"{__file__}::test_any_strides")


# Properties.


@given(
    values=st.lists(st.sampled_from([0.0, -0.0, nan, inf, -inf, 1e-45, 3e38]) | st.floats(width=32), min_size=1),
    m=st.integers(1, 64),
    data=st.data(),
)
def test_inverse_of_any_values(values: list[float], m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m))
    method = data.draw(st.sampled_from(FIXED_METHODS))
    inverse_is_exact(torch.tensor(values), n, m, -1, method, draw_seed())


@given(size=st.integers(1, 200), m=st.integers(1, 64), data=st.data())
def test_indices_ascend_within_each_group(size: int, m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m))
    _, indices = sdgp.compress_nm(torch.randn(3, size).relu(), n, m)
    for at in range(0, size, m):
        group = indices[:, at // m * n : at // m * n + min(n, m, size - at)].int()
        assert (group.diff(dim=1) > 0).all()
        assert (group < min(m, size - at)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", FIXED_METHODS)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_inverse_of_mostly_zeros(n: int, m: int, method: str, dtype: torch.dtype) -> None:
    x = (torch.randn(2, 70, 9, 9) - 1).relu().to(dtype)  # as after a ReLU: most groups have fewer than n nonzeros
    x[:, :, 0] *= -0.0
    for memory_format in (torch.contiguous_format, torch.channels_last):
        inverse_is_exact(x.contiguous(memory_format=memory_format), n, m, 1, method, draw_seed())


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("method", FIXED_METHODS)
def test_threads_do_not_change_the_result(method: str) -> None:
    seed = draw_seed()
    for x, dim in ((torch.randn(300, 1030), -1), (torch.randn(4, 256, 17, 17), 1), (torch.randn(300, 1030), 0)):
        torch.set_num_threads(2)
        values, indices = sdgp.compress_nm(x, 3, 8, dim, method, seed)
        dense = sdgp.decompress_nm(values, indices, 8, x.shape[dim], dim)
        torch.set_num_threads(1)
        for actual, expected in zip(sdgp.compress_nm(x, 3, 8, dim, method, seed), (values, indices), strict=True):
            identical(actual, expected)
        identical(sdgp.decompress_nm(values, indices, 8, x.shape[dim], dim), dense)


# Edge cases.


@pytest.mark.parametrize(("shape", "dim"), [((0,), 0), ((4, 0), 1), ((0, 8), 1), ((4, 0, 3), 2), ((0, 3), 0)])
def test_empty(shape: tuple[int, ...], dim: int) -> None:
    values, indices = sdgp.compress_nm(torch.empty(shape), 2, 4, dim)
    kept = list(shape)
    kept[dim] = (shape[dim] + 3) // 4 * 2
    assert list(values.shape) == list(indices.shape) == kept
    assert sdgp.decompress_nm(values, indices, 4, shape[dim], dim).shape == shape


@pytest.mark.parametrize("method", ["random", "mvue"])
def test_manual_seed_reproduces(method: str) -> None:
    x = torch.randn(64, 64)
    for draw in (sdgp.compress_nm, torch.ops.sdgp.compress_nm):
        torch.manual_seed(5)
        first, second = (draw(x, 2, 4, -1, method)[1] for _ in range(2))
        torch.manual_seed(5)
        assert torch.equal(draw(x, 2, 4, -1, method)[1], first)
        assert not torch.equal(first, second)


@pytest.mark.parametrize("method", FIXED_METHODS)
def test_draws_as_prune_nm_does(method: str) -> None:
    x = torch.randn(16, 64)
    torch.manual_seed(5)
    values, indices = sdgp.compress_nm(x, 2, 4, method=method)
    torch.manual_seed(5)
    identical(sdgp.decompress_nm(values, indices, 4, 64), sdgp.prune_nm(x, 2, 4, method=method))


def test_compressed_tensors_of_any_strides() -> None:
    values, indices = sdgp.compress_nm(torch.randn(6, 40), 2, 4)
    expected = sdgp.decompress_nm(values, indices, 4, 40)
    strided = [x.t().contiguous().t() for x in (values, indices)]
    identical(sdgp.decompress_nm(*strided, 4, 40), expected)


def test_only_prune_nm_has_a_gradient() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    values, indices = sdgp.compress_nm(x, 2, 4)
    dense = torch.randn(8, 3, requires_grad=True)
    results = {
        "compress_nm": values,
        "decompress_nm": sdgp.decompress_nm(values.detach().requires_grad_(), indices, 4, 8),
        "spmm_nm": sdgp.spmm_nm(values.detach(), indices, 4, dense),
    }
    for op, result in results.items():
        with pytest.raises(RuntimeError, match=f"{op}: expected no differentiation, got a backward; .*sdgp.linear"):
            result.sum().backward()

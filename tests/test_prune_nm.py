# SPDX-License-Identifier: BSD-3-Clause
"""Tests what prune_nm computes.

Other files test its errors (test_errors.py), its random draws (test_statistics.py) and its use in PyTorch
(test_operator.py).
"""

from __future__ import annotations

import pytest
import torch
from compare import INSTRUCTION_SETS, rerun, same, same_as_reference, strided_tensors
from hypothesis import given
from hypothesis import strategies as st
from samples import DTYPES, FIXED_METHODS, METHODS, PATTERNS, Sample, cast, draw_seed, each_sample
from torch import Tensor

import sdgp
from sdgp import reference

inf, nan = torch.inf, torch.nan


def prune(values: list[float], n: int, m: int, method: str = "magnitude") -> list[float]:
    return sdgp.prune_nm(torch.tensor(values, dtype=torch.float32), n, m, method=method).tolist()


# Cases worked out by hand.


def test_magnitude_by_hand() -> None:
    assert prune([3, -1, 0.5, -4, 1, 2, -3, 4], 2, 4) == [3, 0, 0, -4, 0, 0, -3, 4]
    assert prune([3, -1, 0.5, -4, 1, 2, -3, 4], 1, 8) == [0, 0, 0, -4, 0, 0, 0, 0]


def test_rescale_by_hand() -> None:
    # A matrix has one factor per row: 8 / 7 and 10 / 7.
    x = torch.tensor([[3.0, -1.0, 0.0, -4.0], [1.0, 2.0, -3.0, 4.0]])
    expected = torch.tensor([[3 * 8 / 7, 0, 0, -4 * 8 / 7], [0, 0, -3 * 10 / 7, 4 * 10 / 7]])
    torch.testing.assert_close(sdgp.prune_nm(x, 2, 4, method="rescale"), expected)
    # A sequence has one factor per (sample, channel). Channel 0 keeps 8 of its sum of 10, channel 1 keeps 4 of 8.
    x = torch.tensor([[[3.0, 1.0], [2.0, 4.0], [5.0, 3.0]]])
    expected = torch.tensor([[[3 * 10 / 8, 0.0], [0.0, 4 * 8 / 4], [5 * 10 / 8, 0.0]]])
    torch.testing.assert_close(sdgp.prune_nm(x, 1, 2, method="rescale"), expected)


def test_rescale_group_by_hand() -> None:
    assert prune([3, -1, 0, -4, 1, 1, 0, 0], 1, 4, "rescale_group") == [0, 0, 0, -8, 2, 0, 0, 0]


def test_mvue_by_hand() -> None:
    # The threshold 6 / 2 = 3 keeps the 4 unchanged. One place is left for the two ones, and either is then worth 2.
    outcomes = {tuple(prune([4, 1, -1, 0], 2, 4, "mvue")) for _ in range(50)}
    assert outcomes == {(4, 2, 0, 0), (4, 0, -2, 0)}
    assert prune([0, 5, 0, -3], 2, 4, "mvue") == [0, 5, 0, -3]
    assert prune([0, 0, 7, 0, 0, 0, 0, -1e-30], 4, 8, "mvue") == torch.tensor([0, 0, 7, 0, 0, 0, 0, -1e-30]).tolist()


def test_mvue_keeps_the_smallest_subnormal() -> None:
    for dtype, smallest in ((torch.float32, 2.0**-149), (torch.float64, 2.0**-1074)):
        group = torch.tensor([0, 0, 0, 0, 0, 0, 0, smallest], dtype=dtype)
        assert torch.equal(sdgp.prune_nm(group, 4, 8, method="mvue"), group)


@pytest.mark.parametrize("shape", [(1, 1 << 20, 4), (1, 1 << 16, 64)])
def test_rescale_sums_long_columns_exactly_enough(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape)
    expected = sdgp.prune_nm(x.double(), 2, 4, -1, "rescale")
    torch.testing.assert_close(sdgp.prune_nm(x, 2, 4, -1, "rescale").double(), expected, rtol=1e-5, atol=0)


def test_groups_of_a_convolution_follow_channels() -> None:
    x = torch.arange(1.0, 17.0).view(1, 4, 2, 2)
    expected = x.clone()
    expected[:, :2] = 0
    for memory_format in (torch.contiguous_format, torch.channels_last):
        same(sdgp.prune_nm(x.contiguous(memory_format=memory_format), 2, 4, dim=1), expected)


# Comparison with the reference.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@each_sample()
def test_equals_reference(sample: Sample, method: str, dtype: torch.dtype) -> None:
    x = cast(sample.make(), dtype)
    for n, m in PATTERNS:
        seed = draw_seed()
        actual = sdgp.prune_nm(x, n, m, sample.dim, method, seed)
        expected = reference.prune_nm(x, n, m, sample.dim, method, seed)
        same_as_reference(actual, expected, method)
        assert actual.stride() == torch.empty_like(x).stride()
        scale = torch.ops.sdgp._prune_nm_scale(x, n, m, sample.dim, method, seed)
        same_as_reference(scale, reference.prune_nm_scale(x, n, m, sample.dim, method, seed), method)


@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 300, 1030), -1), ((2, 300, 1030), 1), ((2, 256, 40, 41), 1), ((1, 70, 80, 80), 1)]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rescale_of_samples_that_are_cut_into_blocks(
    shape: tuple[int, ...], dim: int, memory_format: torch.memory_format
) -> None:
    x = torch.randn(shape)
    x = x.contiguous(memory_format=memory_format) if x.ndim == 4 else x
    for n, m in ((2, 4), (3, 7), (4, 32)):
        same_as_reference(
            sdgp.prune_nm(x, n, m, dim, "rescale"), reference.prune_nm(x, n, m, dim, "rescale"), "rescale"
        )


@given(x=strided_tensors(), data=st.data())
def test_any_strides(x: Tensor, data: st.DataObject) -> None:
    m = data.draw(st.integers(1, 64))
    n = data.draw(st.integers(1, m))
    dim = data.draw(st.integers(-x.ndim, x.ndim - 1))
    method = data.draw(st.sampled_from(METHODS))
    seed = draw_seed()
    same_as_reference(sdgp.prune_nm(x, n, m, dim, method, seed), reference.prune_nm(x, n, m, dim, method, seed), method)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set(isa: str) -> None:
    names = ("equals_reference", "any_strides", "a_signalling_nan_of_float16_counts_as_the_quiet_one")
    rerun(isa, *(f"{__file__}::test_{name}" for name in names))


# Properties.


@given(
    values=st.lists(st.floats(width=32, allow_subnormal=True), min_size=1, max_size=70),
    m=st.integers(1, 64),
    method=st.sampled_from(FIXED_METHODS),
    data=st.data(),
)
def test_at_most_n_of_every_m(values: list[float], m: int, method: str, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m))
    pruned = sdgp.prune_nm(torch.tensor(values), n, m, method=method)
    for group in pruned.split(m):
        assert int((group != 0).sum()) <= n


@pytest.mark.parametrize("method", ["magnitude", "rescale", "rescale_group"])
@pytest.mark.parametrize("power", [-30, -10, 10, 30])
def test_scale_invariant(method: str, power: int) -> None:
    x = torch.randn(2, 64, 5, 5)
    scale = torch.tensor(10.0**power)
    for n, m in ((2, 4), (4, 32)):
        expected = sdgp.prune_nm(x, n, m, 1, method) * scale
        torch.testing.assert_close(sdgp.prune_nm(x * scale, n, m, 1, method), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["mvue", "unstructured"])
def test_unbiased_methods_have_no_absolute_epsilon(method: str) -> None:
    x = torch.randn(256, 64)
    seed = draw_seed()
    powers = torch.tensor(2.0) ** torch.tensor([-100, -40, 40, 90])  # exact, so the draws stay the same
    for scale in powers:
        same(sdgp.prune_nm(x * scale, 4, 16, -1, method, seed), sdgp.prune_nm(x, 4, 16, -1, method, seed) * scale)


def test_unstructured_by_hand() -> None:
    """The shares add up to 2 of 8 with a step of 2: the 5 stays, and half a place is left for each 1."""
    outcomes = {tuple(prune([5, 1, 0, 1, 0, 0, 0, 0], 2, 8, "unstructured")) for _ in range(50)}
    assert outcomes == {(5, 2, 0, 0, 0, 0, 0, 0), (5, 0, 0, 2, 0, 0, 0, 0)}


def test_unstructured_keeps_more_where_values_are_large() -> None:
    x = torch.ones(64, 64)
    x[:8] = 100
    pruned = sdgp.prune_nm(x, 2, 8, method="unstructured")
    assert torch.equal(pruned[:8], x[:8])
    assert (pruned[8:].count_nonzero(1) <= 16).all()
    assert int(pruned.count_nonzero()) == pytest.approx(x.numel() / 4, abs=64)


@pytest.mark.parametrize("shape", [(1, 64), (40, 50), (8, 32, 33, 31), (3, 1, 70000)])
def test_unstructured_keeps_about_n_of_m(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for n, m in ((1, 32), (4, 32), (16, 32), (3, 7)):
        for dim in (-1, 0):
            kept = sdgp.prune_nm(x, n, m, dim, "unstructured").count_nonzero() / x.numel()
            assert float(kept) == pytest.approx(n / m, rel=0.05, abs=2 / x.numel() ** 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unstructured_of_values_too_small_for_shares(dtype: torch.dtype) -> None:
    """Where 2²⁴ / step would overflow, fewer values stay, but no zero is kept, and the others are still unbiased."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = torch.tensor([tiny, 0, -2 * tiny, 0], dtype=dtype).expand(2000, 4)
    seed = draw_seed()
    pruned = sdgp.prune_nm(x, 1, 4, method="unstructured", seed=seed)
    same(pruned, reference.prune_nm(x, 1, 4, method="unstructured", seed=seed))
    assert not pruned[:, 1::2].any()
    assert pruned.isfinite().all()


def test_rescale_keeps_the_sum() -> None:
    x = torch.randn(3, 32, 7, 7)
    pruned = sdgp.prune_nm(x, 2, 4, 1, "rescale")
    kept_any = pruned.abs().sum((2, 3)) > 0
    torch.testing.assert_close(pruned.abs().sum((2, 3))[kept_any], x.abs().sum((2, 3))[kept_any])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rescale_of_a_channel_that_keeps_next_to_nothing(dtype: torch.dtype) -> None:
    """Σ|x| / Σ|kept| overflows if the kept values are subnormal, but no value may become larger than Σ|x|."""
    tiny = 2 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = torch.tensor([[[1.0, 2, 3, 4], [tiny, 0, 0, 0]]], dtype=dtype)
    pruned = sdgp.prune_nm(x, 2, 4, -1, "rescale")
    assert pruned[0, 0].tolist() == [0, 0, 3, 4]
    assert pruned[0, 1, 1:].tolist() == [0, 0, 0]
    assert 0 < pruned[0, 1, 0] <= 1
    x[0, 0, 1] = torch.inf  # a GradScaler must still see what is not finite
    assert not sdgp.prune_nm(x, 2, 4, -1, "rescale").isfinite().all()


def test_rescale_sums_16_bit_values_in_float32() -> None:
    x = torch.full((1, 4, 512, 512), 1.0, dtype=torch.float16)  # the sum, 262144, is inf in float16
    assert torch.equal(sdgp.prune_nm(x, 4, 4, 1, "rescale"), x)
    assert sdgp.prune_nm(x, 2, 4, 1, "rescale").amax() == 1  # a channel that keeps all its values has factor 1


# Edge cases.


def test_ties_go_to_the_lower_index() -> None:
    assert prune([1, -1, 1, -1, 2, 1, 1, 2], 2, 4) == [1, -1, 0, 0, 2, 0, 0, 2]
    assert prune([0, -0.0, 5, 0], 2, 4) == [0, 0, 5, 0]


def test_nan_and_inf_survive() -> None:
    for method in ("magnitude", "mvue", "unstructured"):
        kept = sdgp.prune_nm(torch.tensor([9e9, nan, -inf, 1e38]), 2, 4, method=method)
        assert kept[1].isnan()
        assert kept.tolist()[2] == -inf
        assert kept[0] == 0 == kept[3]
    for method in METHODS:
        if method != "random":
            assert not sdgp.prune_nm(torch.tensor([1.0, nan, 2.0, 3.0]), 1, 4, method=method)[1].isfinite()
            assert not sdgp.prune_nm(torch.tensor([1.0, inf, 2.0, 3.0]), 1, 4, method=method)[1].isfinite()


@pytest.mark.parametrize("method", ["mvue", "rescale_group"])
def test_a_signalling_nan_of_float16_counts_as_the_quiet_one(method: str) -> None:
    x = torch.tensor([0x7C03, 0x7E02], dtype=torch.int16).view(torch.float16)
    assert sdgp.prune_nm(x, 1, 2, method=method).isnan().tolist() == [True, False]


@pytest.mark.parametrize("method", FIXED_METHODS)
def test_tail_keeps_n_or_its_length(method: str) -> None:
    pruned = sdgp.prune_nm(torch.rand(1000, 11) + 1, 4, 8, method=method)
    assert ((pruned[:, 8:] != 0).sum(1) == 3).all()
    pruned = sdgp.prune_nm(torch.rand(1000, 11) + 1, 2, 8, method=method)
    assert ((pruned[:, 8:] != 0).sum(1) <= 2).all()


@pytest.mark.parametrize("method", METHODS)
def test_n_equal_m_is_the_identity(method: str) -> None:
    x = torch.randn(3, 10)
    before = torch.get_rng_state()
    result = torch.ops.sdgp.prune_nm(x, 4, 4, -1, method)
    assert torch.equal(result, x)
    assert result.data_ptr() != x.data_ptr()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["random", "mvue", "unstructured"])
def test_manual_seed_reproduces(method: str) -> None:
    x = torch.randn(64, 64)
    for draw in (sdgp.prune_nm, torch.ops.sdgp.prune_nm):
        torch.manual_seed(5)
        first = draw(x, 2, 4, -1, method)
        second = draw(x, 2, 4, -1, method)
        torch.manual_seed(5)
        assert torch.equal(draw(x, 2, 4, -1, method), first)
        assert not torch.equal(first, second)


@pytest.mark.parametrize("method", ["magnitude", "rescale", "rescale_group"])
def test_deterministic_methods_leave_the_generator_alone(method: str) -> None:
    before = torch.get_rng_state()
    sdgp.prune_nm(torch.randn(8, 8, generator=torch.Generator()), 2, 4, method=method)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("method", METHODS)
def test_threads_do_not_change_the_result(method: str) -> None:
    tensors = (torch.randn(300, 1030), torch.randn(4, 256, 17, 17), torch.randn(3, 700, 260))
    seed = draw_seed()
    for x, dim in zip(tensors, (-1, 1, -1), strict=True):
        with_two = sdgp.prune_nm(x, 3, 8, dim, method, seed)
        torch.set_num_threads(1)
        assert torch.equal(sdgp.prune_nm(x, 3, 8, dim, method, seed), with_two)
        torch.set_num_threads(2)

# SPDX-License-Identifier: BSD-3-Clause
"""Tests the distribution of what the random methods draw.

Draws must give every subset equally often, be unbiased with the least variance, and depend only on the seed. Seeds are
fixed, so a test always passes or always fails. Chance would exceed the limits once in 10^4 to 10^5 times.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from samples import DTYPES
from torch import Tensor

import sdgp

DRAWS = 10**6


def seed(value: int) -> Tensor:
    return torch.tensor([value])


def subsets(n: int, m: int, value: int, groups: int = DRAWS) -> Tensor:
    """Returns the index of the subset that each group keeps, out of C(m, n) subsets."""
    kept = sdgp.prune_nm(torch.ones(groups, m), n, m, method="random", seed=seed(value)) != 0
    codes = (kept * 2 ** torch.arange(m)).sum(1)
    index = torch.full((2**m,), -1)
    for number, subset in enumerate(itertools.combinations(range(m), n)):
        index[sum(2**i for i in subset)] = number
    return index[codes]


def looks_uniform(counts: Tensor) -> bool:
    """Says whether Pearson's chi-squared of equal cells is below its 1 - 10^-4 quantile (Wilson and Hilferty)."""
    expected = counts.double().mean()
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.numel() - 1
    spread = 2 / (9 * freedom)
    return chi_squared < freedom * (1 - spread + 3.72 * spread**0.5) ** 3


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 5), (2, 8), (4, 8), (7, 9)])
def test_random_draws_every_subset_equally(n: int, m: int) -> None:
    found = subsets(n, m, 1)
    assert found.min() >= 0
    assert looks_uniform(found.bincount())


@pytest.mark.parametrize(("n", "tail"), [(2, 3), (1, 2), (2, 5)])
def test_random_draws_equally_in_a_tail(n: int, tail: int) -> None:
    kept = sdgp.prune_nm(torch.ones(10**5, 8 + tail), n, 8, method="random", seed=seed(1))[:, 8:] != 0
    found = (kept * 2 ** torch.arange(tail)).sum(1).bincount()
    assert int((found > 0).sum()) == len(list(itertools.combinations(range(tail), n)))
    assert looks_uniform(found[found > 0])


def test_the_check_sees_a_bias_of_two_percent() -> None:
    counts = subsets(2, 4, 1).bincount()
    counts[0] += counts[0] // 50
    assert not looks_uniform(counts)


def pairs(first: Tensor, second: Tensor, count: int) -> Tensor:
    return (first * count + second).bincount(minlength=count * count)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 16, 64, 1024, 2**16])
def test_groups_are_independent(lag: int) -> None:
    found = subsets(2, 4, 3)
    assert looks_uniform(pairs(found[:-lag], found[lag:], 6))


@pytest.mark.parametrize(
    ("one", "other"), [(0, 1), (1, 2), (41, 42), (7, 7 + 2**32), (5, 5 + 2**62), (9, -9), (0, -1), (3, 2**31 + 3)]
)
def test_seeds_are_independent(one: int, other: int) -> None:
    assert looks_uniform(pairs(subsets(2, 4, one), subsets(2, 4, other), 6))


@pytest.mark.parametrize("lag", [-2, -1, 1, 2])
def test_a_seed_is_no_offset_into_another_ones_groups(lag: int) -> None:
    one, other = subsets(2, 4, 11), subsets(2, 4, 12)
    assert looks_uniform(pairs(one, other.roll(lag), 6))


def test_over_many_seeds_one_group_draws_equally() -> None:
    found = torch.stack([subsets(2, 4, value, groups=8) for value in range(4000)])
    for group in range(8):
        assert looks_uniform(found[:, group].bincount())


def keeping_probabilities(values: Tensor, n: int) -> Tensor:
    """Returns min(1, c |x|) with the c for which the probabilities sum to n."""
    low, high = 0.0, 1e9
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if (c * values.abs()).clamp(max=1).sum() < n else (low, c)
    return (c * values.abs()).clamp(max=1)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (4, 8), (3, 7), (4, 32), (16, 32)])
def test_mvue_is_unbiased_with_the_least_variance(n: int, m: int) -> None:
    group = torch.randn(m, dtype=torch.float64)
    x = group.float()
    drawn = sdgp.prune_nm(x.expand(DRAWS, -1), n, m, method="mvue", seed=seed(5))
    probability = keeping_probabilities(group, n)
    # The drawn value is x / p with probability p, else 0.
    variance = group.square() * (1 / probability - 1)
    error = (drawn.double().mean(0) - group).abs()
    assert (error <= 4 * (variance / DRAWS).sqrt() + 1e-6 * group.abs()).all()
    kept = (drawn != 0).double().mean(0)
    assert ((kept - probability).abs() <= 4 * (probability * (1 - probability) / DRAWS).sqrt() + 1e-6).all()
    torch.testing.assert_close(drawn.double().var(0), variance, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 7), (4, 32), (16, 32)])
def test_unstructured_is_unbiased(n: int, m: int) -> None:
    group = torch.randn(m, dtype=torch.float64)
    drawn = sdgp.prune_nm(group.float().expand(DRAWS, -1), n, m, method="unstructured", seed=seed(5)).double()
    step = drawn[:, group.abs().argmin()].abs().max()  # what an element below the step becomes, if it stays
    variance = group.abs() * (step - group.abs()).clamp(min=0)
    assert ((drawn.mean(0) - group).abs() <= 4 * (variance / DRAWS).sqrt() + 1e-6 * group.abs()).all()
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.03, atol=1e-6)
    torch.testing.assert_close((drawn != 0).double().mean(), torch.tensor(n / m).double(), rtol=0.01, atol=0)


@pytest.mark.parametrize("method", ["mvue", "unstructured"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (4, 32)])
def test_unbiased_in_every_dtype(n: int, m: int, dtype: torch.dtype, method: str) -> None:
    group = torch.randn(2 * m + m // 2).to(dtype)  # with a remainder
    draws = 40_000
    total = sdgp.prune_nm(group.expand(draws, -1), n, m, method=method).double()
    # Chance is bounded by the standard error of each mean. Rounding the kept value adds the dtype's own error.
    error = (total.mean(0) - group.double()).abs()
    assert (error <= 4 * total.std(0) / draws**0.5 + torch.finfo(dtype).eps * total.abs().amax(0) + 1e-12).all()


@pytest.mark.parametrize("method", ["mvue", "unstructured"])
def test_groups_are_drawn_independently(method: str) -> None:
    x = torch.tensor([3.0, 1.0, 2.0, 1.5]).expand(DRAWS, -1)
    kept = (sdgp.prune_nm(x, 2, 4, method=method, seed=seed(6)) != 0).double()
    centered = kept - kept.mean(0)
    for lag in (1, 2, 8, 1024):
        correlation = (centered[:-lag].t() @ centered[lag:]) / DRAWS / torch.outer(kept.std(0), kept.std(0))
        assert correlation.abs().max() < 4.5 / DRAWS**0.5


PROGRAM = """
import hashlib, sys, torch, sdgp
torch.set_num_threads(int(sys.argv[1]))
x = torch.randn(64, 96, 33, generator=torch.Generator().manual_seed(0))
digest = hashlib.sha256()
for method in ("random", "mvue", "unstructured"):
    torch.manual_seed(7)
    for dim, m in ((0, 4), (1, 8), (2, 32), (1, 5)):
        digest.update(sdgp.prune_nm(x, 2, m, dim, method).contiguous().numpy().tobytes())
print(digest.hexdigest())
"""


def test_draws_are_the_same_in_every_process_with_every_number_of_threads() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(threads)],
            env={**os.environ, "PYTHONHASHSEED": str(threads)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in (1, 2, 7)
    }
    assert len(digests) == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available() and not os.environ.get("REQUIRE_CUDA"), reason="needs a GPU")
@pytest.mark.parametrize("method", ["random", "mvue", "unstructured"])
def test_draws_are_the_same_on_a_gpu(method: str) -> None:
    x = torch.randn(64, 96, 33)
    for n, m in ((1, 2), (2, 4), (3, 5), (4, 32)):
        drawn = sdgp.prune_nm(x.cuda(), n, m, 1, method, seed(8).cuda())
        assert torch.equal(drawn.cpu(), sdgp.prune_nm(x, n, m, 1, method, seed(8)))

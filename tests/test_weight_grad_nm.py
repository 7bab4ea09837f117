# SPDX-License-Identifier: BSD-3-Clause
"""The weight gradients' products: against the reference in float64, within the error that their dtype allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import INSTRUCTION_SETS, identical, near, rerun
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DTYPES, PATTERNS, draw_seed
from torch import Tensor

from sdgp import reference
from sdgp._ops import conv2d_weight_grad_nm, prune_nm, prune_nm_matmul

SOME_PATTERNS = ((2, 4), (8, 16), (1, 2), (3, 7), (4, 4), (4, 32), (31, 64), (2, 24))
BY_GROUP = ("magnitude", "random", "rescale_group", "mvue")


def linear(grad: Tensor, x: Tensor, n: int, m: int, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """The weight gradient, the exact one of what was pruned, and that of the magnitudes."""
    seed = draw_seed()
    pruned = prune_nm(grad.t(), n, m, -1, method, seed).double()
    return prune_nm_matmul(grad.t(), x, n, m, method, seed), pruned @ x.double(), pruned.abs() @ x.double().abs()


def convolution(grad: Tensor, x: Tensor, n: int, m: int, method: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    seed = draw_seed()
    actual = conv2d_weight_grad_nm(grad, x, n, m, method, seed, *arguments)
    pruned = prune_nm(grad.flatten(2), n, m, -1, method, seed).view(grad.shape).double()
    exact, magnitude = (
        reference.conv2d_weight_grad_nm(g, i, m, m, "magnitude", None, *arguments)
        for g, i in ((pruned, x.double()), (pruned.abs(), x.double().abs()))
    )
    return actual, exact, magnitude


def image(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    result = torch.randn(shape).to(dtype)
    if layout == "channels_last":
        return result.contiguous(memory_format=torch.channels_last)
    return result.repeat_interleave(2, -1)[..., ::2] if layout == "every other column" else result


LAYOUTS = ("contiguous", "channels_last", "every other column")


def test_by_hand() -> None:
    grad = torch.tensor([[3.0], [-1.0], [0.5], [-4.0]])  # four tokens, one output feature
    x = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]])
    assert prune_nm_matmul(grad.t(), x, 2, 4).tolist() == [[-13, -130]]
    pixels: Any = (grad.view(1, 1, 2, 2), x.t().reshape(1, 2, 2, 2), 2, 4, "magnitude", None)
    window: Any = ([1, 1], [1, 1], [0, 0], [1, 1], 1, False)
    assert conv2d_weight_grad_nm(*pixels, *window).flatten().tolist() == [-13, -130]
    assert reference.conv2d_weight_grad_nm(*pixels, *window).flatten().tolist() == [-13, -130]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: "{}:{}".format(*pattern))
def test_linear(pattern: tuple[int, int], dtype: torch.dtype) -> None:
    # Long reductions, several panels, few rows, a tail.
    for method in BY_GROUP:
        for tokens, features_in, features_out in ((2100, 33, 70), (130, 300, 20), (7, 1, 2)):
            grad, x = torch.randn(tokens, features_out).to(dtype), torch.randn(tokens, features_in).to(dtype)
            near(*linear(grad, x, *pattern, method), tokens)


def test_linear_of_many_features() -> None:
    grad, x = torch.randn(260, 1700), torch.randn(260, 300)
    near(*linear(grad, x, 4, 16, "mvue"), 260)
    near(*linear(grad, torch.randn(300, 260).t()[:, ::2], 4, 16, "mvue"), 260)


@settings(max_examples=150)
@given(
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    groups=st.integers(1, 3),
    per_group=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    samples=st.integers(1, 5),
    spare=st.tuples(st.integers(0, 9), st.integers(0, 40)),
    dtype=st.sampled_from(DTYPES),
    pattern=st.sampled_from(SOME_PATTERNS),
    method=st.sampled_from(BY_GROUP),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    channels_last=st.booleans(),
)
def test_convolution(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    per_group: tuple[int, int],
    samples: int,
    spare: tuple[int, int],
    dtype: torch.dtype,
    pattern: tuple[int, int],
    method: str,
    layouts: tuple[str, str],
    channels_last: bool,
) -> None:
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [max(r - 2 * p, 1) + s for r, p, s in zip(reach, padding, spare, strict=True)]
    out = [(i + 2 * p - r) // s + 1 for i, p, r, s in zip(size, padding, reach, stride, strict=True)]
    x = image((samples, groups * per_group[0], *size), dtype, layouts[0])
    grad = image((samples, groups * per_group[1], *out), dtype, layouts[1])
    window = (kernel, stride, padding, dilation, groups, channels_last)
    actual, exact, magnitude = convolution(grad, x, *pattern, method, *window)
    assert actual.shape == exact.shape
    assert actual.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    near(actual, exact, magnitude, samples * out[0] * out[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("samples", "channels", "size", "kernel", "stride"),
    [
        (40, (20, 30), (4, 4), 3, 1),  # several samples a block
        (2, (70, 33), (3, 150), 3, 1),  # lines longer than a block
        (2, (16, 20), (64, 64), 1, 2),
        (2, (3, 64), (56, 56), 7, 2),
        (1, (300, 800), (9, 9), 3, 1),  # several panels, two chunks
    ],
)
def test_large_convolution(
    samples: int, channels: tuple[int, int], size: tuple[int, int], kernel: int, stride: int, layout: str
) -> None:
    padding = kernel // 2
    out = [(i + 2 * padding - kernel) // stride + 1 for i in size]
    x = image((samples, channels[0], *size), torch.float32, layout)
    grad = image((samples, channels[1], *out), torch.float32, layout)
    window = ([kernel] * 2, [stride] * 2, [padding] * 2, [1, 1], 1, layout == "channels_last")
    near(*convolution(grad, x, 4, 16, "mvue", *window), samples * out[0] * out[1])


def test_convolution_equals_its_reference() -> None:
    grad, x, seed = torch.randn(2, 24, 7, 6), torch.randn(2, 6, 7, 6), draw_seed()
    for groups in (1, 2, 3):
        arguments: tuple[Any, ...] = (grad, x, 2, 4, "mvue", seed, [3, 3], [1, 1], [1, 1], [1, 1], groups, False)
        torch.testing.assert_close(conv2d_weight_grad_nm(*arguments), reference.conv2d_weight_grad_nm(*arguments))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set(isa: str) -> None:
    names = ("by_hand", "linear", "convolution", "large_convolution")
    rerun(isa, *(f"{__file__}::test_{name}" for name in names))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_the_result(dtype: torch.dtype) -> None:
    grad, x, seed = torch.randn(300, 700).to(dtype), torch.randn(300, 390).to(dtype), draw_seed()
    images = torch.randn(3, 70, 17, 17).to(dtype), torch.randn(3, 40, 17, 17).to(dtype)
    window: Any = (2, 8, "mvue", seed, [3, 3], [1, 1], [1, 1], [1, 1], 1, False)
    linear_with_two = prune_nm_matmul(grad.t(), x, 2, 8, "mvue", seed)
    conv2d_with_two = conv2d_weight_grad_nm(*images, *window)
    torch.set_num_threads(1)
    identical(prune_nm_matmul(grad.t(), x, 2, 8, "mvue", seed), linear_with_two)
    identical(conv2d_weight_grad_nm(*images, *window), conv2d_with_two)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_groups_that_keep_fewer(zero: float) -> None:
    grad, x = torch.full((64, 20), zero), torch.randn(64, 33)
    grad[::9] = 1.0
    near(*linear(grad, x, 8, 16, "magnitude"), 64)
    assert torch.equal(prune_nm_matmul(torch.full((64, 20), zero).t(), x, 8, 16), torch.zeros(20, 33))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_not_finite_values_reach_their_row_alone(bad: float) -> None:
    grad, x = torch.randn(64, 20), torch.rand(64, 33) + 1
    grad[5, 3] = bad
    actual = prune_nm_matmul(grad.t(), x, 2, 4, "mvue", draw_seed())
    assert not actual[3].isfinite().any()
    assert actual[torch.arange(20) != 3].isfinite().all()


@pytest.mark.parametrize(
    ("grad", "x"),
    [((0, 4, 5, 5), (0, 3, 7, 7)), ((2, 0, 5, 5), (2, 3, 7, 7)), ((2, 4, 5, 5), (2, 0, 7, 7))],
)
def test_empty_convolutions(grad: tuple[int, ...], x: tuple[int, ...]) -> None:
    window: Any = (2, 4, "mvue", draw_seed(), [3, 3], [1, 1], [0, 0], [1, 1], 1, False)
    actual = conv2d_weight_grad_nm(torch.randn(grad), torch.randn(x), *window)
    identical(actual, torch.zeros(grad[1], x[1], 3, 3))


def test_empty_linear() -> None:
    identical(prune_nm_matmul(torch.randn(0, 5).t(), torch.randn(0, 3), 2, 4), torch.zeros(5, 3))
    assert prune_nm_matmul(torch.randn(8, 5).t(), torch.randn(8, 0), 2, 4).shape == (5, 0)


def test_the_generator_gives_the_seed() -> None:
    grad, x = torch.randn(2, 8, 6, 6), torch.randn(2, 4, 6, 6)
    window: Any = ([3, 3], [1, 1], [1, 1], [1, 1], 1, False)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(conv2d_weight_grad_nm(grad, x, 2, 4, "mvue", None, *window))
    identical(results[0], results[1])
    assert not torch.equal(results[0], results[2])

# SPDX-License-Identifier: BSD-3-Clause
"""Helpers to compare with the reference, take gradients, draw tensors and rerun tests with another instruction set."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import sdgp


def same(actual: Tensor, expected: Tensor) -> None:
    """Checks that tensors are equal bit for bit, except for the sign of zeros and NaNs."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    kept = (actual != 0) & ~actual.isnan()
    assert torch.equal(actual.signbit() & kept, expected.signbit() & kept)


def identical(actual: Tensor, expected: Tensor) -> None:
    """Checks that tensors are equal bit for bit, with the same strides."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    assert torch.equal(*(x.contiguous().view(integer) for x in (actual, expected)))
    for size, stride, wanted in zip(actual.shape, actual.stride(), expected.stride(), strict=True):
        assert stride == wanted or size == 1 or actual.numel() == 0


def same_as_reference(actual: Tensor, expected: Tensor, method: str) -> None:
    if method != "rescale":
        same(actual, expected)
        return
    # The sums have no fixed order: positions must agree exactly, values up to rounding.
    assert torch.equal(actual == 0, expected == 0)
    torch.testing.assert_close(
        actual, expected, atol=0, rtol=max(1e-5, 2 * torch.finfo(actual.dtype).eps), equal_nan=True
    )


def near(actual: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """Checks the rounding error of a sum of ``terms`` products that is rounded once to the result's dtype.

    ``exact`` is the float64 result. ``magnitude`` is the same product of absolute values.
    """
    accumulator = torch.float64 if actual.dtype == torch.float64 else torch.float32
    error = (actual.double() - exact).abs()
    precision = torch.finfo(accumulator)
    bound = (terms + 2) * precision.eps * (magnitude + precision.smallest_normal)  # subnormal sums also round
    if actual.dtype != accumulator:
        bound = (
            bound + torch.finfo(actual.dtype).eps / 2 * exact.abs() * 1.01 + torch.finfo(actual.dtype).smallest_normal
        )
    if actual.dtype == torch.bfloat16 and sdgp._load.C.isa() == "avx512_bf16":
        # This kernel takes subnormal operands as zero. The other operand is below 8 in these tests.
        bound = bound + 8 * terms * torch.finfo(torch.bfloat16).smallest_normal
    assert (error <= bound).all(), (error - bound).max()


@st.composite
def strided_tensors(draw: st.DrawFn) -> Tensor:
    """Draws a tensor of any shape, with permuted and sliced dimensions."""
    shape = draw(st.lists(st.integers(1, 9) | st.sampled_from([16, 31, 64, 70]), min_size=1, max_size=4))
    order = draw(st.permutations(range(len(shape))))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2]), min_size=len(shape), max_size=len(shape)))
    whole = torch.randn([shape[d] * steps[d] for d in order])
    x = whole.permute(*[order.index(d) for d in range(len(shape))])
    return x[tuple(slice(None, None, step) for step in steps)]


def gradients(output: Tensor, grad_output: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(output, [x for x in inputs if x is not None], grad_output))


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(actual.dtype, 2e-2)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class Timer:
    """A fake clock for ``sdgp.Chooser``, which times the sparse product and its rival alternately.

    Attributes:
        count: how often the clock was called.
    """

    def __init__(self, sparse: float, other: float) -> None:
        self.count = 0
        self._milliseconds = itertools.cycle((sparse, other))

    def __call__(self, call: Callable[[], object], device: torch.device) -> float:
        self.count += 1
        call()
        return next(self._milliseconds)


INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
PRODUCT_INSTRUCTION_SETS = (*INSTRUCTION_SETS, "avx512_bf16")  # differs from avx512 only in products


def rerun(isa: str, *tests: str) -> None:
    """Runs tests in a process with the given instruction set. Skips the test if the CPU lacks it."""
    program = "import sdgp, sys; print(sdgp._load.C.isa()); sys.exit(0)"
    environment = {**os.environ, "SDGP_FORCE_ISA": isa}
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    if found.returncode != 0:
        assert "SDGP_FORCE_ISA: expected an instruction set that this CPU runs" in found.stderr
        pytest.skip(f"this CPU does not run {isa}")
    assert found.stdout.strip() == isa
    if isa == sdgp._load.C.isa():
        return  # this process already runs these tests
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout

# SPDX-License-Identifier: BSD-3-Clause
"""The sample inputs that the parity, opcheck, compile, meta, autocast and inference-mode tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

METHODS = ("magnitude", "random", "rescale", "rescale_group", "mvue", "unstructured")
FIXED_METHODS = METHODS[:-1]  # every group keeps n values
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# The patterns of the published tables, 1:2, and some patterns without a compiled kernel.
PATTERNS = (
    (1, 2),
    (2, 4),
    (1, 4),
    (1, 8),
    (2, 8),
    (4, 8),
    (2, 16),
    (4, 16),
    (8, 16),
    (4, 32),
    (8, 32),
    (16, 32),
    (2, 3),
    (3, 7),
    (11, 33),
    (31, 64),
    (1, 64),
    (5, 5),
)


class Sample(NamedTuple):
    name: str
    make: Callable[[], Tensor]  # draws from the global generator
    dim: int


SAMPLES = (
    Sample("vector", lambda: torch.randn(100), -1),
    Sample("one", lambda: torch.randn(1), 0),
    Sample("short", lambda: torch.randn(3), 0),
    Sample("rows", lambda: torch.randn(37, 256), -1),
    Sample("rows_tail", lambda: torch.randn(5, 70), -1),
    Sample("columns", lambda: torch.randn(70, 130), 0),
    Sample("sequence", lambda: torch.randn(2, 33, 128), -1),
    Sample("nchw", lambda: torch.randn(2, 64, 9, 9), 1),
    Sample("nchw_tail", lambda: torch.randn(3, 21, 8, 8), 1),
    Sample("nchw_small", lambda: torch.randn(3, 64, 1, 3), 1),
    Sample("channels_last", lambda: torch.randn(2, 64, 9, 9).contiguous(memory_format=torch.channels_last), 1),
    Sample("channels_last_tail", lambda: torch.randn(2, 21, 5, 5).contiguous(memory_format=torch.channels_last), 1),
    Sample("batch_of_channels_last", lambda: torch.randn(9, 4, 3, 3).to(memory_format=torch.channels_last), 0),
    Sample("transposed", lambda: torch.randn(65, 40).t(), -1),
    Sample("every_other", lambda: torch.randn(6, 80)[:, ::2], -1),
    Sample("expanded", lambda: torch.randn(48, 1).expand(48, 20), 0),
    Sample("expanded_group", lambda: torch.randn(20, 1).expand(20, 48), -1),
    Sample("offset", lambda: torch.randn(1000)[3:903].view(9, 100), -1),
    Sample("five_dims", lambda: torch.randn(2, 3, 16, 3, 2), 2),
    Sample("empty", lambda: torch.randn(4, 0, 3), 1),
    Sample("empty_rows", lambda: torch.randn(0, 8), -1),
    Sample("ties", lambda: torch.randn(16, 96).mul(1.5).round(), -1),
    Sample("zeros", lambda: torch.zeros(8, 32), -1),
    Sample("huge_and_tiny", lambda: torch.randn(16, 64) * torch.logspace(-30, 30, 16).unsqueeze(1), -1),
    Sample("vanishing", lambda: _vanishing(torch.randn(2, 33, 64)), -1),
    Sample("not_finite", lambda: _not_finite(torch.randn(16, 128)), -1),
)


def _vanishing(x: Tensor) -> Tensor:
    """Every fourth channel is kept in one row only, where it is subnormal: all / kept of rescale overflows."""
    x[..., ::4] *= 1e-3
    x[:, 5] = 0
    x[:, 5, ::4] = 1e-42
    return x


def _not_finite(x: Tensor) -> Tensor:
    x[torch.rand_like(x) < 0.03] = torch.nan
    x[torch.rand_like(x) < 0.03] = torch.inf
    x[torch.rand_like(x) < 0.03] = -torch.inf
    x[torch.rand_like(x) < 0.03] = -0.0
    return x


def each_sample(*names: str) -> pytest.MarkDecorator:
    """Parametrizes a test over ``sample``: the named samples, or all of them."""
    chosen = [sample for sample in SAMPLES if not names or sample.name in names]
    return pytest.mark.parametrize("sample", chosen, ids=lambda sample: sample.name)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts to another dtype. Keeps strides and overlap where `to` keeps them."""
    return x if x.dtype == dtype else x.to(dtype)


def draw_seed() -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (1,))

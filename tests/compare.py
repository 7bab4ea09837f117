# SPDX-License-Identifier: BSD-3-Clause
"""How the layers' tests take gradients and compare them."""

from __future__ import annotations

import torch
from torch import Tensor


def gradients(output: Tensor, grad_output: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(output, [x for x in inputs if x is not None], grad_output))


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(actual.dtype, 2e-2)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

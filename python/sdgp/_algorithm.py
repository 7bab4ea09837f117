# SPDX-License-Identifier: BSD-3-Clause
"""Finds the algorithm of cuSPARSELt that multiplies operands of a size fastest, and checks its results.

cuSPARSELt's default is slow for some sizes. Its own search finds a faster algorithm, but some algorithms have returned
wrong results, and not every time (https://github.com/pytorch/pytorch/issues/155333). So another algorithm counts only
if it multiplies random operands of the same size as the default does, again and again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _semi_structured
from ._pattern import Pattern
from ._semi_structured import DEFAULT, Algorithm, Operand

_OPERANDS, _REPEATS = 3, 3


def find_algorithm(operand: Operand, dense: Tensor) -> Algorithm:
    """Returns the algorithm that cuSPARSELt's search finds for ``operand @ dense``, or the default.

    It returns the default if there is no search, or if the found algorithm fails the check. It draws nothing from
    PyTorch's generators.
    """
    try:
        found = _semi_structured.search(operand, dense)
        return found if found == DEFAULT or _passes_check(found, operand, dense) else DEFAULT
    except RuntimeError:  # the library refuses this size, or there is no memory for the check
        return DEFAULT


def _passes_check(algorithm: Algorithm, operand: Operand, dense: Tensor) -> bool:
    generator = torch.Generator(dense.device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=dense.device, dtype=dense.dtype, generator=generator)

    for _ in range(_OPERANDS):
        matrix, factor = random(operand.rows, operand.cols), random(*dense.shape)
        packed = _semi_structured.pack(matrix, Pattern(2, 4), "magnitude")
        expected = _semi_structured.multiply(packed, factor).float()
        order = _error_of_order(matrix, factor)
        for _ in range(_REPEATS):
            actual = _semi_structured.multiply(packed, factor, algorithm).float()
            rounding = torch.finfo(dense.dtype).eps / 2 * (actual.abs() + expected.abs())
            if not bool(((actual - expected).abs() <= rounding + order).all()):  # a NaN fails, too
                return False
    return True


def _error_of_order(matrix: Tensor, factor: Tensor) -> Tensor:
    """Returns how far the sums of ``matrix @ factor`` in float32 may differ if they add in another order.

    A sum of K terms a b errs by at most about sqrt(K) eps |a| |b|, with the norms of the row and of the column.
    """
    relative = 2 * math.sqrt(matrix.shape[1]) * torch.finfo(torch.float32).eps
    return relative * torch.outer(matrix.float().norm(dim=1), factor.float().norm(dim=0))

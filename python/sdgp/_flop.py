# SPDX-License-Identifier: BSD-3-Clause
"""Registers what FlopCounterMode counts for the ops: the multiplications and additions of products.

Pruning and packing have none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import _load as _load  # registers the ops


def _kept(size: int, n: int, m: int) -> int:
    """Returns how many of the ``size`` values of a row a sparse product multiplies."""
    return size // m * n + min(size % m, n)


def _no_flop(*args: Any, **kwargs: Any) -> int:
    return 0


def _matmul_flop(input: Sequence[int], dense: Sequence[int], n: int, m: int, *_: Any, **__: Any) -> int:
    return 2 * math.prod(input[:-1]) * _kept(input[-1], n, m) * dense[1]


def _spmm_flop(values: Sequence[int], indices: Sequence[int], m: int, dense: Sequence[int], **_: Any) -> int:
    return 2 * math.prod(values) * dense[1]


def _conv2d_flop(grad_output: Sequence[int], weight: Sequence[int], n: int, m: int, *args: Any, **_: Any) -> int:
    groups = args[6]
    samples, out, height, width = grad_output
    kept = groups * _kept(out // groups, n, m)
    return 2 * samples * height * width * int(kept) * math.prod(weight[1:])


def _conv2d_weight_flop(
    grad_output: Sequence[int],
    input: Sequence[int],
    n: int,
    m: int,
    method: str,
    seed: Any,
    kernel_size: Sequence[int],
    *args: Any,
    **_: Any,
) -> int:
    groups = args[3]
    samples, out, height, width = grad_output
    kept = out * _kept(height * width, n, m)
    return 2 * samples * int(kept) * input[1] // int(groups) * math.prod(kernel_size)


for _name, _formula in {
    "prune_nm": _no_flop,
    "_prune_nm_scale": _no_flop,
    "compress_nm": _no_flop,
    "decompress_nm": _no_flop,
    "_pack_24": _no_flop,
    "spmm_nm": _spmm_flop,
    "_prune_nm_matmul": _matmul_flop,
    "_conv2d_input_grad_nm": _conv2d_flop,
    "_conv2d_weight_grad_nm": _conv2d_weight_flop,
}.items():
    register: Any = register_flop_formula(getattr(torch.ops.sdgp, _name))
    register(_formula)

# SPDX-License-Identifier: BSD-3-Clause
"""The shapes, strides and dtypes of what the compressing ops return, for fake and meta tensors.

In Python, because the stable ABI reads no symbolic sizes; prune_nm needs none of them and has its own in C++.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from . import _load as _load  # registers the ops
from .pattern import MAX_GROUP_SIZE

_Shape = TypeVar("_Shape", bound=Callable[..., object])


def _fake(op: str) -> Callable[[_Shape], _Shape]:
    register: Callable[[_Shape], _Shape] = torch.library.register_fake(f"sdgp::{op}")
    return register


def _ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def _empty_innermost(like: Tensor, dim: int, size: int, dtype: torch.dtype) -> Tensor:
    shape = list(like.shape)
    del shape[dim]
    return like.new_empty(*shape, size, dtype=dtype).movedim(-1, dim)


@_fake("compress_nm")
def _compress_nm(
    input: Tensor, n: int, m: int, dim: int = -1, method: str = "magnitude", seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check(1 <= n <= m <= MAX_GROUP_SIZE, f"compress_nm: expected 1 <= n <= m <= {MAX_GROUP_SIZE}, got n={n}, m={m}")
    _check_dim("compress_nm", input, dim)
    kept = _ceil_div(input.shape[dim], m) * n
    dim %= input.ndim
    return _empty_innermost(input, dim, kept, input.dtype), _empty_innermost(input, dim, kept, torch.uint8)


@_fake("decompress_nm")
def _decompress_nm(values: Tensor, indices: Tensor, m: int, size: int, dim: int = -1) -> Tensor:
    _check_dim("decompress_nm", values, dim)
    return _empty_innermost(values, dim % values.ndim, size, values.dtype)


@_fake("spmm_nm")
def _spmm_nm(values: Tensor, indices: Tensor, m: int, dense: Tensor) -> Tensor:
    _check(dense.ndim == 2, f"spmm_nm: expected dense (size, cols), got {tuple(dense.shape)}")
    _check(
        dense.dtype == values.dtype,
        f"spmm_nm: expected dense to be {_name(values)} as the values are, got {_name(dense)}",
    )
    return values.new_empty(*values.shape[:-1], dense.shape[1])


@_fake("_conv2d_input_grad_nm")
def _conv2d_input_grad_nm(
    values: Tensor,
    indices: Tensor,
    m: int,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    out = weight.shape[0] // groups
    samples = values.shape[0] // groups if groups > 1 and out % m != 0 else values.shape[0]
    channels = weight.shape[1] * groups
    if channels_last:
        return values.new_empty(samples, *input_size, channels).movedim(-1, 1)
    return values.new_empty(samples, channels, *input_size)


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(message)


def _check_dim(op: str, tensor: Tensor, dim: int) -> None:
    ndim = tensor.ndim
    _check(ndim >= 1, f"{op}: expected at least 1 dimension, got a scalar")
    _check(-ndim <= dim < ndim, f"{op}: expected dim in [{-ndim}, {ndim - 1}], got {dim}")


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

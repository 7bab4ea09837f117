# SPDX-License-Identifier: BSD-3-Clause
"""The shapes, strides and dtypes of the results of the ops, for fake and meta tensors.

They are in Python because the stable ABI cannot compute with symbolic sizes. prune_nm needs no arithmetic, so its fake
is in C++. The fakes check only what the shape and dtype of a result depend on. The real ops check everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ._load import C

_Shape = TypeVar("_Shape", bound=Callable[..., object])


def _fake(op: str) -> Callable[[_Shape], _Shape]:
    register: Callable[[_Shape], _Shape] = torch.library.register_fake(f"sdgp::{op}")
    return register


@_fake("compress_nm")
def _compress_nm(
    input: Tensor, n: int, m: int, dim: int = -1, method: str = "magnitude", seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_device("compress_nm", "seed", seed, input)
    _check_pattern("compress_nm", n, m)
    kept = _ceil_div(input.shape[dim], m) * n
    return _empty_innermost(input, dim, kept, input.dtype), _empty_innermost(input, dim, kept, torch.uint8)


@_fake("decompress_nm")
def _decompress_nm(values: Tensor, indices: Tensor, m: int, size: int, dim: int = -1) -> Tensor:
    _check_indices("decompress_nm", indices, values)
    return _empty_innermost(values, dim, size, values.dtype)


@_fake("spmm_nm")
def _spmm_nm(values: Tensor, indices: Tensor, m: int, dense: Tensor) -> Tensor:
    _check_indices("spmm_nm", indices, values)
    _check_matrix("spmm_nm", "dense", dense, values)
    return values.new_empty(*values.shape[:-1], dense.shape[1])


@_fake("_prune_nm_matmul")
def _prune_nm_matmul(
    input: Tensor, dense: Tensor, n: int, m: int, method: str = "magnitude", seed: Tensor | None = None
) -> Tensor:
    _check_device("_prune_nm_matmul", "seed", seed, input)
    _check_pattern("_prune_nm_matmul", n, m)
    _check_matrix("_prune_nm_matmul", "dense", dense, input)
    _check_shape("_prune_nm_matmul", "dense", dense, (input.shape[-1], dense.shape[1]))
    return input.new_empty(*input.shape[:-1], dense.shape[1])


@_fake("_conv2d_input_grad_nm")
def _conv2d_input_grad_nm(
    grad_output: Tensor,
    weight: Tensor,
    n: int,
    m: int,
    method: str,
    seed: Tensor | None,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    _check_device("_conv2d_input_grad_nm", "seed", seed, grad_output)
    _check_pattern("_conv2d_input_grad_nm", n, m)
    _check_dtype("_conv2d_input_grad_nm", "weight", weight, grad_output)
    _check_shape("_conv2d_input_grad_nm", "weight", weight, (grad_output.shape[1], *weight.shape[1:]))
    samples, channels = grad_output.shape[0], weight.shape[1] * groups
    if channels_last:
        return grad_output.new_empty(samples, *input_size, channels).movedim(-1, 1)
    return grad_output.new_empty(samples, channels, *input_size)


@_fake("_conv2d_weight_grad_nm")
def _conv2d_weight_grad_nm(
    grad_output: Tensor,
    input: Tensor,
    n: int,
    m: int,
    method: str,
    seed: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    _check_device("_conv2d_weight_grad_nm", "seed", seed, grad_output)
    _check_pattern("_conv2d_weight_grad_nm", n, m)
    _check_dtype("_conv2d_weight_grad_nm", "input", input, grad_output)
    _check_shape("_conv2d_weight_grad_nm", "input", input, (grad_output.shape[0], *input.shape[1:]))
    out, channels = grad_output.shape[1], input.shape[1] // groups
    if channels_last:
        return grad_output.new_empty(out, *kernel_size, channels).movedim(-1, 1)
    return grad_output.new_empty(out, channels, *kernel_size)


@_fake("_pack_24")
def _pack_24(
    input: Tensor,
    n: int,
    m: int,
    method: str = "magnitude",
    seed: Tensor | None = None,
    layout: str = "cusparselt_sm80",
) -> Tensor:
    rows, cols = (_ceil_div(size, tile) * tile for size, tile in zip(input.shape, C.tile_24, strict=True))
    return input.new_empty(rows * cols // 16 * 9)


def _ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def _empty_innermost(like: Tensor, dim: int, size: int, dtype: torch.dtype) -> Tensor:
    """Returns a tensor like ``like``, except ``size`` along ``dim``, which is innermost in memory."""
    shape = list(like.shape)
    del shape[dim]
    return like.new_empty(*shape, size, dtype=dtype).movedim(-1, dim)


def _check_pattern(op: str, n: int, m: int) -> None:
    if not 1 <= n <= m <= C.max_group_size:
        raise RuntimeError(f"{op}: expected 1 <= n <= m <= {C.max_group_size}, got n={n}, m={m}")


def _check_indices(op: str, indices: Tensor, values: Tensor) -> None:
    _check_device(op, "indices", indices, values)
    _check_shape(op, "indices", indices, values.shape)
    if indices.dtype != torch.uint8:
        raise RuntimeError(f"{op}: expected indices to be uint8, got {str(indices.dtype).removeprefix('torch.')}")


def _check_matrix(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.ndim != 2:
        raise RuntimeError(f"{op}: expected {name} to be a matrix, got {tuple(tensor.shape)}")
    _check_dtype(op, name, tensor, like)


def _check_shape(op: str, name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise RuntimeError(f"{op}: expected {name} {tuple(expected)}, got {tuple(tensor.shape)}")


def _check_device(op: str, name: str, tensor: Tensor | None, like: Tensor) -> None:
    """Raises an error if only some arguments are on the meta device: PyTorch then calls the fake."""
    if tensor is not None and tensor.device != like.device:
        raise RuntimeError(f"{op}: expected {name} on the same device ({like.device}), got {tensor.device}")


def _check_dtype(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    _check_device(op, name, tensor, like)
    if tensor.dtype != like.dtype:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (like.dtype, tensor.dtype)]
        raise RuntimeError(f"{op}: expected {name} to be {dtypes[0]}, got {dtypes[1]}")

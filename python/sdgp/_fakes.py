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
from .pattern import MAX_GROUP_SIZE, METHODS, Pattern

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
    _check_prune("compress_nm", input, n, m, dim, method, seed)
    kept = _ceil_div(input.shape[dim], m) * n
    dim %= input.ndim
    return _empty_innermost(input, dim, kept, input.dtype), _empty_innermost(input, dim, kept, torch.uint8)


@_fake("decompress_nm")
def _decompress_nm(values: Tensor, indices: Tensor, m: int, size: int, dim: int = -1) -> Tensor:
    _check_dim("decompress_nm", values, dim)
    _check_compressed("decompress_nm", values, indices, m, size, dim)
    return _empty_innermost(values, dim % values.ndim, size, values.dtype)


@_fake("spmm_nm")
def _spmm_nm(values: Tensor, indices: Tensor, m: int, dense: Tensor) -> Tensor:
    op = "spmm_nm"
    _check(dense.ndim == 2, f"{op}: expected dense (size, cols), got {tuple(dense.shape)}")
    _check_dim(op, values, -1)
    _check_compressed(op, values, indices, m, dense.shape[0], -1)
    _check_like(op, values, "dense", dense)
    return values.new_empty(*values.shape[:-1], dense.shape[1])


@_fake("_linear_input_grad_nm")
def _linear_input_grad_nm(
    grad_output: Tensor, weight: Tensor, n: int, m: int, method: str = "magnitude", seed: Tensor | None = None
) -> Tensor:
    op = "_linear_input_grad_nm"
    _check_gradient(op, grad_output, weight, n, m, -1, method, seed)
    _check(weight.ndim == 2, f"{op}: expected weight (out, in), got {tuple(weight.shape)}")
    out, columns = weight.shape
    _check(grad_output.shape[-1] == out, f"{op}: expected grad_output (..., {out}), got {tuple(grad_output.shape)}")
    return grad_output.new_empty(*grad_output.shape[:-1], columns)


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
    op = "_conv2d_input_grad_nm"
    shape = tuple(grad_output.shape)
    _check(grad_output.ndim == 4, f"{op}: expected grad_output (N, C, H, W), got {shape}")
    _check_gradient(op, grad_output, weight, n, m, 1, method, seed)
    _check(weight.ndim == 4, f"{op}: expected weight (out, in / groups, kH, kW), got {tuple(weight.shape)}")
    out, channels_in = weight.shape[:2]
    _check(grad_output.shape[1] == out, f"{op}: expected grad_output (N, {out}, H, W), got {shape}")
    _check(groups >= 1 and out % groups == 0, f"{op}: expected groups that divide {out} output channels, got {groups}")
    pairs = (("input_size", input_size, 0), ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    for axis in range(2):
        for name, pair, least in pairs:
            _check(len(pair) == 2, f"{op}: expected {name} to be a pair, got {len(pair)} numbers")
            _check(pair[axis] >= least, f"{op}: expected {name} >= {least}, got {pair[axis]}")
    samples = grad_output.shape[0]
    if channels_last:
        return grad_output.new_empty(samples, *input_size, channels_in * groups).movedim(-1, 1)
    return grad_output.new_empty(samples, channels_in * groups, *input_size)


@_fake("_pack_24")
def _pack_24(
    input: Tensor,
    n: int,
    m: int,
    method: str = "magnitude",
    seed: Tensor | None = None,
    layout: str = "cusparselt_sm80",
) -> Tensor:
    op = "_pack_24"
    _check_prune(op, input, n, m, -1, method, seed)
    _check(input.ndim == 2, f"{op}: expected a matrix, got {tuple(input.shape)}")
    _check(input.dtype in (torch.float16, torch.bfloat16), f"{op}: expected float16 or bfloat16, got {_name(input)}")
    _check(
        Pattern(n, m).fits_24,
        f"{op}: expected n <= 2 and m a multiple of 4, or 1:2, got {n}:{m}",
    )
    layouts = ("cusparselt_sm80", "cusparselt_sm90", "cutlass_sm80")
    expected = "expected layout to be cusparselt_sm80, cusparselt_sm90 or cutlass_sm80"
    _check(layout in layouts, f'{op}: {expected}, got "{layout}"')
    rows, cols = (_ceil_div(size, tile) * tile for size, tile in zip(input.shape, (128, 64), strict=True))
    return input.new_empty(rows * cols // 16 * 9)


# The requirements of cpp/checks.h, as far as a tensor without data can break them.

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(message)


def _check_prune(op: str, input: Tensor, n: int, m: int, dim: int, method: str, seed: Tensor | None) -> None:
    _check(1 <= n <= m <= MAX_GROUP_SIZE, f"{op}: expected 1 <= n <= m <= {MAX_GROUP_SIZE}, got n={n}, m={m}")
    _check(method in METHODS, f'{op}: expected method to be one of {", ".join(METHODS)}, got "{method}"')
    _check_dtype(op, input)
    _check_dim(op, input, dim)
    _check_seed(op, input, seed)


def _check_gradient(
    op: str, grad_output: Tensor, weight: Tensor, n: int, m: int, dim: int, method: str, seed: Tensor | None
) -> None:
    _check_prune(op, grad_output, n, m, dim, method, seed)
    alone = "expected a method that needs one group at a time, got rescale; prune by it, then call this by magnitude"
    _check(method != "rescale", f"{op}: {alone}")
    _check_like(op, grad_output, "weight", weight, "the gradient is")


def _check_dim(op: str, tensor: Tensor, dim: int) -> None:
    ndim = tensor.ndim
    _check(ndim >= 1, f"{op}: expected at least 1 dimension, got a scalar")
    _check(-ndim <= dim < ndim, f"{op}: expected dim in [{-ndim}, {ndim - 1}], got {dim}")


def _check_dtype(op: str, tensor: Tensor) -> None:
    _check(tensor.dtype in _DTYPES, f"{op}: expected float32, float64, float16 or bfloat16, got {_name(tensor)}")


def _check_seed(op: str, input: Tensor, seed: Tensor | None) -> None:
    if seed is None:
        return
    _check(seed.dtype == torch.int64, f"{op}: expected seed to be int64, got {_name(seed)}")
    _check(seed.numel() == 1, f"{op}: expected seed to have one element, got {seed.numel()}")
    same = seed.device == input.device
    _check(same, f"{op}: expected seed on the input's device ({input.device}), got {seed.device}")


def _check_group_size(op: str, m: int) -> None:
    _check(1 <= m <= MAX_GROUP_SIZE, f"{op}: expected 1 <= m <= {MAX_GROUP_SIZE}, got {m}")


def _check_compressed(op: str, values: Tensor, indices: Tensor, m: int, size: int, dim: int) -> None:
    _check_dtype(op, values)
    _check_group_size(op, m)
    _check(size >= 0, f"{op}: expected size >= 0, got {size}")
    _check(indices.dtype == torch.uint8, f"{op}: expected indices to be uint8, got {_name(indices)}")
    _check_same_device(op, values, "indices", indices)
    shapes = f"{tuple(values.shape)} and {tuple(indices.shape)}"
    _check(values.shape == indices.shape, f"{op}: expected values and indices of one shape, got {shapes}")
    kept, groups = values.shape[dim], _ceil_div(size, m)
    _check(
        kept == 0 if groups == 0 else kept % groups == 0 and 1 <= kept // groups <= m,
        f"{op}: expected the size of values to be ceil({size} / {m}) = {groups} groups times n, 1 <= n <= {m}, "
        f"got {kept}",
    )


def _check_like(op: str, values: Tensor, name: str, other: Tensor, like: str = "the values are") -> None:
    same = other.dtype == values.dtype
    _check(same, f"{op}: expected {name} to be {_name(values)} as {like}, got {_name(other)}")
    _check_same_device(op, values, name, other)


def _check_same_device(op: str, values: Tensor, name: str, other: Tensor) -> None:
    same = other.device == values.device
    _check(same, f"{op}: expected {name} on the same device ({values.device}), got {other.device}")


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

# SPDX-License-Identifier: BSD-3-Clause
"""The ops as Python functions. Other modules call these, not ``torch.ops.sdgp``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _derivatives as _derivatives
from . import _fakes as _fakes
from . import _flop as _flop
from ._load import C  # registers the ops
from ._pattern import METHODS_THAT_DRAW

#: The dtypes that the kernels support.
PRUNED_DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in C.dtypes)


def prune_nm(
    input: Tensor, n: int, m: int, dim: int = -1, method: str = "magnitude", seed: Tensor | None = None
) -> Tensor:
    """Prunes ``input`` to N:M sparsity: at most ``n`` of every ``m`` consecutive values along ``dim`` stay.

    The values of a group are consecutive by logical index, for any strides. If the size is not a multiple of ``m``, the
    last group is shorter and keeps ``min(n, its length)`` values. With ``n == m`` every value stays.

    Each ``method`` keeps these values of a group:

    - ``magnitude``: the n values with the largest |x|. On a tie the lower index stays; NaN > inf > finite.
    - ``random``: a uniformly random subset of n values.
    - ``rescale``: those of magnitude, times Σ|x| / Σ|kept|. Each (sample, index along ``dim``) has one factor, with
      sums over all other dimensions. In a 2-D input each row has one factor, with sums along ``dim``.
    - ``rescale_group``: those of magnitude, times the same ratio within the group.
    - ``mvue``: unbiased. x_i stays with probability π_i = min(1, c·|x_i|), where Σπ = n, and becomes x_i / π_i.
    - ``unstructured``: mvue with one c for all groups, so that n of m values stay in the mean over the input. Where
      values are large, more of them stay. This adds the least noise. c comes from at most 8,192 evenly spaced elements
      of the input, so the share of kept values is off by a few percent. Only on a CPU, and not in ``compress_nm``.

    For magnitude, ``dim=-1`` and a size that is a multiple of m, this is equivalent to:

        groups = input.unflatten(-1, (-1, m))
        kept = groups.abs().topk(n, dim=-1).indices
        torch.zeros_like(groups).scatter(-1, kept, groups.gather(-1, kept)).flatten(-2)

    Args:
        input: float32, float64, float16 or bfloat16; any shape except a scalar, any strides.
        n: how many values of each group stay, ``1 <= n <= m``.
        m: the size of a group, at most 64.
        dim: the dimension along which the groups run.
        method: one of the methods above.
        seed: the seed of ``random``, ``mvue`` and ``unstructured``: int64, one element, on the input's device. By
            default it is drawn from PyTorch's generator of that device, so ``torch.manual_seed`` reproduces the result.
            The other methods do not use the generator.

    Returns:
        A tensor with the shape and dtype of the input, and with the strides that ``torch.empty_like`` gives it.

    Raises:
        RuntimeError: If an argument is not valid: ``prune_nm: requirement, got actual``.

    The gradient of the input is the gradient of the output times the same mask and factor.

    Source: McDanel, Dinh, Magallanes, "Accelerating DNN Training with Structured Data Gradient Pruning", 2022
    (magnitude, rescale); Chmiel et al., "Minimum Variance Unbiased N:M Sparsity for the Neural Gradients", 2023 (mvue);
    Wangni et al., "Gradient Sparsification for Communication-Efficient Distributed Optimization", 2018 (unstructured).

    Examples:
        >>> sdgp.prune_nm(torch.tensor([3.0, -1.0, 0.5, -4.0]), 2, 4)
        tensor([ 3.,  0.,  0., -4.])
    """
    _refuse_tangents("prune_nm", input)
    result: Tensor = torch.ops.sdgp.prune_nm(input, n, m, dim, method, _seed(input, method, seed))
    return result


def compress_nm(
    input: Tensor, n: int, m: int, dim: int = -1, method: str = "magnitude", seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Prunes ``input`` as ``prune_nm`` does and returns only what stays: n values and n indices per group.

    The values of a group are in ascending order of their index within the group. If fewer than n values stay, pruned
    places with the lowest indices fill the group, with value 0. Slots that a shorter last group cannot fill get value 0
    and index 0. The dtypes are those of ``prune_nm``.

    Args:
        input, n, m, dim, method, seed: as in ``prune_nm``.

    Returns:
        ``values`` with the dtype of the input, and ``indices`` with dtype uint8. Both have the shape of the input,
        except ceil(size / m) * n along ``dim``, which is innermost in memory.

    Raises:
        RuntimeError: If an argument is not valid: ``compress_nm: requirement, got actual``. Also in a backward: only
            ``prune_nm`` has a gradient.

    For magnitude, ``dim=-1`` and a size that is a multiple of m, this is equivalent to:

        groups = input.unflatten(-1, (-1, m))
        indices = groups.abs().topk(n, dim=-1).indices.sort(dim=-1).values
        groups.gather(-1, indices).flatten(-2), indices.flatten(-2).to(torch.uint8)

    Examples:
        >>> sdgp.compress_nm(torch.tensor([3.0, -1.0, 0.5, -4.0]), 2, 4)
        (tensor([ 3., -4.]), tensor([0, 3], dtype=torch.uint8))
    """
    _refuse_tangents("compress_nm", input)
    values, indices = torch.ops.sdgp.compress_nm(input, n, m, dim, method, _seed(input, method, seed))
    return values, indices


def decompress_nm(values: Tensor, indices: Tensor, m: int, size: int, dim: int = -1) -> Tensor:
    """Expands the result of ``compress_nm`` to the pruned dense tensor: bit for bit ``prune_nm(input, ...)``.

    Args:
        values, indices: the results of ``compress_nm``. If a group contains an index twice, the first one counts.
        m: the size of a group.
        size: the size of the result along ``dim``.
        dim: the dimension along which the groups run.

    Returns:
        A tensor with the shape of ``values``, except ``size`` along ``dim``, which is innermost in memory.

    Raises:
        RuntimeError: If an argument is not valid: ``decompress_nm: requirement, got actual``. Also in a backward.

    Examples:
        >>> values, indices = sdgp.compress_nm(torch.tensor([3.0, -1.0, 0.5, -4.0]), 2, 4)
        >>> sdgp.decompress_nm(values, indices, 4, 4)
        tensor([ 3.,  0.,  0., -4.])
    """
    _refuse_tangents("decompress_nm", values)
    result: Tensor = torch.ops.sdgp.decompress_nm(values, indices, m, size, dim)
    return result


def spmm_nm(values: Tensor, indices: Tensor, m: int, dense: Tensor) -> Tensor:
    """Multiplies a compressed matrix, or a batch of rows, by a dense matrix. Pruned places cost nothing.

    Equivalent to ``decompress_nm(values, indices, m, dense.shape[0]) @ dense``, except for rounding. 16-bit dtypes are
    accumulated in float32.

    Args:
        values, indices: (..., ceil(size / m) * n), the results of ``compress_nm`` with ``dim=-1``.
        m: the size of a group.
        dense: (size, cols), with the dtype of ``values`` and any strides.

    Returns:
        (..., cols), contiguous. The result does not depend on the number of threads.

    Raises:
        RuntimeError: If an argument is not valid: ``spmm_nm: requirement, got actual``. Also in a backward.

    Examples:
        >>> values, indices = sdgp.compress_nm(torch.tensor([[3.0, -1.0, 0.5, -4.0]]), 2, 4)
        >>> sdgp.spmm_nm(values, indices, 4, torch.eye(4))
        tensor([[ 3.,  0.,  0., -4.]])
    """
    _refuse_tangents("spmm_nm", values, dense)
    result: Tensor = torch.ops.sdgp.spmm_nm(values, indices, m, dense)
    return result


def prune_nm_matmul(
    input: Tensor, dense: Tensor, n: int, m: int, method: str = "magnitude", seed: Tensor | None = None
) -> Tensor:
    """Computes ``prune_nm(input, n, m, -1, method, seed) @ dense``: the data or weight gradient of a linear layer.

    The pruned matrix is never stored: a few rows at a time are pruned, packed and multiplied in the caches.

    Args:
        input: (..., size), any strides.
        dense: (size, cols), any strides.
        n, m, method, seed: as in ``prune_nm``, without ``rescale``, whose sums need the whole input first. Prune with
            ``rescale``, then call this function with ``magnitude``.

    Returns:
        (..., cols).
    """
    result: Tensor = torch.ops.sdgp._prune_nm_matmul(input, dense, n, m, method, _seed(input, method, seed))
    return result


def conv2d_input_grad_nm(
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
    """Computes the data gradient of a 2-D convolution from its output gradient, and prunes that on the way.

    Args:
        grad_output: (N, out, H', W').
        weight: (out, in / groups, kH, kW), any strides.
        n, m, method, seed: as in ``prune_nm_matmul``. No group of m values crosses two convolution groups: if these
            do not have a multiple of m channels, (N * groups, out / groups, H', W') is pruned.
        input_size: (H, W).
        stride, padding, dilation, groups: the settings of the convolution.
        channels_last: the memory format of the result.

    Returns:
        (N, in, H, W).
    """
    drawn = _seed(grad_output, method, seed)
    result: Tensor = torch.ops.sdgp._conv2d_input_grad_nm(
        grad_output, weight, n, m, method, drawn, input_size, stride, padding, dilation, groups, channels_last
    )
    return result


def conv2d_weight_grad_nm(
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
    """Computes the weight gradient of a 2-D convolution from its output gradient, and prunes that on the way.

    Args:
        grad_output: (N, out, H', W').
        input: (N, in, H, W), any strides.
        n, m, method, seed: as in ``prune_nm_matmul``. A group is m consecutive output pixels, row by row, of one
            channel of one sample: (N, out, H' * W') is pruned.
        kernel_size: (kH, kW).
        stride, padding, dilation, groups: the settings of the convolution.
        channels_last: the memory format of the result.

    Returns:
        (out, in / groups, kH, kW).
    """
    drawn = _seed(grad_output, method, seed)
    result: Tensor = torch.ops.sdgp._conv2d_weight_grad_nm(
        grad_output, input, n, m, method, drawn, kernel_size, stride, padding, dilation, groups, channels_last
    )
    return result


def pack_24(
    input: Tensor,
    n: int,
    m: int,
    method: str = "magnitude",
    seed: Tensor | None = None,
    layout: str = "cusparselt_sm80",
) -> Tensor:
    """Prunes a matrix along its rows and packs it as the operand of a 2:4 product on CUDA, in one pass.

    Args:
        input: (rows, cols), float16 or bfloat16.
        n, m: n <= 2 and m a multiple of 4, or 1:2.
        method, seed: as in ``prune_nm``.
        layout: the layout of the metadata: ``cusparselt_sm80``, ``cusparselt_sm90`` or ``cutlass_sm80``.

    Returns:
        A 1-D tensor: the kept values, (rows, cols / 2), then the metadata. Here rows is rounded up to a multiple of
        128 and cols to a multiple of 64; the padding is zero.
    """
    packed: Tensor = torch.ops.sdgp._pack_24(input, n, m, method, _seed(input, method, seed), layout)
    return packed


def _refuse_tangents(op: str, *tensors: Tensor) -> None:
    """Raises an error in forward-mode differentiation, where PyTorch would take a derivative of zero."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    unpack: Any = forward_ad.unpack_dual
    if any(unpack(_without_batches(tensor)).tangent is not None for tensor in tensors):
        raise RuntimeError(
            f"{op}: expected no forward-mode differentiation (jvp, jacfwd), got a tangent; use torch.autograd.grad"
        )


def _without_batches(tensor: Tensor) -> Tensor:
    """Unwraps a tensor inside vmap, which has no rule for ``unpack_dual``."""
    while torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _seed(input: Tensor, method: str, seed: Tensor | None) -> Tensor | None:
    if seed is not None or method not in METHODS_THAT_DRAW:
        return seed
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=input.device)

# SPDX-License-Identifier: BSD-3-Clause
"""The ops, and their gradients: the only file that names ``torch.ops.sdgp``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _fakes as _fakes
from . import _load as _load  # registers the ops
from ._pattern import METHODS_THAT_DRAW

#: What the kernels compute with.
PRUNED_DTYPES = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))


def prune_nm(
    input: Tensor, n: int, m: int, dim: int = -1, method: str = "magnitude", seed: Tensor | None = None
) -> Tensor:
    """Prunes ``input`` to N:M sparsity: at most ``n`` of every ``m`` consecutive values along ``dim`` stay.

    Groups are consecutive by logical index, whatever the strides. Where the size is no multiple of ``m``, the last
    group is shorter and keeps ``min(n, its length)``. ``n == m`` is the identity.

    What each ``method`` keeps:

    - ``magnitude``: the n largest |x|. Ties go to the lower index; NaN > inf > finite.
    - ``random``: a uniformly random n-subset.
    - ``rescale``: magnitude, times Σ|x| / Σ|kept|: one factor per (sample, index along ``dim``), the sums over all
      other dimensions; for 2-D input one factor per row, summed along ``dim``.
    - ``rescale_group``: magnitude, times the same ratio within the group.
    - ``mvue``: unbiased: x_i stays with probability π_i = min(1, c·|x_i|), Σπ = n, as x_i / π_i.

    Equivalent to (magnitude, ``dim=-1``, no tail):

        groups = input.unflatten(-1, (-1, m))
        kept = groups.abs().topk(n, dim=-1).indices
        torch.zeros_like(groups).scatter(-1, kept, groups.gather(-1, kept)).flatten(-2)

    Args:
        input: float32, float64, float16 or bfloat16; any shape but a scalar, any strides.
        n: how many of each group stay, ``1 <= n <= m``.
        m: the size of a group, up to 64.
        dim: the dimension that groups run along.
        method: see above.
        seed: for ``random`` and ``mvue``: int64, one element, on the input's device. Default: drawn from PyTorch's
            generator of that device, so that ``torch.manual_seed`` reproduces the result. The other methods never
            touch the generator.

    Returns:
        A tensor of the input's shape, dtype and strides.

    Raises:
        RuntimeError: ``prune_nm: requirement, got actual``.

    The gradient is the incoming one times the same mask and factor.

    Source: McDanel, Dinh, Magallanes, "Accelerating DNN Training with Structured Data Gradient Pruning", 2022
    (magnitude, rescale); Chmiel et al., "Minimum Variance Unbiased N:M Sparsity for the Neural Gradients", 2023 (mvue).

    Examples:
        >>> sdgp.prune_nm(torch.tensor([3.0, -1.0, 0.5, -4.0]), 2, 4)
        tensor([ 3.,  0.,  0., -4.])
    """
    result: Tensor = torch.ops.sdgp.prune_nm(input, n, m, dim, method, _seed(input, method, seed))
    return result


def compress_nm(
    input: Tensor, n: int, m: int, dim: int = -1, method: str = "magnitude", seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Prunes ``input`` as ``prune_nm`` does and keeps only what stays: n values and n indices per group.

    A group's values are in ascending order of their index within it. Where fewer than n stay, pruned places with the
    lowest indices fill up, with the value 0; what a shorter last group cannot fill is value 0 at index 0.

    Args:
        input, n, m, dim, method, seed: see ``prune_nm``.

    Returns:
        ``values``, of the input's dtype, and ``indices``, uint8: the input's shape, but for
        ceil(size / m) * n along ``dim``, which lies innermost in memory.

    Raises:
        RuntimeError: ``compress_nm: requirement, got actual``. There is no gradient: see ``prune_nm``.

    Equivalent to (magnitude, ``dim=-1``, no tail):

        groups = input.unflatten(-1, (-1, m))
        indices = groups.abs().topk(n, dim=-1).indices.sort(dim=-1).values
        groups.gather(-1, indices).flatten(-2), indices.flatten(-2).to(torch.uint8)

    Examples:
        >>> sdgp.compress_nm(torch.tensor([3.0, -1.0, 0.5, -4.0]), 2, 4)
        (tensor([ 3., -4.]), tensor([0, 3], dtype=torch.uint8))
    """
    values, indices = torch.ops.sdgp.compress_nm(input, n, m, dim, method, _seed(input, method, seed))
    return values, indices


def decompress_nm(values: Tensor, indices: Tensor, m: int, size: int, dim: int = -1) -> Tensor:
    """The dense tensor that ``compress_nm`` came from, pruned: bit for bit ``prune_nm(input, ...)``.

    Args:
        values, indices: as ``compress_nm`` returns them. Where a group names an index twice, the first counts.
        m: the size of a group.
        size: of the result along ``dim``.
        dim: the dimension that groups run along.

    Returns:
        A tensor of the values' shape, but for ``size`` along ``dim``, which lies innermost in memory.

    Raises:
        RuntimeError: ``decompress_nm: requirement, got actual``.

    Examples:
        >>> values, indices = sdgp.compress_nm(torch.tensor([3.0, -1.0, 0.5, -4.0]), 2, 4)
        >>> sdgp.decompress_nm(values, indices, 4, 4)
        tensor([ 3.,  0.,  0., -4.])
    """
    result: Tensor = torch.ops.sdgp.decompress_nm(values, indices, m, size, dim)
    return result


def spmm_nm(values: Tensor, indices: Tensor, m: int, dense: Tensor) -> Tensor:
    """The product of a compressed matrix, or a batch of rows, with a dense one; pruned places cost nothing.

    Equivalent to ``decompress_nm(values, indices, m, dense.shape[0]) @ dense``, to rounding; 16-bit types are summed in
    float32.

    Args:
        values, indices: (..., ceil(size / m) * n), as ``compress_nm`` returns them for ``dim=-1``.
        m: the size of a group.
        dense: (size, cols), of the values' dtype, any strides.

    Returns:
        (..., cols), contiguous. It does not depend on the number of threads.

    Raises:
        RuntimeError: ``spmm_nm: requirement, got actual``.

    Examples:
        >>> values, indices = sdgp.compress_nm(torch.tensor([[3.0, -1.0, 0.5, -4.0]]), 2, 4)
        >>> sdgp.spmm_nm(values, indices, 4, torch.eye(4))
        tensor([[ 3.,  0.,  0., -4.]])
    """
    result: Tensor = torch.ops.sdgp.spmm_nm(values, indices, m, dense)
    return result


def prune_nm_matmul(
    input: Tensor, dense: Tensor, n: int, m: int, method: str = "magnitude", seed: Tensor | None = None
) -> Tensor:
    """``prune_nm(input, n, m, -1, method, seed) @ dense``: the data or weight gradient of a linear layer.

    The pruned matrix is never stored: some rows at a time are pruned, packed and multiplied in the caches.

    Args:
        input: (..., size), any strides.
        dense: (size, cols), any strides.
        n, m, method, seed: see ``prune_nm``. Not ``rescale``, whose sums need the whole input first: prune by it, then
            call this with ``magnitude``.

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
    """The data gradient of a 2-D convolution, from its output gradient, pruned on the way.

    Args:
        grad_output: (N, out, H', W').
        weight: (out, in / groups, kH, kW), any strides.
        n, m, method, seed: as in ``prune_nm_matmul``. No group of m crosses two of the convolution: where its
            groups' channels are no multiple of m, what is pruned is (N * groups, out / groups, H', W').
        input_size: (H, W).
        stride, padding, dilation, groups: of the convolution.
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
    """The weight gradient of a 2-D convolution, from its output gradient, pruned on the way.

    Args:
        grad_output: (N, out, H', W').
        input: (N, in, H, W), any strides.
        n, m, method, seed: as in ``prune_nm_matmul``. Groups of m are consecutive output pixels, row by row, of one
            channel of one sample: what is pruned is (N, out, H' * W').
        kernel_size: (kH, kW).
        stride, padding, dilation, groups: of the convolution.
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
        method, seed: see ``prune_nm``.
        layout: of the metadata: ``cusparselt_sm80``, ``cusparselt_sm90`` or ``cutlass_sm80``.

    Returns:
        One dimension: the kept values, (rows, cols / 2), then the metadata; rows rounded up to a multiple of 128, cols
        of 64, the missing elements zero.
    """
    packed: Tensor = torch.ops.sdgp._pack_24(input, n, m, method, _seed(input, method, seed), layout)
    return packed


def _seed(input: Tensor, method: str, seed: Tensor | None) -> Tensor | None:
    if seed is not None or method not in METHODS_THAT_DRAW:
        return seed
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=input.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, n, m, dim, method, seed = inputs
    if seed is None and method in METHODS_THAT_DRAW and n != m:
        raise RuntimeError(f"prune_nm: expected a seed, to repeat {method} in backward, got None")
    ctx.save_for_backward(input, seed)
    ctx.settings = (n, m, dim, method)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, seed = ctx.saved_tensors
    scale = torch.ops.sdgp._prune_nm_scale(input.detach(), *ctx.settings, seed)
    # Not the product alone: an inf that meets a pruned place would become NaN there.
    return torch.where(scale == 0, scale, grad_output * scale), None, None, None, None, None


torch.library.register_autograd("sdgp::prune_nm", _backward, setup_context=_setup_context)


def _vmap(op: Any) -> Any:
    """The rule of torch.func.vmap: sample by sample, so that factors and draws are those of each sample alone."""

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Tensor, int]:
        def of_sample(index: int) -> Tensor:
            result: Tensor = op(
                *(arg if at is None else arg.select(at, index) for arg, at in zip(args, in_dims, strict=False))
            )
            return result

        return torch.stack([of_sample(index) for index in range(info.batch_size)]), 0

    return rule


for _op in (torch.ops.sdgp.prune_nm, torch.ops.sdgp._prune_nm_scale):
    torch.library.register_vmap(_op.default, _vmap(_op))


def _kept(size: int, n: int, m: int) -> int:
    """How many of a row's ``size`` values a sparse product multiplies."""
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


# FlopCounterMode counts multiplications and additions of products. Pruning and packing have none.
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

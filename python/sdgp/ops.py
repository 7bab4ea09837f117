# SPDX-License-Identifier: BSD-3-Clause
"""The ops, and their gradients: the only file that names ``torch.ops.sdgp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _load as _load  # registers the ops


def prune_nm(
    input: Tensor, n: int, m: int, dim: int = -1, method: str = "magnitude", seed: Tensor | None = None
) -> Tensor:
    r"""Prunes ``input`` to N:M sparsity: at most ``n`` of every ``m`` consecutive values along ``dim`` stay.

    Groups are consecutive by logical index, whatever the strides. Where the size is no multiple of ``m``, the last
    group is shorter and keeps ``min(n, its length)``. ``n == m`` is the identity.

    =================  ===========================================================================================
    ``method``         what is kept
    =================  ===========================================================================================
    ``magnitude``      the n largest \|x\|; ties: the lower index; NaN > inf > finite
    ``random``         a uniformly random n-subset
    ``rescale``        magnitude, times :math:`\sum|x| / \sum|kept|`: one factor per (sample, index along ``dim``), the
                       sums over all other dimensions; for 2-D input one factor per row, summed along ``dim``
    ``rescale_group``  magnitude, times the same ratio within the group
    ``mvue``           unbiased: :math:`x_i` stays with probability :math:`\pi_i = \min(1, c|x_i|)`,
                       :math:`\sum\pi = n`, as :math:`x_i / \pi_i`
    =================  ===========================================================================================

    Equivalent to (magnitude, ``dim=-1``, no tail)::

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

    Example:
        >>> sdgp.prune_nm(torch.tensor([3.0, -1.0, 0.5, -4.0]), 2, 4)
        tensor([ 3.,  0.,  0., -4.])
    """
    if seed is None and (method == "random" or method == "mvue"):
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=input.device)
    result: Tensor = torch.ops.sdgp.prune_nm(input, n, m, dim, method, seed)
    return result


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, n, m, dim, method, seed = inputs
    if seed is None and method in ("random", "mvue") and n != m:
        raise RuntimeError(f"prune_nm: expected a seed, to repeat {method} in backward, got None")
    ctx.save_for_backward(input, seed)
    ctx.settings = (n, m, dim, method)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, seed = ctx.saved_tensors
    scale = torch.ops.sdgp._prune_nm_scale(input.detach(), *ctx.settings, seed)
    # Not the product alone: an inf that meets a pruned place would become NaN there.
    return torch.where(scale == 0, scale, grad_output * scale), None, None, None, None, None


torch.library.register_autograd("sdgp::prune_nm", _backward, setup_context=_setup_context)

# SPDX-License-Identifier: BSD-3-Clause
"""The rules that need no measurement: where a sparse product exists, and where one is worth a measurement."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import _semi_structured
from ._pattern import Pruning, methods_on

# The multiply-adds of a gradient whose exact product takes about 0.2 ms. Below it, the call overhead of the sparse
# product would cost most of what pruning saves. This is a constant, because under `auto` the path of a forward depends
# on it (Note [One path] in _autograd/_call.py).
LEAST_WORK = 16 * 2**20

# The same on a GPU: an exact product of this size takes about 0.1 ms, as long as the launches of the sparse product.
LEAST_WORK_CUDA = 2**35


def obstacle(
    op: str,
    gradient: str,
    pruning: Pruning,
    device: torch.device,
    dtype: torch.dtype,
    groups: int = 1,
    casts: str = "",
) -> str | None:
    """Returns why a gradient has no sparse product, as "requirement, got actual", or None if it has one.

    Args:
        op: ``"linear"``, ``"float8_linear"`` or ``"conv2d"``.
        gradient: ``"data"`` or ``"weight"``.
        groups: the number of groups of a convolution.
        casts: how a float8 layer casts the factors.
    """
    if pruning.method not in methods_on(device.type):
        return f"a cpu for the method {pruning.method}, got {device}"
    if op == "float8_linear":
        return _semi_structured.float8_obstacle(device, dtype, pruning.pattern, casts)
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"a device that has a sparse product (cpu, cuda), got {device}"
    if op == "conv2d" and gradient == "weight":
        return f"a cpu for the weight gradient of a convolution, got {device}"
    if groups > 1:
        return f"a convolution of one group on cuda, got groups={groups}"
    return _semi_structured.obstacle(device, dtype, pruning.pattern)


def kernels_run(gradient: Tensor) -> bool:
    """Returns whether a product that is called now really computes, so that it can be timed.

    It does not compute under fake tensors, tracers, dispatch modes, transforms or the capture of a CUDA graph.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or isinstance(gradient, FakeTensor)
        or gradient.device.type == "meta"
        or torch._C._are_functorch_transforms_active()
        or (gradient.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def static_rule(
    op: str,
    gradient: str,
    pruning: Pruning,
    device: torch.device,
    dtype: torch.dtype,
    weight_shape: Sequence[int],
    values: int,
) -> bool:
    """Returns whether to take the sparse product if nothing can be measured: it was faster in all measured cases.

    On GPUs the rule rests on others' measurements, of data gradients of linear layers with at least 4096 rows.

    Args:
        gradient: ``"data"`` or ``"weight"``.
        values: the number of values of the input; in eager mode rounded up to a power of two, as in ``Site``.
    """
    n, m = pruning.pattern
    if device.type == "cuda":
        large = min(weight_shape) >= 2048 and values >= 4096 * max(weight_shape)
        known = op == "linear" and gradient == "data" and large
        return known and obstacle(op, gradient, pruning, device, dtype) is None
    large = weight_shape[0] >= 128 and weight_shape[1] >= 128 and values >= 2**18
    return device.type == "cpu" and op != "float8_linear" and dtype == torch.float32 and 4 * n <= m and large

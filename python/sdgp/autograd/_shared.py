# SPDX-License-Identifier: BSD-3-Clause
"""What linear and conv2d share around their products: when to prune, autocast, and one differentiation only."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function

from ..ops import prune_nm
from ..pattern import Pruning

OptionalTensor: TypeAlias = Tensor | None


def has_data_gradient(input: Tensor) -> bool:
    return input.requires_grad and torch.is_grad_enabled()


def autocast(input: Tensor, weight: Tensor, bias: OptionalTensor) -> tuple[Tensor, Tensor, OptionalTensor]:
    """Casts as autocast would inside the operator: outside it, so that autograd casts the gradients back."""
    device = input.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast, and asking raises
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    return cast(input), cast(weight), None if bias is None else cast(bias)


def rescaled(grad_output: Tensor, dim: int, pruning: Pruning) -> tuple[Tensor, str]:
    """What a sparse product prunes, and by what: rescale's sums want all of the gradient, so it comes first, and of
    what it leaves magnitude keeps everything."""
    pattern, method, _ = pruning
    if method != "rescale":
        return grad_output, method
    return prune_nm(grad_output, *pattern, dim, method), "magnitude"


def rows(x: Tensor) -> Tensor:
    """(..., features) -> (rows, features)"""
    return x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)


def once(op: str, sources: tuple[OptionalTensor, ...], *gradients: OptionalTensor) -> tuple[OptionalTensor, ...]:
    """The gradients, so that differentiating them again, through any of what they were made from, is an error."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradients
    anchor = next((source for source in sources if source is not None and source.requires_grad), None)
    if anchor is None:
        return gradients
    return tuple(None if grad is None else _Once.apply(grad.detach(), anchor, op) for grad in gradients)


class _Once(Function):
    """The identity on a gradient, hung on a tensor that requires one; its own gradient is refused."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor, op: str) -> Tensor:
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.op}: expected one differentiation, got a second (create_graph=True); the pruned data gradient has "
            "no gradient of its own: use sdgp.paused(model) around this forward"
        )

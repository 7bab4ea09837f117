# SPDX-License-Identifier: BSD-3-Clause
"""What the backwards of linear and conv2d share: which gradients are asked for, which product computes each, and that a
pruned one is not differentiated again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .._decision import Decision, Products
from .._ops import prune_nm
from .._pattern import METHODS_BY_GROUP, Pruning
from ._autocast import OptionalTensor
from ._call import Call, Part, in_transform, note, remember


def decide(call: Call, part: Part, products: Products) -> Decision:
    """In a backward: which product computes a gradient of a call."""
    if call.chooser is None or part.site is None:
        return Decision(part.product, "")
    if call.held:
        return _HELD  # says nothing about the gradients of other forwards
    decision = call.chooser.decide(part.site, products)
    note(call.layer, decision, (part.site.gradient,))
    remember(call.layer, None)
    return decision


_HELD = Decision("exact", "somebody holds the layer exact")


def pruned_gradient(
    call: Call, gradient: str, products: Products, decision: Decision, *sources: OptionalTensor
) -> Tensor:
    """A gradient by the product that was decided on, which prunes. It refuses to be differentiated again.

    Args:
        gradient: ``"data"`` or ``"weight"``.
        sources: what it is made from.

    Raises:
        RuntimeError: where a transform differentiates it again.
    """
    result = products.sparse() if decision.product == "sparse" else products.dense()
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or in_transform()):
        return result
    once: Tensor = _Once.apply(result.detach(), call.op, gradient, *sources)
    return once


def wanted(ctx: Any) -> list[bool]:
    """Which of the gradients of input, weight and bias this backward has to compute: it may be asked for some alone."""
    needs = list(ctx.needs_input_grad[:3])
    if not torch.compiler.is_compiling():
        for index, (node, _) in enumerate(ctx.next_functions):  # of the arguments that are tensors, which come first
            needs[index] = needs[index] and (node is None or _is_asked_for(node))
    return needs


def _is_asked_for(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf whose gradient torch.autograd.grad was asked for
        return True


def forward_derivative(
    ctx: Any, tangents: Sequence[OptionalTensor], product: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The derivative of ``product(input, weight) + bias`` along the tangents of input, weight and bias."""
    input, weight = ctx.saved_tensors
    input_t, weight_t, bias_t = tangents[:3]
    terms = [] if bias_t is None else [bias_t]
    terms += [] if input_t is None else [product(input_t, weight)]
    terms += [] if weight_t is None else [product(input, weight_t)]
    return functools.reduce(torch.add, terms)


def detached(grad_output: Tensor) -> Tensor:
    """A gradient to be pruned, which needs no gradient of its own, see ``pruned_gradient``."""
    return grad_output.detach() if grad_output.requires_grad or in_transform() else grad_output


def rescaled(grad_output: Tensor, dim: int, pruning: Pruning) -> tuple[Tensor, str]:
    """What a sparse product prunes, and by which method: one that sums over the whole gradient, as rescale does, prunes
    first, and of what it leaves magnitude keeps everything."""
    if pruning.method in METHODS_BY_GROUP:
        return grad_output, pruning.method
    return prune_nm(grad_output, *pruning.pattern, dim, pruning.method), "magnitude"


def rows(x: Tensor) -> Tensor:
    """(..., features) -> (rows, features)"""
    if x.ndim == 2:
        return x
    # By reshape: flatten has no rule for vmap.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if x.ndim > 1 else x.unsqueeze(0)


class _Once(Function):
    """The identity on a pruned gradient, tied to all that it is made from: its own gradient is refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(result: Tensor, op: str, gradient: str, *sources: OptionalTensor) -> Tensor:
        return result.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.op, ctx.gradient, *_ = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.op}: expected one differentiation, got a second (create_graph=True, or nested transforms); the "
            f"pruned {ctx.gradient} gradient has no gradient of its own: use sdgp.paused(model) around this forward"
        )

    jvp = backward

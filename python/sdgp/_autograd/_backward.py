# SPDX-License-Identifier: BSD-3-Clause
"""The shared parts of the backwards of linear and conv2d.

They find which gradients are needed and which product computes each, and they refuse to differentiate a pruned gradient
again.
"""

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
    """Returns which product computes a gradient of a call, in its backward."""
    if call.chooser is None or part.site is None:
        return Decision(part.product, "")
    if call.held:
        return _HELD  # not noted: it says nothing about other forwards
    decision = call.chooser.decide(part.site, products)
    note(call.layer, decision, (part.site.gradient,))
    remember(call.layer, None)
    return decision


_HELD = Decision("exact", "the layer is held exact")


def pruned_gradient(
    call: Call, gradient: str, products: Products, decision: Decision, *sources: OptionalTensor
) -> Tensor:
    """Computes a gradient with the chosen product, which prunes. The result cannot be differentiated again.

    Args:
        gradient: ``"data"`` or ``"weight"``.
        sources: the tensors from which the gradient is computed.

    Raises:
        RuntimeError: If a transform differentiates the gradient again.
    """
    sparse = decision.product == "sparse"
    result = products.sparse(algorithm=decision.algorithm) if sparse else products.dense()
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or in_transform()):
        return result
    once: Tensor = _Once.apply(result.detach(), call.op, gradient, *sources)
    return once


def wanted(ctx: Any) -> list[bool]:
    """Returns which gradients of input, weight and bias this backward must compute. It may be only some of them."""
    needs = list(ctx.needs_input_grad[:3])
    if torch.compiler.is_compiling() or sum(needs) < 2:
        return needs
    asked = list(needs)
    for index, (node, _) in enumerate(ctx.next_functions):  # one per tensor argument; these come first
        asked[index] = asked[index] and (node is None or _is_asked_for(node))
    # This node runs because something is asked for. Distributed autograd does not tell what.
    return asked if any(asked) else needs


def _is_asked_for(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf whose gradient torch.autograd.grad must return
        return True


def strided(grad_output: Tensor) -> Tensor:
    """Returns the gradient in a layout that kernels can read. That of ``gather(sparse_grad=True)`` is sparse."""
    if torch.compiler.is_compiling() or grad_output.layout is torch.strided:
        return grad_output
    return grad_output.to_dense()


def forward_derivative(
    ctx: Any, tangents: Sequence[OptionalTensor], product: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Returns the derivative of ``product(input, weight) + bias`` along the tangents of input, weight and bias."""
    *_, weight, input = ctx.saved_tensors
    input_t, weight_t, bias_t = tangents[:3]
    terms = [] if bias_t is None else [bias_t]
    terms += [] if input_t is None else [product(input_t, weight)]
    terms += [] if weight_t is None else [product(input, weight_t)]
    return functools.reduce(torch.add, terms)


def detached(grad_output: Tensor) -> Tensor:
    """Returns a gradient to be pruned, detached: it needs no gradient of its own (``pruned_gradient``)."""
    return grad_output.detach() if grad_output.requires_grad or in_transform() else grad_output


def rescaled(grad_output: Tensor, dim: int, pruning: Pruning) -> tuple[Tensor, str]:
    """Returns the gradient that a sparse product prunes, and the method.

    A method that sums over the whole gradient, such as rescale, prunes it here. The product then prunes by magnitude,
    which keeps all that is left.
    """
    if pruning.method in METHODS_BY_GROUP:
        return grad_output, pruning.method
    return prune_nm(grad_output, *pruning.pattern, dim, pruning.method), "magnitude"


def rows(x: Tensor) -> Tensor:
    """Reshapes (..., features) to (rows, features)."""
    if x.ndim == 2:
        return x
    # reshape, because flatten has no rule for vmap.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if x.ndim > 1 else x.unsqueeze(0)


class _Once(Function):
    """The identity on a pruned gradient, with all its sources as inputs. Its backward raises an error."""

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

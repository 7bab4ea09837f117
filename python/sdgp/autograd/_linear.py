# SPDX-License-Identifier: BSD-3-Clause
"""linear with a pruned data gradient."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .. import backends, semi_structured
from ..backends import Key, Products
from ..ops import linear_input_grad_nm, prune_nm
from ..pattern import PatternLike, Pruning
from ._shared import OptionalTensor, autocast, has_data_gradient, once, rescaled, rows


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pattern: PatternLike = "2:4",
    method: str = "mvue",
    backend: str = "auto",
) -> Tensor:
    """``torch.nn.functional.linear`` whose data gradient is taken from a pruned output gradient.

        y = x Wᵀ + b,  dx = prune_nm(dy, n, m) W,  dW = dyᵀ x,  db = Σ dy

    Args:
        input: (..., in), any number of leading dimensions; float32, float64, float16 or bfloat16.
        weight: (out, in).
        bias: (out) or None.
        pattern: ``"n:m"``, ``(n, m)`` or a ``sdgp.Pattern``: groups of m output features.
        method: see ``sdgp.prune_nm``.
        backend: ``"auto"``: the faster of the sparse product and the exact dense one, measured at the first backward of
            a shape, and exact where dense is. ``"pruned"``: always prunes, then takes the faster product.
            ``"sparse"``, ``"dense"``: prunes and forces that product.

    Returns:
        (..., out), exactly what ``torch.nn.functional.linear`` returns, under autocast too.

    Raises:
        ValueError: ``linear: requirement, got actual``.
        RuntimeError: at a second differentiation.

    Examples:
        >>> x = torch.randn(8, 16, requires_grad=True)
        >>> sdgp.linear(x, torch.randn(32, 16), pattern="2:4", backend="pruned").sum().backward()
    """
    if weight.ndim != 2 or input.ndim < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            "linear: expected input (..., in) and weight (out, in), "
            f"got input {tuple(input.shape)} and weight {tuple(weight.shape)}"
        )
    return pruned_linear(input, weight, bias, Pruning.parse("linear", pattern, method, backend))[0]


def pruned_linear(input: Tensor, weight: Tensor, bias: OptionalTensor, pruning: Pruning) -> tuple[Tensor, Key | None]:
    """``linear`` for settings that are known to be good; and the key of its choice, None where there is none."""
    work = input.numel() * weight.shape[0]
    if not has_data_gradient(input) or backends.stays_exact(pruning, work):
        return F.linear(input, weight, bias), None
    if (sharded := backends.sharded("linear", pruning, input, weight)) is not None:
        return F.linear(input, weight, bias), sharded
    input, weight, bias = autocast(input, weight, bias)
    key = backends.make_key(pruning, work, input, weight)
    if pruning.backend == "auto" and backends.found_exact(key):
        return F.linear(input, weight, bias), key
    output: Tensor = _Linear.apply(input, weight, bias, pruning, key)
    return output, key


class _Linear(Function):
    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: OptionalTensor, pruning: Pruning, key: Key) -> Tensor:
        return F.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, ctx.pruning, ctx.key = inputs
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight)  # frozen weights keep no input

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[OptionalTensor, ...]:
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            products = linear_products(grad_output, weight, ctx.pruning, ctx.key)
            grad_input = backends.data_gradient("linear", products, ctx.pruning)
        if ctx.needs_input_grad[1]:
            grad, samples = rows(grad_output), rows(input)
            # Laid out as the weight, as ATen does: else what accumulates the gradient copies it.
            grad_weight = grad.t() @ samples if weight.is_contiguous() else (samples.t() @ grad).t()
        if ctx.needs_input_grad[2]:
            grad_bias = rows(grad_output).sum(0)
        gradients = once("linear", (grad_output, weight, input), grad_input, grad_weight, grad_bias)
        return *gradients, None, None


def linear_products(grad_output: Tensor, weight: Tensor, pruning: Pruning, key: Key) -> Products:
    """The data gradient of a linear layer: exact, pruned, and sparse."""
    (n, m), method, _ = pruning

    def sparse(seed: OptionalTensor) -> Tensor:
        grad, rest = rescaled(grad_output, -1, pruning)
        if grad.is_cuda:
            operand = semi_structured.pack(rows(grad), pruning.pattern, rest, seed)
            return semi_structured.multiply(operand, weight).reshape(*grad.shape[:-1], weight.shape[1])
        return linear_input_grad_nm(grad, weight, n, m, rest, seed)

    return Products(
        key,
        grad_output.device,
        lambda: backends.obstacle(pruning, grad_output),
        dense=lambda: grad_output @ weight,
        pruned=lambda seed: prune_nm(grad_output, n, m, -1, method, seed) @ weight,
        sparse=sparse,
    )

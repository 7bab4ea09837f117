# SPDX-License-Identifier: BSD-3-Clause
"""linear with a pruned data gradient and, on request, a pruned weight gradient."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .. import _semi_structured
from .._decision import Site
from .._ops import prune_nm, prune_nm_matmul
from .._pattern import PatternLike, Pruning, WeightGradLike
from .._rules import obstacle
from .._semi_structured import DEFAULT, Algorithm, Operand
from ._autocast import OptionalTensor, autocast
from ._backward import decide, detached, forward_derivative, pruned_gradient, rescaled, rows, strided, wanted
from ._call import Call, Layer, in_transform, save, site_of, start


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pattern: PatternLike = "2:4",
    method: str = "mvue",
    backend: str = "auto",
    weight_grad: WeightGradLike | None = None,
) -> Tensor:
    """Applies ``torch.nn.functional.linear`` and computes its data gradient from a pruned output gradient.

        y = x Wᵀ + b,  dx = prune_nm(dy, n, m) W,  dW = dyᵀ x,  db = Σ dy

    With ``weight_grad``, the weight gradient is pruned too: dW = prune_nm(dyᵀ) x. There a group is m consecutive rows
    (all leading dimensions, flattened) of one output feature. Each product draws its own random numbers. Bias gradients
    are exact.

    Args:
        input: (..., in), any number of leading dimensions; float32, float64, float16 or bfloat16.
        weight: (out, in).
        bias: (out) or None.
        pattern: ``"n:m"``, ``(n, m)`` or a ``sdgp.Pattern``; a group is m output features.
        method: a method of ``sdgp.prune_nm``.
        backend: which product computes dx, and dW if that is pruned. Each of them has its own choice.

            - ``"auto"``: the sparse product if it is faster than the exact one, else the exact product, which prunes
              nothing. Both are measured in the first backward of each shape.
            - ``"pruned"``: always prunes, and uses the faster of the sparse and the dense product.
            - ``"sparse"``, ``"dense"``: always prunes, and uses that product.
        weight_grad: how to prune the gradient that enters dW: a pattern, or (pattern, method). The default method is
            ``"mvue"``. It should be unbiased. With None, or with fewer than m rows, dW is exact. To prune only dW, pass
            a ``pattern`` with n == m, such as ``"1:1"``.

    Returns:
        (..., out), exactly what ``torch.nn.functional.linear`` returns, also under autocast.

    Raises:
        ValueError: If an argument is not valid: ``linear: requirement, got actual``.
        RuntimeError: If a pruned gradient is differentiated again. Under ``"auto"`` the gradient is exact then.

    Source: McDanel, Dinh, Magallanes, "Accelerating DNN Training with Structured Data Gradient Pruning", 2022.

    Examples:
        >>> x = torch.randn(8, 16, requires_grad=True)
        >>> sdgp.linear(x, torch.randn(32, 16), pattern="2:4", backend="pruned").sum().backward()
    """
    if torch.overrides.has_torch_function((input, weight)):
        settings: dict[str, Any] = {
            "pattern": pattern,
            "method": method,
            "backend": backend,
            "weight_grad": weight_grad,
        }
        result: Tensor = torch.overrides.handle_torch_function(linear, (input, weight), input, weight, bias, **settings)
        return result
    if not input.is_nested and (weight.ndim != 2 or input.ndim < 1 or input.shape[-1] != weight.shape[1]):
        raise ValueError(
            "linear: expected input (..., in) and weight (out, in), "
            f"got input {tuple(input.shape)} and weight {tuple(weight.shape)}"
        )
    return pruned_linear(input, weight, bias, Pruning.parse("linear", pattern, method, backend, weight_grad))


def pruned_linear(
    input: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    pruning: Pruning,
    held: str = "",
    layer: Layer | None = None,
    transposed: bool = False,
) -> Tensor:
    """Computes ``linear`` with settings that were checked.

    Args:
        held: why the gradients are exact in spite of the settings; empty if the settings apply.
        layer: the layer that learns the decisions of the backward.
        transposed: whether ``weight`` is (in, out), as in the Conv1D of transformers.
    """

    def make_site(dtype: torch.dtype) -> Site:
        return site_of("linear", dtype, pruning, input, weight, transposed=transposed)

    if input.ndim == 0:
        return _linear(input, weight, bias, transposed)  # PyTorch's own error
    work = input.numel() * weight.shape[1 if transposed else 0]
    call = start("linear", pruning, held, layer, input, weight, work, make_site, partial(count_rows, input))
    if call is None:
        return _linear(input, weight, bias, transposed)
    function: type[Function] = _LinearInTransform if not torch.compiler.is_compiling() and in_transform() else _Linear
    output: Tensor = function.apply(*autocast(input, weight, bias), call, transposed)
    return output


def count_rows(input: Tensor) -> int:
    """Returns the number of rows of an input (..., features)."""
    return input.numel() // max(input.shape[-1], 1)


def _linear(input: Tensor, weight: Tensor, bias: OptionalTensor, transposed: bool) -> Tensor:
    return F.linear(input, weight.t() if transposed else weight, bias)


class _Linear(Function):
    # A forward that takes the context has the least call overhead. Transforms need _LinearInTransform.
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: OptionalTensor, call: Call, transposed: bool) -> Tensor:
        _save(ctx, input, weight, bias, call, transposed)
        output = _linear(input, weight, bias, transposed)
        if not torch.compiler.is_compiling() and output._is_view():
            # Autograd does not allow changes in place to a view of a tensor that a Function made.
            output = torch.ops.aten._unsafe_view(output, output.shape)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: OptionalTensor) -> tuple[OptionalTensor, ...]:
        if grad_output is None:
            return None, None, None, None, None
        *_, weight, input = ctx.saved_tensors
        return *_gradients(ctx, grad_output, input, weight, wanted(ctx)), None, None


class _LinearInTransform(Function):
    """``_Linear`` for the transforms of torch.func and forward-mode differentiation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: OptionalTensor, call: Call, transposed: bool) -> Tensor:
        return _linear(input, weight, bias, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, bias, call, transposed = inputs
        _save(ctx, input, weight, bias, call, transposed, jvp=True)

    @staticmethod
    def backward(ctx: Any, grad_output: OptionalTensor) -> tuple[OptionalTensor, ...]:
        if grad_output is None:
            return None, None, None, None, None
        *_, weight, input = ctx.saved_tensors
        return *_gradients(ctx, grad_output, input, weight, ctx.needs_input_grad[:3]), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return forward_derivative(ctx, tangents, lambda x, w: _linear(x, w, None, ctx.transposed))


def _save(
    ctx: Any, input: Tensor, weight: Tensor, bias: OptionalTensor, call: Call, transposed: bool, jvp: bool = False
) -> None:
    ctx.call, ctx.transposed = call, transposed
    ctx.bias_shape = None if bias is None or bias.ndim < 2 else bias.shape  # F.linear broadcasts any bias
    # Save the leaf itself: a view would keep memory that ZeRO releases between forward and backward.
    save(ctx, weight, input, jvp=jvp)


def _gradients(
    ctx: Any, grad_output: Tensor, input: OptionalTensor, weight: Tensor, needs: Any
) -> tuple[OptionalTensor, OptionalTensor, OptionalTensor]:
    grad_input = grad_weight = grad_bias = None
    call: Call = ctx.call
    grad_output = strided(grad_output)
    if needs[0]:
        products = LinearProducts(grad_output, weight.t() if ctx.transposed else weight, call.data.pruning)
        decision = decide(call, call.data, products)
        if decision.prunes:
            grad_input = pruned_gradient(call, "data", products, decision, grad_output, weight)
        else:
            grad_input = products.exact()
    if needs[1] or needs[2]:
        grad = rows(grad_output)
        if needs[1]:
            assert input is not None
            grad_weight = _weight_gradient(call, grad, rows(input), weight, ctx.transposed)
        if needs[2]:
            grad_bias = grad.sum(0) if ctx.bias_shape is None else grad_output.sum_to_size(ctx.bias_shape)
    return grad_input, grad_weight, grad_bias


def _weight_gradient(call: Call, grad: Tensor, samples: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    if call.weight is None:
        return _multiply_rows(grad, samples, weight, transposed)
    products = LinearWeightProducts(grad, samples, weight, transposed, call.weight.pruning)
    decision = decide(call, call.weight, products)
    if not decision.prunes:
        return products.exact()
    return pruned_gradient(call, "weight", products, decision, grad, samples)


def _multiply_rows(grad: Tensor, samples: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    # The result has the layout of the weight, as in ATen. Otherwise gradient accumulation copies it.
    if transposed:
        return samples.t() @ grad if weight.is_contiguous() else (grad.t() @ samples).t()
    return grad.t() @ samples if weight.is_contiguous() else (samples.t() @ grad).t()


@dataclass(slots=True)
class LinearProducts:
    """The data gradient of a linear layer (``Products``). ``weight`` is (out, in)."""

    grad_output: Tensor
    weight: Tensor
    pruning: Pruning

    @property
    def work(self) -> int:
        return self.grad_output.numel() * self.weight.shape[1]

    def obstacle(self) -> str | None:
        return obstacle("linear", "data", self.pruning, self.grad_output.device, self.grad_output.dtype)

    def exact(self) -> Tensor:
        return self.grad_output @ self.weight

    def dense(self, seed: OptionalTensor = None) -> Tensor:
        n, m = self.pruning.pattern
        return prune_nm(detached(self.grad_output), n, m, -1, self.pruning.method, seed) @ self.weight

    def sparse(self, seed: OptionalTensor = None, algorithm: Algorithm = DEFAULT) -> Tensor:
        n, m = self.pruning.pattern
        if self.grad_output.is_cuda:
            product = _semi_structured.multiply(*self.operands(seed), algorithm)
            return product.reshape(*self.grad_output.shape[:-1], self.weight.shape[1])
        grad, method = rescaled(detached(self.grad_output), -1, self.pruning)
        return prune_nm_matmul(grad, self.weight, n, m, method, seed)

    def operands(self, seed: OptionalTensor = None) -> tuple[Operand, Tensor]:
        grad, method = rescaled(detached(self.grad_output), -1, self.pruning)
        return _semi_structured.pack(rows(grad), self.pruning.pattern, method, seed), self.weight


@dataclass(slots=True)
class LinearWeightProducts:
    """The weight gradient of a linear layer (``Products``), in the layout of the weight.

    Attributes:
        grad_output: (rows, out).
        input: (rows, in).
        weight: only its layout matters.
        transposed: whether ``weight`` is (in, out).
    """

    grad_output: Tensor
    input: Tensor
    weight: Tensor
    transposed: bool
    pruning: Pruning

    @property
    def work(self) -> int:
        return self.grad_output.numel() * self.input.shape[1]

    def obstacle(self) -> str | None:
        return obstacle("linear", "weight", self.pruning, self.grad_output.device, self.grad_output.dtype)

    def exact(self) -> Tensor:
        return _multiply_rows(self.grad_output, self.input, self.weight, self.transposed)

    def dense(self, seed: OptionalTensor = None) -> Tensor:
        n, m = self.pruning.pattern
        grad = prune_nm(detached(self.grad_output).t(), n, m, -1, self.pruning.method, seed).t()
        return _multiply_rows(grad, self.input, self.weight, self.transposed)

    def sparse(self, seed: OptionalTensor = None, algorithm: Algorithm = DEFAULT) -> Tensor:
        n, m = self.pruning.pattern
        if self.grad_output.is_cuda:
            result = _semi_structured.multiply(*self.operands(seed), algorithm)  # (out, in)
        else:
            grad, method = rescaled(detached(self.grad_output).t(), -1, self.pruning)
            result = prune_nm_matmul(grad, self.input, n, m, method, seed)
        if self.transposed:
            result = result.t()
        return result.contiguous() if self.weight.is_contiguous() else result.t().contiguous().t()

    def operands(self, seed: OptionalTensor = None) -> tuple[Operand, Tensor]:
        grad, method = rescaled(detached(self.grad_output).t(), -1, self.pruning)
        return _semi_structured.pack(grad, self.pruning.pattern, method, seed), self.input

# SPDX-License-Identifier: BSD-3-Clause
"""linear with a pruned data gradient, and on request a pruned weight gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .. import _semi_structured
from .._choose import obstacle
from .._decision import Site
from .._ops import prune_nm, prune_nm_matmul
from .._pattern import PatternLike, Pruning, WeightGradLike
from ._autocast import OptionalTensor, autocast
from ._backward import decide, detached, forward_derivative, pruned_gradient, rescaled, rows, wanted
from ._call import Call, Layer, exponent, in_transform, save, start


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
    """``torch.nn.functional.linear`` whose data gradient is computed from a pruned output gradient.

        y = x Wᵀ + b,  dx = prune_nm(dy, n, m) W,  dW = dyᵀ x,  db = Σ dy

    With ``weight_grad`` the weight gradient is, too: dW = prune_nm(dyᵀ) x, in groups of m consecutive rows (all leading
    dimensions, flattened), per output feature. Each product draws by itself. Bias gradients are exact.

    Args:
        input: (..., in), any number of leading dimensions; float32, float64, float16 or bfloat16.
        weight: (out, in).
        bias: (out) or None.
        pattern: ``"n:m"``, ``(n, m)`` or a ``sdgp.Pattern``: groups of m output features.
        method: see ``sdgp.prune_nm``.
        backend: which product computes dx, and which dW where that is pruned: one choice each.

            - ``"auto"``: the sparse product where it is faster than the exact one, else the exact one, which prunes
              nothing. Both are measured in the first backward of each shape.
            - ``"pruned"``: always prunes, and takes the faster of the sparse and the dense product.
            - ``"sparse"``, ``"dense"``: prunes and takes that product.
        weight_grad: None: dW is exact. A pattern, or (pattern, method): how its gradient is pruned; the method is
            ``"mvue"`` if none is given, which alone is unbiased. With fewer than m rows dW is exact. A pattern of
            n == m, such as ``"1:1"``, leaves dx exact beside it.

    Returns:
        (..., out), exactly what ``torch.nn.functional.linear`` returns, under autocast too.

    Raises:
        ValueError: ``linear: requirement, got actual``.
        RuntimeError: where a pruned gradient is differentiated again. Under ``"auto"`` the gradient is exact then.

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
    """``linear`` for settings that are known to be good.

    Args:
        held: why the gradients are exact whatever the settings say; empty: the settings count.
        layer: learns the decisions of the backward.
        transposed: ``weight`` is (in, out), as in transformers' Conv1D.
    """

    def make_site(dtype: torch.dtype) -> Site:
        return Site(
            op="linear",
            device=input.device,
            dtype=dtype,
            threads=torch.get_num_threads(),
            pruning=pruning.data,
            weight_shape=weight.shape,
            weight_contiguous=weight.is_contiguous(),
            values=exponent(input.numel()),
        )

    def count_rows() -> int:
        return input.numel() // max(input.shape[-1], 1)

    work = input.numel() * weight.shape[1 if transposed else 0]
    call = start("linear", pruning, held, layer, input, weight, work, make_site, count_rows)
    if call is None:
        return _linear(input, weight, bias, transposed)
    function: type[Function] = _LinearInTransform if not torch.compiler.is_compiling() and in_transform() else _Linear
    output: Tensor = function.apply(*autocast(input, weight, bias), call, transposed)
    return output


def _linear(input: Tensor, weight: Tensor, bias: OptionalTensor, transposed: bool) -> Tensor:
    return F.linear(input, weight.t() if transposed else weight, bias)


class _Linear(Function):
    # PyTorch calls a forward that takes the context with the least overhead; transforms need _LinearInTransform.
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: OptionalTensor, call: Call, transposed: bool) -> Tensor:
        _save(ctx, input, weight, call, transposed)
        output = _linear(input, weight, bias, transposed)
        if not torch.compiler.is_compiling() and output._is_view():
            # Of a tensor made in here: autograd refuses to modify such a view in place.
            output = torch.ops.aten._unsafe_view(output, output.shape)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[OptionalTensor, ...]:
        *_, weight, input = ctx.saved_tensors
        return *_gradients(ctx, grad_output, input, weight, wanted(ctx)), None, None


class _LinearInTransform(Function):
    """The same for torch.func's transforms and forward-mode differentiation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: OptionalTensor, call: Call, transposed: bool) -> Tensor:
        return _linear(input, weight, bias, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, call, transposed = inputs
        _save(ctx, input, weight, call, transposed)
        ctx.save_for_forward(input, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[OptionalTensor, ...]:
        *_, weight, input = ctx.saved_tensors
        return *_gradients(ctx, grad_output, input, weight, ctx.needs_input_grad[:3]), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return forward_derivative(ctx, tangents, lambda x, w: _linear(x, w, None, ctx.transposed))


def _save(ctx: Any, input: Tensor, weight: Tensor, call: Call, transposed: bool) -> None:
    ctx.call, ctx.transposed = call, transposed
    # The leaf itself, no view of it: what releases its memory between forward and backward (ZeRO) finds no other owner.
    save(ctx, weight, input)


def _gradients(
    ctx: Any, grad_output: Tensor, input: OptionalTensor, weight: Tensor, needs: Any
) -> tuple[OptionalTensor, OptionalTensor, OptionalTensor]:
    grad_input = grad_weight = grad_bias = None
    call: Call = ctx.call
    if needs[0]:
        products = LinearProducts(grad_output, weight.t() if ctx.transposed else weight, call.data.pruning)
        decision = decide(call, call.data, products)
        if decision.prunes:
            grad_input = pruned_gradient(call, "data", products, decision, grad_output, weight)
        else:
            grad_input = products.exact()
    grad = rows(grad_output)
    if needs[1]:
        assert input is not None
        grad_weight = _weight_gradient(call, grad, rows(input), weight, ctx.transposed)
    if needs[2]:
        grad_bias = grad.sum(0)
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
    # Laid out as the weight, as ATen does: else what accumulates the gradient copies it.
    if transposed:
        return samples.t() @ grad if weight.is_contiguous() else (grad.t() @ samples).t()
    return grad.t() @ samples if weight.is_contiguous() else (samples.t() @ grad).t()


@dataclass(slots=True)
class LinearProducts:
    """The data gradient of a linear layer, see ``Products``; ``weight`` is (out, in)."""

    grad_output: Tensor
    weight: Tensor
    pruning: Pruning

    @property
    def work(self) -> int:
        return self.grad_output.numel() * self.weight.shape[1]

    def obstacle(self) -> str | None:
        return obstacle(self.pruning, self.grad_output.device, self.grad_output.dtype)

    def exact(self) -> Tensor:
        return self.grad_output @ self.weight

    def dense(self, seed: OptionalTensor = None) -> Tensor:
        n, m = self.pruning.pattern
        return prune_nm(detached(self.grad_output), n, m, -1, self.pruning.method, seed) @ self.weight

    def sparse(self, seed: OptionalTensor = None) -> Tensor:
        n, m = self.pruning.pattern
        grad, method = rescaled(detached(self.grad_output), -1, self.pruning)
        if grad.is_cuda:
            operand = _semi_structured.pack(rows(grad), self.pruning.pattern, method, seed)
            return _semi_structured.multiply(operand, self.weight).reshape(*grad.shape[:-1], self.weight.shape[1])
        return prune_nm_matmul(grad, self.weight, n, m, method, seed)


@dataclass(slots=True)
class LinearWeightProducts:
    """The weight gradient of a linear layer, see ``Products``, laid out as the weight.

    Attributes:
        grad_output: (rows, out).
        input: (rows, in).
        weight: only its layout counts.
        transposed: it is (in, out).
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
        return obstacle(self.pruning, self.grad_output.device, self.grad_output.dtype, gradient="weight")

    def exact(self) -> Tensor:
        return _multiply_rows(self.grad_output, self.input, self.weight, self.transposed)

    def dense(self, seed: OptionalTensor = None) -> Tensor:
        n, m = self.pruning.pattern
        grad = prune_nm(detached(self.grad_output).t(), n, m, -1, self.pruning.method, seed).t()
        return _multiply_rows(grad, self.input, self.weight, self.transposed)

    def sparse(self, seed: OptionalTensor = None) -> Tensor:
        n, m = self.pruning.pattern
        grad, method = rescaled(detached(self.grad_output).t(), -1, self.pruning)
        result = prune_nm_matmul(grad, self.input, n, m, method, seed)  # (out, in)
        if self.transposed:
            result = result.t()
        return result.contiguous() if self.weight.is_contiguous() else result.t().contiguous().t()

# SPDX-License-Identifier: BSD-3-Clause
"""conv2d with a pruned data gradient and, on request, a pruned weight gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .._decision import Products, Site
from .._pattern import PatternLike, Pruning, WeightGradLike
from ._autocast import OptionalTensor, autocast
from ._backward import decide, forward_derivative, pruned_gradient, strided, wanted
from ._call import Call, Layer, exponent, in_transform, save, site_of, start
from ._conv2d_products import (
    Conv2dProducts,
    Conv2dWeightProducts,
    Geometry,
    Pair,
    convolution_backward,
    is_channels_last,
    multiply_adds,
)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    pattern: PatternLike = "2:4",
    method: str = "mvue",
    backend: str = "auto",
    weight_grad: WeightGradLike | None = None,
) -> Tensor:
    """Applies ``torch.nn.functional.conv2d`` and computes its data gradient from a pruned output gradient.

        dx = the exact data gradient of prune_nm(dy, n, m, dim=1)

    A group is m consecutive output channels of one pixel and never crosses a convolution group. The forward and the
    bias gradient are exact. With ``weight_grad``, the weight gradient is also computed from a pruned output gradient.
    There a group is m consecutive output pixels, row by row, of one channel of one sample. The last group may be
    shorter:

        dW = the exact weight gradient of prune_nm(dy.flatten(2), n, m).view_as(dy)

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, float16 or bfloat16.
        weight: (out, C / groups, kH, kW).
        bias: (out) or None.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``; padding also ``"same"``, ``"valid"``.
        pattern, method, backend, weight_grad: as in ``sdgp.linear``. With fewer than m output pixels dW is exact.

    Returns:
        (N, out, H', W') or (out, H', W'), exactly what ``torch.nn.functional.conv2d`` returns.

    Raises:
        ValueError: If an argument is not valid: ``conv2d: requirement, got actual``.
        RuntimeError: If a pruned gradient is differentiated again. Under ``"auto"`` the gradient is exact then.

    Source: McDanel, Dinh, Magallanes, "Accelerating DNN Training with Structured Data Gradient Pruning", 2022.

    Examples:
        >>> x = torch.randn(2, 3, 8, 8, requires_grad=True)
        >>> sdgp.conv2d(x, torch.randn(16, 3, 3, 3), padding=1, pattern="2:4", backend="pruned").sum().backward()
    """
    if torch.overrides.has_torch_function((input, weight)):
        settings: dict[str, Any] = {
            "pattern": pattern,
            "method": method,
            "backend": backend,
            "weight_grad": weight_grad,
        }
        result: Tensor = torch.overrides.handle_torch_function(
            conv2d, (input, weight), input, weight, bias, stride, padding, dilation, groups, **settings
        )
        return result
    if input.ndim not in (3, 4) or weight.ndim != 4 or input.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"conv2d: expected input (N, C, H, W) or (C, H, W) and weight (out, C / {groups}, kH, kW), "
            f"got input {tuple(input.shape)} and weight {tuple(weight.shape)}"
        )
    pruning = Pruning.parse("conv2d", pattern, method, backend, weight_grad)
    return pruned_conv2d(input, weight, bias, stride, padding, dilation, groups, pruning)


def pruned_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    stride: int | Pair,
    padding: int | Pair | str,
    dilation: int | Pair,
    groups: int,
    pruning: Pruning,
    held: str = "",
    layer: Layer | None = None,
) -> Tensor:
    """Computes ``conv2d`` with settings that were checked. ``held`` and ``layer`` are as in ``pruned_linear``."""

    def make_site(dtype: torch.dtype) -> Site:
        return site_of(
            "conv2d",
            dtype,
            pruning,
            input,
            weight,
            pixels=exponent(input.shape[-2] * input.shape[-1]),
            groups=groups,
            geometry=(*_pair(stride), *((padding,) if isinstance(padding, str) else _pair(padding)), *_pair(dilation)),
            channels_last=input.ndim == 4 and is_channels_last(input),
        )

    def count_pixels() -> int:
        return _output_pixels(input, weight, stride, padding, dilation)

    if input.ndim not in (3, 4):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)  # PyTorch's own error
    work = multiply_adds(input, weight, groups)
    call = start("conv2d", pruning, held, layer, input, weight, work, make_site, count_pixels)
    if call is None:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    input, geometry = conv2d_geometry(input, weight, stride, padding, dilation, groups)
    batched = input if input.ndim == 4 else input.unsqueeze(0)
    function: type[Function] = _Conv2dInTransform if not torch.compiler.is_compiling() and in_transform() else _Conv2d
    output: Tensor = function.apply(*autocast(batched, weight, bias), call, geometry)
    return output if input.ndim == 4 else output.squeeze(0)


def conv2d_geometry(
    input: Tensor,
    weight: Tensor,
    stride: int | Pair,
    padding: int | Pair | str,
    dilation: int | Pair,
    groups: int,
) -> tuple[Tensor, Geometry]:
    """Returns the input and the geometry in numbers. If the padding is uneven, it pads the input."""
    stride, dilation = _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        input, padding = _pad(input, weight, stride, padding, dilation)
    return input, Geometry(stride, _pair(padding), dilation, groups)


class _Conv2d(Function):
    # As in _linear.py, forward takes the context for speed, and transforms use a second Function.
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: OptionalTensor, call: Call, geometry: Geometry
    ) -> Tensor:
        _save(ctx, input, weight, call, geometry)
        return F.conv2d(input, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad_output: OptionalTensor) -> tuple[OptionalTensor, ...]:
        if grad_output is None:
            return None, None, None, None, None
        *_, weight, input = ctx.saved_tensors
        return *_gradients(ctx, grad_output, input, weight, wanted(ctx)), None, None


class _Conv2dInTransform(Function):
    """``_Conv2d`` for the transforms of torch.func and forward-mode differentiation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: OptionalTensor, call: Call, geometry: Geometry) -> Tensor:
        return F.conv2d(input, weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, call, geometry = inputs
        _save(ctx, input, weight, call, geometry, jvp=True)

    @staticmethod
    def backward(ctx: Any, grad_output: OptionalTensor) -> tuple[OptionalTensor, ...]:
        if grad_output is None:
            return None, None, None, None, None
        *_, weight, input = ctx.saved_tensors
        return *_gradients(ctx, grad_output, input, weight, ctx.needs_input_grad[:3]), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        input_t, weight_t, bias_t, *_ = tangents
        bias_t = None if bias_t is None else bias_t[:, None, None]
        return forward_derivative(ctx, (input_t, weight_t, bias_t), lambda x, w: F.conv2d(x, w, None, *ctx.geometry))


def _save(ctx: Any, input: Tensor, weight: Tensor, call: Call, geometry: Geometry, jvp: bool = False) -> None:
    ctx.call, ctx.geometry, ctx.input_shape = call, geometry, input.shape
    ctx.channels_last = is_channels_last(input)
    save(ctx, weight, input, jvp=jvp)


def _gradients(
    ctx: Any, grad_output: Tensor, input: OptionalTensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[OptionalTensor, OptionalTensor, OptionalTensor]:
    needs_input, needs_weight, needs_bias = needs
    grad_output = strided(grad_output)
    if input is None:  # ATen reads only its shape and memory format
        memory_format = torch.channels_last if ctx.channels_last else torch.contiguous_format
        input = torch.empty_like(grad_output.new_empty(ctx.input_shape), memory_format=memory_format)
    grad_input: OptionalTensor = None
    grad_weight: OptionalTensor = None
    call: Call = ctx.call
    if needs_input:
        products: Products = Conv2dProducts(grad_output, input, weight, ctx.geometry, call.data.pruning)
        decision = decide(call, call.data, products)
        if decision.prunes:
            grad_input = pruned_gradient(call, "data", products, decision, grad_output, weight, input)
    if needs_weight and call.weight is not None:
        products = Conv2dWeightProducts(grad_output, input, weight, ctx.geometry, call.weight.pruning)
        decision = decide(call, call.weight, products)
        if decision.prunes:
            grad_weight = pruned_gradient(call, "weight", products, decision, grad_output, input)
    # One call computes all exact gradients. If nothing is pruned, it is the call of the plain layer. If it need not
    # compute the weight gradient, a sum gives the bias gradient, because oneDNN would compute both.
    mask = (needs_input and grad_input is None, needs_weight and grad_weight is None, needs_bias)
    prunes = grad_input is not None or grad_weight is not None
    grad_bias: OptionalTensor = None
    if prunes and needs_bias and not mask[1]:
        mask = (mask[0], False, False)
        grad_bias = grad_output.sum((0, 2, 3))
    if any(mask):
        exact = convolution_backward(grad_output, input, weight, ctx.geometry, mask)
        grad_input, grad_weight, grad_bias = (
            found if taken else other
            for taken, found, other in zip(mask, exact, (grad_input, grad_weight, grad_bias), strict=True)
        )
    return grad_input, grad_weight, grad_bias


def _output_pixels(
    input: Tensor, weight: Tensor, stride: int | Pair, padding: int | Pair | str, dilation: int | Pair
) -> int:
    """Returns the number of output pixels of one sample. ATen refuses a convolution without output pixels."""
    if padding == "same":
        return input.shape[-2] * input.shape[-1]
    pads = (0, 0) if isinstance(padding, str) else _pair(padding)
    height, width = (
        (size + 2 * p - d * (k - 1) - 1) // max(s, 1) + 1
        for size, k, s, p, d in zip(
            input.shape[-2:], weight.shape[2:], _pair(stride), pads, _pair(dilation), strict=True
        )
    )
    return height * width


def _pair(value: int | Pair) -> Pair:
    if isinstance(value, int):
        return value, value
    if len(value) not in (1, 2):
        raise ValueError(f"conv2d: expected stride, padding and dilation to be a number or a pair, got {value!r}")
    return value[0], value[-1]


def _pad(input: Tensor, weight: Tensor, stride: Pair, padding: str, dilation: Pair) -> tuple[Tensor, Pair]:
    """Turns "same" and "valid" into numbers. If "same" is uneven, it pads the input with what one side has more."""
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise ValueError(f'conv2d: expected padding to be a number, a pair, "same" or "valid", got {padding!r}')
    if stride != (1, 1):
        raise ValueError(f'conv2d: expected stride 1 with padding="same", got {stride}')
    total_h, total_w = (d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True))
    if total_h % 2 or total_w % 2:
        input = F.pad(input, (0, total_w % 2, 0, total_h % 2))
    return input, (total_h // 2, total_w // 2)

# SPDX-License-Identifier: BSD-3-Clause
"""conv2d with a pruned data gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .. import backends, semi_structured
from ..backends import Key, Products
from ..ops import conv2d_input_grad_nm, prune_nm
from ..pattern import PatternLike, Pruning
from ._shared import OptionalTensor, autocast, has_data_gradient, once, rescaled, rows

_Pair: TypeAlias = tuple[int, int]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | _Pair = 1,
    padding: int | _Pair | str = 0,
    dilation: int | _Pair = 1,
    groups: int = 1,
    *,
    pattern: PatternLike = "2:4",
    method: str = "mvue",
    backend: str = "auto",
) -> Tensor:
    """``torch.nn.functional.conv2d`` whose data gradient is taken from a pruned output gradient.

    Groups of m are consecutive output channels of one pixel and never cross a convolution group; forward, weight and
    bias gradient are exact.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, float16 or bfloat16.
        weight: (out, C / groups, kH, kW).
        bias: (out) or None.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``; padding also ``"same"``, ``"valid"``.
        pattern, method, backend: see ``sdgp.linear``.

    Returns:
        (N, out, H', W') or (out, H', W'), exactly what ``torch.nn.functional.conv2d`` returns.

    Raises:
        ValueError: ``conv2d: requirement, got actual``.
        RuntimeError: at a second differentiation.

    Examples:
        >>> x = torch.randn(2, 3, 8, 8, requires_grad=True)
        >>> sdgp.conv2d(x, torch.randn(16, 3, 3, 3), padding=1, pattern="2:4", backend="pruned").sum().backward()
    """
    if input.ndim not in (3, 4) or weight.ndim != 4 or input.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"conv2d: expected input (N, C, H, W) or (C, H, W) and weight (out, C / {groups}, kH, kW), "
            f"got input {tuple(input.shape)} and weight {tuple(weight.shape)}"
        )
    pruning = Pruning.parse("conv2d", pattern, method, backend)
    return pruned_conv2d(input, weight, bias, stride, padding, dilation, groups, pruning)[0]


def pruned_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    stride: int | _Pair,
    padding: int | _Pair | str,
    dilation: int | _Pair,
    groups: int,
    pruning: Pruning,
) -> tuple[Tensor, Key | None]:
    """``conv2d`` for settings that are known to be good; and the key of its choice, None where there is none."""
    work = input.numel() * weight.shape[0] // groups * weight.shape[2] * weight.shape[3]  # at stride 1
    if not has_data_gradient(input) or backends.stays_exact(pruning, work):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups), None
    if (sharded := backends.sharded("conv2d", pruning, input, weight)) is not None:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups), sharded
    input, geometry = conv2d_geometry(input, weight, stride, padding, dilation, groups)
    input, weight, bias = autocast(input, weight, bias)
    batched = input if input.ndim == 4 else input.unsqueeze(0)
    *window, groups = geometry
    shape = batched.shape[2:], batched.is_contiguous()
    key = backends.make_key(pruning, work, batched, weight, *shape, *window, groups=groups)
    if pruning.backend == "auto" and backends.found_exact(key):
        return F.conv2d(input, weight, bias, *geometry), key
    output: Tensor = _Conv2d.apply(batched, weight, bias, *geometry, pruning, key)
    return output if input.ndim == 4 else output.squeeze(0), key


def conv2d_geometry(
    input: Tensor,
    weight: Tensor,
    stride: int | _Pair,
    padding: int | _Pair | str,
    dilation: int | _Pair,
    groups: int,
) -> tuple[Tensor, tuple[_Pair, _Pair, _Pair, int]]:
    """The input and (stride, padding, dilation, groups) in numbers; where padding is uneven, the input is padded."""
    stride, dilation = _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        input, padding = _pad(input, weight, stride, padding, dilation)
    return input, (stride, _pair(padding), dilation, groups)


class _Conv2d(Function):
    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: OptionalTensor,
        stride: _Pair,
        padding: _Pair,
        dilation: _Pair,
        groups: int,
        pruning: Pruning,
        key: Key,
    ) -> Tensor:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, *ctx.geometry, ctx.pruning, ctx.key = inputs
        ctx.input_shape = input.shape
        ctx.channels_last = input.is_contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight)  # frozen weights keep no input

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[OptionalTensor, ...]:
        input, weight = ctx.saved_tensors
        anchors = (grad_output, weight, input)
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if input is None:  # ATen reads its shape and memory format, not its values
            memory_format = torch.channels_last if ctx.channels_last else torch.contiguous_format
            input = torch.empty_like(grad_output.new_empty(ctx.input_shape), memory_format=memory_format)
        grad_input = grad_weight = grad_bias = None
        if needs_input:
            products = conv2d_products(grad_output, input, weight, ctx.geometry, ctx.pruning, ctx.key)
            grad_input = backends.data_gradient("conv2d", products, ctx.pruning)
        if needs_weight or needs_bias:
            mask = (False, needs_weight, needs_bias)
            _, grad_weight, grad_bias = _convolution_backward(grad_output, input, weight, ctx.geometry, mask)
        return *once("conv2d", anchors, grad_input, grad_weight, grad_bias), *[None] * 6


def conv2d_products(
    grad_output: Tensor, input: Tensor, weight: Tensor, geometry: Sequence[Any], pruning: Pruning, key: Key
) -> Products:
    """The data gradient of a convolution: exact, pruned, and sparse. Of ``input``, shape and memory format count."""
    (n, m), _, _ = pruning
    stride, padding, dilation, groups = geometry

    def dense(grad_output: Tensor) -> Tensor:
        grad_input = _convolution_backward(grad_output, input, weight, geometry, (True, False, False))[0]
        assert grad_input is not None
        return grad_input

    def pruned(seed: OptionalTensor) -> Tensor:
        return dense(prune_conv2d_grad(grad_output, groups, pruning, seed))

    def sparse(seed: OptionalTensor) -> Tensor:
        channels_last = _is_channels_last(input) or _is_channels_last(weight)  # as ATen decides
        size = input.shape[2:]
        grad, rest = rescaled(_by_group(grad_output, groups, m), 1, pruning)
        grad = grad.reshape(grad_output.shape)
        if grad.is_cuda:
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            operand = semi_structured.pack(rows(grad.movedim(1, -1)), pruning.pattern, rest, seed)
            columns = semi_structured.multiply(operand, weight.flatten(1))  # (pixels, in x kH x kW)
            return _fold(columns, grad, weight, size, geometry).contiguous(memory_format=memory_format)
        return conv2d_input_grad_nm(
            grad, weight, n, m, rest, seed, size, stride, padding, dilation, groups, channels_last
        )

    return Products(
        key,
        grad_output.device,
        lambda: backends.obstacle(pruning, grad_output, groups),
        dense=lambda: dense(grad_output),
        pruned=pruned,
        sparse=sparse,
    )


def prune_conv2d_grad(grad_output: Tensor, groups: int, pruning: Pruning, seed: OptionalTensor) -> Tensor:
    """The output gradient (N, C, H, W) of a convolution, pruned as its data gradient wants it."""
    (n, m), method, _ = pruning
    return prune_nm(_by_group(grad_output, groups, m), n, m, 1, method, seed).reshape(grad_output.shape)


def _by_group(grad_output: Tensor, groups: int, m: int) -> Tensor:
    """(N, C, H, W), or (N * groups, C / groups, H, W) where a pruning group would cross convolution groups."""
    samples, channels = grad_output.shape[:2]
    if groups == 1 or channels // groups % m == 0:
        return grad_output
    return grad_output.reshape(samples * groups, channels // groups, *grad_output.shape[2:])


def _fold(columns: Tensor, grad_output: Tensor, weight: Tensor, size: Sequence[int], geometry: Sequence[Any]) -> Tensor:
    """Adds up (pixels of the gradient, in x kH x kW) where the taps meet: (N, in, H, W)."""
    stride, padding, dilation, _ = geometry
    samples, kernel = grad_output.shape[0], weight.shape[2:]
    if (*kernel, *stride, *padding) == (1, 1, 1, 1, 0, 0):
        return columns.reshape(samples, *size, weight.shape[1]).movedim(-1, 1)
    taps = columns.reshape(samples, -1, columns.shape[1]).transpose(1, 2)
    return F.fold(taps, (size[0], size[1]), kernel, dilation, padding, stride)


def _convolution_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, geometry: Sequence[Any], mask: tuple[bool, bool, bool]
) -> tuple[OptionalTensor, ...]:
    stride, padding, dilation, groups = geometry
    gradients: tuple[OptionalTensor, ...] = torch.ops.aten.convolution_backward(
        grad_output, input, weight, [weight.shape[0]], stride, padding, dilation, False, (0, 0), groups, mask
    )
    return gradients


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _pair(value: int | _Pair) -> _Pair:
    if isinstance(value, int):
        return value, value
    if len(value) not in (1, 2):
        raise ValueError(f"conv2d: expected stride, padding and dilation to be a number or a pair, got {value!r}")
    return value[0], value[-1]


def _pad(input: Tensor, weight: Tensor, stride: _Pair, padding: str, dilation: _Pair) -> tuple[Tensor, _Pair]:
    """Turns "same" and "valid" into numbers; what "same" pads on one side only goes into the input."""
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

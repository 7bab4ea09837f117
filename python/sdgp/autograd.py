# SPDX-License-Identifier: BSD-3-Clause
"""linear and conv2d with a pruned data gradient, as Python autograd over ATen's operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import backends, semi_structured
from .backends import Key, Products
from .ops import conv2d_input_grad_nm, linear_input_grad_nm, prune_nm
from .pattern import PatternLike, Pruning

_Pair: TypeAlias = tuple[int, int]
_OptionalTensor: TypeAlias = Tensor | None


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


def pruned_linear(input: Tensor, weight: Tensor, bias: _OptionalTensor, pruning: Pruning) -> tuple[Tensor, Key | None]:
    """``linear`` for settings that are known to be good; and the key of its choice, None where there is none."""
    work = input.numel() * weight.shape[0]
    if not _has_data_gradient(input) or backends.stays_exact(pruning, work):
        return F.linear(input, weight, bias), None
    if (sharded := backends.sharded("linear", pruning, input, weight)) is not None:
        return F.linear(input, weight, bias), sharded
    input, weight, bias = _autocast(input, weight, bias)
    key = backends.make_key(pruning, work, input, weight)
    if pruning.backend == "auto" and backends.found_exact(key):
        return F.linear(input, weight, bias), key
    output: Tensor = _Linear.apply(input, weight, bias, pruning, key)
    return output, key


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
    bias: _OptionalTensor,
    stride: int | _Pair,
    padding: int | _Pair | str,
    dilation: int | _Pair,
    groups: int,
    pruning: Pruning,
) -> tuple[Tensor, Key | None]:
    """``conv2d`` for settings that are known to be good; and the key of its choice, None where there is none."""
    work = input.numel() * weight.shape[0] // groups * weight.shape[2] * weight.shape[3]  # at stride 1
    if not _has_data_gradient(input) or backends.stays_exact(pruning, work):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups), None
    if (sharded := backends.sharded("conv2d", pruning, input, weight)) is not None:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups), sharded
    input, geometry = conv2d_geometry(input, weight, stride, padding, dilation, groups)
    input, weight, bias = _autocast(input, weight, bias)
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


class _Linear(Function):
    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: _OptionalTensor, pruning: Pruning, key: Key) -> Tensor:
        return F.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, ctx.pruning, ctx.key = inputs
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight)  # frozen weights keep no input

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[_OptionalTensor, ...]:
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            products = linear_products(grad_output, weight, ctx.pruning, ctx.key)
            grad_input = backends.data_gradient("linear", products, ctx.pruning)
        if ctx.needs_input_grad[1]:
            grad, rows = _rows(grad_output), _rows(input)
            # Laid out as the weight, as ATen does: else what accumulates the gradient copies it.
            grad_weight = grad.t() @ rows if weight.is_contiguous() else (rows.t() @ grad).t()
        if ctx.needs_input_grad[2]:
            grad_bias = _rows(grad_output).sum(0)
        gradients = _once("linear", (grad_output, weight, input), grad_input, grad_weight, grad_bias)
        return *gradients, None, None


def linear_products(grad_output: Tensor, weight: Tensor, pruning: Pruning, key: Key) -> Products:
    """The data gradient of a linear layer: exact, pruned, and sparse."""
    (n, m), method, _ = pruning

    def sparse(seed: _OptionalTensor) -> Tensor:
        grad, rest = _rescaled(grad_output, -1, pruning)
        if grad.is_cuda:
            operand = semi_structured.pack(_rows(grad), pruning.pattern, rest, seed)
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


class _Conv2d(Function):
    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: _OptionalTensor,
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
    def backward(ctx: Any, grad_output: Tensor) -> tuple[_OptionalTensor, ...]:
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
        return *_once("conv2d", anchors, grad_input, grad_weight, grad_bias), *[None] * 6


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

    def pruned(seed: _OptionalTensor) -> Tensor:
        return dense(prune_conv2d_grad(grad_output, groups, pruning, seed))

    def sparse(seed: _OptionalTensor) -> Tensor:
        channels_last = _is_channels_last(input) or _is_channels_last(weight)  # as ATen decides
        size = input.shape[2:]
        grad, rest = _rescaled(_by_group(grad_output, groups, m), 1, pruning)
        grad = grad.reshape(grad_output.shape)
        if grad.is_cuda:
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            operand = semi_structured.pack(_rows(grad.movedim(1, -1)), pruning.pattern, rest, seed)
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


def prune_conv2d_grad(grad_output: Tensor, groups: int, pruning: Pruning, seed: _OptionalTensor) -> Tensor:
    """The output gradient (N, C, H, W) of a convolution, pruned as its data gradient wants it."""
    (n, m), method, _ = pruning
    return prune_nm(_by_group(grad_output, groups, m), n, m, 1, method, seed).reshape(grad_output.shape)


def _rescaled(grad_output: Tensor, dim: int, pruning: Pruning) -> tuple[Tensor, str]:
    """What a sparse product prunes, and by what: rescale's sums want all of the gradient, so it comes first, and of
    what it leaves magnitude keeps everything."""
    pattern, method, _ = pruning
    if method != "rescale":
        return grad_output, method
    return prune_nm(grad_output, *pattern, dim, method), "magnitude"


def _fold(columns: Tensor, grad_output: Tensor, weight: Tensor, size: Sequence[int], geometry: Sequence[Any]) -> Tensor:
    """Adds up (pixels of the gradient, in x kH x kW) where the taps meet: (N, in, H, W)."""
    stride, padding, dilation, _ = geometry
    samples, kernel = grad_output.shape[0], weight.shape[2:]
    if (*kernel, *stride, *padding) == (1, 1, 1, 1, 0, 0):
        return columns.reshape(samples, *size, weight.shape[1]).movedim(-1, 1)
    taps = columns.reshape(samples, -1, columns.shape[1]).transpose(1, 2)
    return F.fold(taps, (size[0], size[1]), kernel, dilation, padding, stride)


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


def _once(op: str, sources: tuple[_OptionalTensor, ...], *gradients: _OptionalTensor) -> tuple[_OptionalTensor, ...]:
    """The gradients, so that differentiating them again, through any of what they were made from, is an error."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradients
    anchor = next((source for source in sources if source is not None and source.requires_grad), None)
    if anchor is None:
        return gradients
    return tuple(None if grad is None else _Once.apply(grad.detach(), anchor, op) for grad in gradients)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _rows(x: Tensor) -> Tensor:
    """(..., features) -> (rows, features)"""
    return x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)


def _has_data_gradient(input: Tensor) -> bool:
    return input.requires_grad and torch.is_grad_enabled()


def _autocast(input: Tensor, weight: Tensor, bias: _OptionalTensor) -> tuple[Tensor, Tensor, _OptionalTensor]:
    """Casts as autocast would inside the operator: outside it, so that autograd casts the gradients back."""
    device = input.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast, and asking raises
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    return cast(input), cast(weight), None if bias is None else cast(bias)


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


def _by_group(grad_output: Tensor, groups: int, m: int) -> Tensor:
    """(N, C, H, W), or (N * groups, C / groups, H, W) where a pruning group would cross convolution groups."""
    samples, channels = grad_output.shape[:2]
    if groups == 1 or channels // groups % m == 0:
        return grad_output
    return grad_output.reshape(samples * groups, channels // groups, *grad_output.shape[2:])


def _convolution_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, geometry: Sequence[Any], mask: tuple[bool, bool, bool]
) -> tuple[_OptionalTensor, ...]:
    stride, padding, dilation, groups = geometry
    gradients: tuple[_OptionalTensor, ...] = torch.ops.aten.convolution_backward(
        grad_output, input, weight, [weight.shape[0]], stride, padding, dilation, False, (0, 0), groups, mask
    )
    return gradients

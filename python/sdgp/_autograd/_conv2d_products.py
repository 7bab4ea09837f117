# SPDX-License-Identifier: BSD-3-Clause
"""The gradients of a convolution, each computed in three ways (``Products``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _semi_structured
from .._ops import conv2d_input_grad_nm, conv2d_weight_grad_nm, prune_nm
from .._pattern import Pruning
from .._rules import obstacle
from .._semi_structured import DEFAULT, Algorithm, Operand
from ._autocast import OptionalTensor
from ._backward import detached, rescaled, rows

Pair: TypeAlias = tuple[int, int]


class Geometry(NamedTuple):
    """The arguments of a convolution that are not tensors, in numbers."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


@dataclass(slots=True)
class _Conv2dGradient:
    """One gradient of a convolution (``Products``): result number ``index`` of ``convolution_backward``."""

    grad_output: Tensor
    input: Tensor
    weight: Tensor
    geometry: Geometry
    pruning: Pruning

    index: ClassVar[int]
    gradient: ClassVar[str]

    @property
    def work(self) -> int:
        return multiply_adds(self.input, self.weight, self.geometry.groups)

    def obstacle(self) -> str | None:
        grad = self.grad_output
        return obstacle("conv2d", self.gradient, self.pruning, grad.device, grad.dtype, self.geometry.groups)

    def exact(self) -> Tensor:
        return self._multiply(self.grad_output)

    @property
    def _channels_last(self) -> bool:
        """Whether the result is channels_last, as ATen decides."""
        return is_channels_last(self.input) or is_channels_last(self.weight)

    def _multiply(self, grad_output: Tensor) -> Tensor:
        mask = (self.index == 0, self.index == 1, False)
        found = convolution_backward(grad_output, self.input, self.weight, self.geometry, mask)[self.index]
        assert found is not None
        return found


class Conv2dProducts(_Conv2dGradient):
    """The data gradient of a convolution. Only the shape and memory format of ``input`` matter."""

    __slots__ = ()
    index, gradient = 0, "data"

    def dense(self, seed: OptionalTensor = None) -> Tensor:
        return self._multiply(prune_conv2d_grad(self.grad_output, self.geometry.groups, self.pruning, seed))

    def sparse(self, seed: OptionalTensor = None, algorithm: Algorithm = DEFAULT) -> Tensor:
        (n, m), weight = self.pruning.pattern, self.weight
        size = self.input.shape[2:]
        if self.grad_output.is_cuda:
            memory_format = torch.channels_last if self._channels_last else torch.contiguous_format
            columns = _semi_structured.multiply(*self.operands(seed), algorithm)  # (pixels, in x kH x kW)
            return _fold(columns, self.grad_output, weight, size, self.geometry).contiguous(memory_format=memory_format)
        stride, padding, dilation, groups = self.geometry
        grad, method = self._rescaled()
        return conv2d_input_grad_nm(
            grad, weight, n, m, method, seed, size, stride, padding, dilation, groups, self._channels_last
        )

    def operands(self, seed: OptionalTensor = None) -> tuple[Operand, Tensor]:
        grad, method = self._rescaled()
        return _semi_structured.pack(
            rows(grad.movedim(1, -1)), self.pruning.pattern, method, seed
        ), self.weight.flatten(1)

    def _rescaled(self) -> tuple[Tensor, str]:
        groups, (_, m) = self.geometry.groups, self.pruning.pattern
        grad, method = rescaled(_by_group(detached(self.grad_output), groups, m), 1, self.pruning)
        return grad.reshape(self.grad_output.shape), method


class Conv2dWeightProducts(_Conv2dGradient):
    """The weight gradient of a convolution. Only the shape and memory format of ``weight`` matter."""

    __slots__ = ()
    index, gradient = 1, "weight"

    def dense(self, seed: OptionalTensor = None) -> Tensor:
        n, m = self.pruning.pattern
        grad = prune_nm(self._pixels(), n, m, -1, self.pruning.method, seed)
        return self._multiply(grad.reshape(self.grad_output.shape))

    def sparse(self, seed: OptionalTensor = None, algorithm: Algorithm = DEFAULT) -> Tensor:
        n, m = self.pruning.pattern
        grad, method = rescaled(self._pixels(), -1, self.pruning)
        grad = grad.reshape(self.grad_output.shape)
        kernel_size = self.weight.shape[2:]
        return conv2d_weight_grad_nm(
            grad, self.input, n, m, method, seed, kernel_size, *self.geometry, self._channels_last
        )

    def operands(self, seed: OptionalTensor = None) -> None:
        return None  # `obstacle` says why

    def _pixels(self) -> Tensor:
        """Returns the gradient as (N, out, H' x W'), by reshape, because flatten has no rule for vmap."""
        samples, channels, height, width = self.grad_output.shape
        return detached(self.grad_output).reshape(samples, channels, height * width)


def multiply_adds(input: Tensor, weight: Tensor, groups: int) -> int:
    """Returns the multiply-adds of either gradient, as if the stride were 1."""
    out, _, height, width = weight.shape
    return input.numel() * out // groups * height * width


def prune_conv2d_grad(grad_output: Tensor, groups: int, pruning: Pruning, seed: OptionalTensor) -> Tensor:
    """Prunes the output gradient (N, C, H, W) of a convolution along the output channels of each convolution group."""
    n, m = pruning.pattern
    pruned = prune_nm(_by_group(detached(grad_output), groups, m), n, m, 1, pruning.method, seed)
    return pruned.reshape(grad_output.shape)


def _by_group(grad_output: Tensor, groups: int, m: int) -> Tensor:
    """Returns (N, C, H, W), or (N * groups, C / groups, H, W) if a pruning group would cross convolution groups."""
    samples, channels = grad_output.shape[:2]
    if groups == 1 or channels // groups % m == 0:
        return grad_output
    return grad_output.reshape(samples * groups, channels // groups, *grad_output.shape[2:])


def _fold(columns: Tensor, grad_output: Tensor, weight: Tensor, size: Sequence[int], geometry: Geometry) -> Tensor:
    """Adds the columns (pixels of the gradient, in x kH x kW) that belong to one input pixel: (N, in, H, W)."""
    stride, padding, dilation, _ = geometry
    samples, kernel = grad_output.shape[0], weight.shape[2:]
    if (*kernel, *stride, *padding) == (1, 1, 1, 1, 0, 0):
        return columns.reshape(samples, *size, weight.shape[1]).movedim(-1, 1)
    taps = columns.reshape(samples, -1, columns.shape[1]).transpose(1, 2)
    return F.fold(taps, (size[0], size[1]), kernel, dilation, padding, stride)


def convolution_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, mask: tuple[bool, bool, bool]
) -> tuple[OptionalTensor, OptionalTensor, OptionalTensor]:
    stride, padding, dilation, groups = geometry
    gradients: tuple[OptionalTensor, OptionalTensor, OptionalTensor] = torch.ops.aten.convolution_backward(
        grad_output, input, weight, [weight.shape[0]], stride, padding, dilation, False, (0, 0), groups, mask
    )
    return gradients


def is_channels_last(x: Tensor) -> bool:
    if torch._C._are_functorch_transforms_active():  # vmap does not support the query
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
